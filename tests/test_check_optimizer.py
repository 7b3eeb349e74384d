"""`npdrt.conform.check`: one line in somebody's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npdrt import optim
from npdrt.conform import Disagrees, check
from npdrt.errors import Error

PAGE = Path(__file__).parents[1] / "docs/audit.md"
FORMATS = ["float64"]


def heavy(w: Any, g: Any, state: Any, *, lr: float, momentum: float = 0.0) -> Any:
    v = momentum * state.get("momentum", np.zeros_like(w)) + g
    return w - lr * v, {"momentum": v}


def early(w: Any, g: Any, state: Any, *, lr: float, momentum: float = 0.0) -> Any:
    """Keras's: the rate is inside the velocity."""
    v = momentum * state.get("momentum", np.zeros_like(w)) - lr * g
    return w + v, {"momentum": v}


def test_an_optimizer_that_agrees() -> None:
    found = check(heavy, rule="sgd", formats=FORMATS)
    assert (found.verdict, found.rule, found.name) == ("agrees", "sgd", "heavy")
    assert not any("LARGE" in j.test.case.flags for j in found.judged)


@pytest.mark.parametrize("rule", ["fromage", "rmsprop", "lars"])
def test_npdrts_own_rules_as_factories(rule: str) -> None:
    """Every case, those that start in the middle and those with two tensors too: to the bit."""
    found = check(optim.RULES[rule], rule=rule, formats=FORMATS)
    assert found.verdict == "agrees to the bit"
    assert any(j.test.case.neighbour for j in found.judged)
    assert rule == "fromage" or any(j.test.case.state for j in found.judged)


def test_a_factory_that_loses_its_state_is_found() -> None:
    def forgetful(lr: float = 0.1, momentum: float = 0.0) -> optim.Optimizer:
        made = optim.sgd(lr=lr, momentum=momentum)

        def rule(w: Any, g: Any, slots: Any, shared: Any, rate: Any) -> Any:
            w, slots = made.rule(w, g, slots, shared, rate)
            return w, {name: np.zeros_like(value) for name, value in slots.items()}

        return optim.Optimizer("forgetful", made.settings, rule, made.slots)

    with pytest.raises(Disagrees, match="`state`: forgotten after every step"):
        check(forgetful, rule="sgd", formats=FORMATS)


def test_the_smallest_case_is_in_the_message() -> None:
    with pytest.raises(AssertionError) as caught:
        check(early, rule="sgd", formats=FORMATS)
    message, found = str(caught.value), caught.value.audit  # type: ignore[attr-defined]
    assert message.startswith("early is the tensorflow dialect of sgd: it differs")
    assert f"smallest disagreeing test: {found.finding.smallest.id}, " in message
    assert "bits expected" in message
    assert message.count("smallest disagreeing") == 1
    assert check(early, rule="sgd", formats=FORMATS, dialect="tensorflow").verdict == "dialect"


def test_an_exception_is_said_with_its_line() -> None:
    def broken(w: Any, g: Any, state: Any, *, lr: float) -> Any:
        return w / None, state

    with pytest.raises(Disagrees, match=r"it raises .* TypeError: .*test_check_optimizer.py:\d+"):
        check(broken, rule="sgd", formats=FORMATS)


def test_ctrl_c_ends_a_check() -> None:
    def stopped(w: Any, g: Any, state: Any, *, lr: float) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(stopped, rule="sgd", formats=FORMATS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "sdg"}, "unknown rule 'sdg'"),
        ({"formats": ["float8"]}, "unknown format 'float8'"),
        ({"dialect": "keras"}, "unknown dialect 'keras' of sgd"),
        ({"settings": {"nesterow": True}}, "heavy has no 'nesterow'; it has lr, momentum"),
        ({"optimizer": optim.sgd(lr=0.1)}, "give the function that makes it"),
        ({"optimizer": lambda w, g: w}, "does not fit the protocol"),
        ({"optimizer": "nowhere.py:update"}, "nowhere.py does not exist"),
    ],
)
def test_what_cannot_be_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        check(**{"optimizer": heavy, "rule": "sgd", **given})


def test_the_line_of_the_page() -> None:
    text = PAGE.read_text()
    block = next(b for b in text.split("```python\n")[1:] if "def test_adam" in b).split("```")[0]
    scope: dict[str, Any] = {"my_adam": optim.adam}
    exec(block, scope)
    scope["test_adam"]()
