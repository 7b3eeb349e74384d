"""How long npdrt takes to start: medians of whole processes, as a table and as JSON.

`import npdrt` is counted beyond a bare `python -c pass`, `npdrt --help` with the interpreter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

TARGETS = {"import npdrt": 150.0, "npdrt --help": 250.0}  # milliseconds


def once(*words: str) -> float:
    """Milliseconds that one process takes from start to end."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return 1e3 * (time.perf_counter() - begun)


def main() -> None:
    """Measure in turns, so that a busy moment meets all three alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    cases = {
        "python": ("-c", "pass"),
        "import": ("-c", "import npdrt"),
        "help": ("-m", "npdrt", "--help"),
    }
    for words in cases.values():  # bytecode and file cache
        once(*words)
    turns = [{name: once(*words) for name, words in cases.items()} for _ in range(repeats)]
    median = {name: statistics.median(turn[name] for turn in turns) for name in cases}
    found = {"import npdrt": median["import"] - median["python"], "npdrt --help": median["help"]}
    print("| | ms | target |\n|---|---|---|")
    print(f"| python | {median['python']:.0f} | |")
    for name, value in found.items():
        print(f"| {name} | {value:.0f} | under {TARGETS[name]:.0f} |")
    print(json.dumps({"python": median["python"], **found, "repeats": repeats}))


if __name__ == "__main__":
    main()
