"""What the benchmarks share: the machine's line, tables, and the files of --output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is, with --output."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--output", type=Path, metavar="PREFIX", help="write PREFIX.md and PREFIX.json too"
    )
    return made


def machine_line(about: dict[str, Any]) -> str:
    """The processor, the BLAS and the packages on one line; about: `step.machine()`."""
    blas = ", ".join(
        f"{b['library']} {b['version']} ({b['kernel']}, {b['threads']} threads)"
        for b in about["threads"]["BLAS"]
    )
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    return f"{about['cpu']}; {blas}; {packages}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def publish(text: str, about: dict[str, Any], results: Any, output: Path | None) -> None:
    """Print the machine's line and `text`; with `output` write both and the numbers to files."""
    whole = f"{machine_line(about)}\n\n{text}"
    print(whole)
    if output:
        from npdrt.store.log import finite  # not before a benchmark has measured memory

        found = json.dumps(finite({"machine": about, "results": results}), indent=1)
        Path(f"{output}.md").write_text(whole + "\n", encoding="utf-8")
        Path(f"{output}.json").write_text(found + "\n", encoding="utf-8")
