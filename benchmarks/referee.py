"""Whether the referee is right: on implementations without a fault, with one, on right answers.

A *run* is an implementation as some library has it: any dialect of any rule, in any arithmetic that
is right, with random settings, some of them lacking. It answers most of the vectors and 20 cases of
its own. It is wrong if the finding has another dialect, another arithmetic or a clause too many. A
*planted fault* is one change of such an implementation. It is named if the finding has its clause,
refused if the audit does not pass, accepted if it passes as the published rule or as a dialect. A
*right case* is one step of an implementation of a published rule, in any arithmetic that is right.
It is a false alarm if it is beyond the accepted error. The implementations and faults are those of
tests/standins.py, adaptive.py, layerwise.py and planted.py; none of them uses the referee's rules.

The same seeds give the same table. Exit code 1: a wrong run, an accepted fault or a false alarm.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

import report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # so that `import standins` works

import randomised


def main() -> None:
    """Print the table, and every run, fault and case of which the referee is not right."""
    parser = report.parser(__doc__)
    parser.add_argument("--runs", type=int, default=300, metavar="N", help="runs without a fault")
    parser.add_argument("--faults", type=int, default=100, metavar="N", help="planted faults")
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="right cases")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first of the seeds")
    asked = parser.parse_args()
    start, took = asked.seed, {}

    began = time.process_time()
    wrong = [told for seed in range(asked.runs) if (told := randomised.mistake(start + seed))]
    took["runs"] = time.process_time() - began
    faults = [randomised.planted_at_random(start + seed) for seed in range(asked.faults)]
    took["faults"] = time.process_time() - began - took["runs"]
    alarms = [told for seed in range(asked.cases) if (told := randomised.alarm(start + seed))]

    found = Counter(result for result, _ in faults)
    text = report.table(
        ("what", "of", "result"),
        [
            ("runs without a fault", str(asked.runs), f"{len(wrong)} wrong"),
            (
                "planted faults that a clause describes",
                str(asked.faults - found["refused, no clause"]),
                f"{found['named']} named, {found['refused']} refused without its name",
            ),
            (
                "planted faults that no clause describes",
                str(found["refused, no clause"]),
                f"{found['refused, no clause']} refused",
            ),
            ("planted faults of both kinds", str(asked.faults), f"{found['accepted']} accepted"),
            ("right cases", str(asked.cases), f"{len(alarms)} false alarms"),
        ],
    )
    print(text)
    odd = [told for result, told in faults if result in ("accepted", "refused")]
    print(*("", *wrong, *odd, *alarms), sep="\n")
    for what, seconds in took.items():
        print(f"{seconds / max(getattr(asked, what), 1):.2f} s of CPU for each of the {what}")
    sys.exit(bool(wrong or alarms or found["accepted"]))


if __name__ == "__main__":
    main()
