"""Fixtures that every test file may use: `backend`, an array library, and `xp`, its module."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from npdrt import blas

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores already
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
blas.choose_kernels()  # those of the command, whose runs are compared with runs in this process

# A signal that is ignored, as under nohup, stays ignored in child processes; this one is tested.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

# The same examples in every run: a change is judged by itself. `--hypothesis-profile=default`
# looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

sys.path.insert(0, str(Path(__file__).parent))  # so that `import backends` finds its file

import backends  # noqa: E402 - it imports NumPy

# (backend, pattern in a test's name) -> why it cannot pass there; it must fail, or the suite fails.
EXPECTED_FAILURES: dict[tuple[str, str], str] = {
    ("array_api_strict", r"getitem\(.*index=\(?None"): "the standard assigns to no None index",
    ("array_api_strict", r"test_operators\[.*tensor right-\w+-(array|0-d)"): (
        "its arrays raise for other types where the standard asks for NotImplemented"
    ),
}

# What `-m quick` runs: the engine, the rules and their updates, and the rules of the house.
QUICK = {
    "arrays", "autodiff", "blas", "check", "house", "mlp", "optim", "random", "rules", "sums",
    "tails", "trust_distances", "updates",
}  # fmt: skip
SLOW = {  # among them
    "test_sgd_equals_pytorch", "test_lars_equals_the_paper", "test_equals_optax",
    "test_other_processes", "test_equals_the_page_large", "test_ten_million_elements",
    "test_first_weights_depend_on_seed_and_name_alone", "test_a_rule_is_one_file",
}  # fmt: skip


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.gpu if name == "cupy" else ())
        for name in backends.BACKENDS
    ]
)
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    """Each array library in turn; real CuPy is skipped, with its reason, without a device."""
    return backends.BACKENDS[request.param]()


@pytest.fixture
def xp(backend: backends.Backend) -> Any:
    """The array module of `backend`."""
    return backend.xp


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name, test = item.path.stem.removeprefix("test_"), getattr(item, "originalname", item.name)
        if name in QUICK and test not in SLOW:
            item.add_marker(pytest.mark.quick)
        for (backend, pattern), reason in EXPECTED_FAILURES.items():
            if _backend(item) == backend and re.search(pattern, item.name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def _backend(item: pytest.Item) -> str | None:
    parameters = getattr(item, "callspec", None)
    return parameters.params.get("backend") if parameters else None
