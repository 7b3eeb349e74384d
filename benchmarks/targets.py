"""What `npdrt audit` finds in every optimizer that it knows by name and that is installed, as a
table; a line of JSON for each on standard error.

`python benchmarks/targets.py torch keras` takes the optimizers of these packages alone. Keras runs
on the backend that KERAS_BACKEND names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from npdrt.conform import report, targets
from npdrt.conform.audit import audit
from npdrt.conform.rules import KNOWN
from npdrt.errors import Error, Unavailable

# arguments with which an optimizer is audited again
PATHS = [{name: True} for name in ("foreach", "fused", "maximize", "amsgrad", "capturable")]
SETS: dict[str, list[dict[str, Any]]] = {
    "torch.optim.SGD": PATHS[:3],
    "torch.optim.Adam": PATHS,
    "torch.optim.AdamW": PATHS,
    "torch.optim.RMSprop": [PATHS[k] for k in (0, 2, 4)],
    "timm.optim.AdaBelief": [{"rectify": False}],
    "optax.adabelief": [{"eps_root": 0.0}],
}


def asked(packages: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, arguments) of every optimizer to be audited."""
    for name in KNOWN:
        if not packages or name.partition(".")[0] in packages:
            yield from ((name, given) for given in ({}, *SETS.get(name, [])))


def row(name: str, given: dict[str, Any], formats: list[str]) -> dict[str, Any]:
    """What is found in one optimizer."""
    target = targets.find(name, given)
    found = report.as_json(audit(target, formats, limit=60.0))
    clauses = [f"`{c['name']}`: {c['found']}" for c in found["clauses"]]
    return {
        "target": target.name,
        "version": target.versions[target.kind],
        "rule": found["rule"] or target.rule,
        "dialect": (found["dialect"] or {}).get("name", ""),
        "clauses": "; ".join(clauses),
        "verdict": found["verdict"],
        "sentence": found["sentence"],
    }


def main() -> None:
    """Audit them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*")
    parser.add_argument("--format", action="append", dest="formats")
    parsed = parser.parse_args()
    columns = ("target", "version", "rule", "dialect", "clauses", "verdict")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for name, given in asked(parsed.packages):
        try:
            found = row(name, given, parsed.formats or ["float32", "float64"])
        except Unavailable:
            continue
        except Error as error:
            found = dict.fromkeys(columns, "") | {"target": name, "verdict": str(error)}
        print(json.dumps(found), file=sys.stderr, flush=True)
        cells = ["`" + found["target"] + "`", *(found[c].replace("|", "\\|") for c in columns[1:])]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
