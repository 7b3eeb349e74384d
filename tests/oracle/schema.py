"""schema.json with the rules of npdrt and the slots that they keep; the rest is written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np

from npdrt import optim
from npdrt.conform.rules import RULES
from npdrt.conform.vectors import FOLDER

NAME = "schema.json"


def text() -> bytes:
    """The file, with the names in it brought up to date."""
    rules = f'"rule": {{"enum": {json.dumps(list(RULES))}}}'
    kinds = {"step": '{"type": "integer", "minimum": 0}', **dict(sorted(slots(), key=is_number))}
    state = ",\n".join(f'    "{name}": {kind}' for name, kind in kinds.items())
    found = (FOLDER / NAME).read_text(encoding="utf-8")
    found = re.sub(r'"rule": \{"enum": \[.*?\]\}', rules, found, count=1)
    return re.sub(r'(?s)("state": \{.*?"properties": \{\n).*?(?=\n   \})', rf"\1{state}", found,
                  count=1).encode()  # fmt: skip


def slots() -> Iterator[tuple[str, str]]:
    """Name -> schema of everything that a rule keeps under some settings."""
    for rule in RULES.values():
        for settings in rule.asked:
            state = optim.RULES[rule.name](lr=0.0, **settings).init({"w": np.zeros(3)})
            for name, value in state.items():
                if name != "step":
                    kind = "bits" if value.shape else "number"
                    yield name.removeprefix("w/"), f'{{"$ref": "#/$defs/{kind}"}}'


def is_number(slot: tuple[str, str]) -> bool:
    """Arrays come first."""
    return "number" in slot[1]
