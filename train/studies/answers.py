"""Exact match and F1 of the answers that a run's last checkpoint gives (SQuAD)."""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt import arrays
from npdrt.arrays import to_device, to_host
from npdrt.data import squad
from npdrt.errors import Error
from npdrt.train.studies.study import Work
from npdrt.train.studies.sweep import Run

MEASURES = ("exact_match", "f1")


def scores(work: Work, run: Run) -> dict[str, float]:
    """Exact match and F1 on the development set, percent; kept in the run's directory."""
    found = run.kept("answers", lambda: _scores(work, run))
    return {name: float(found[name]) for name in MEASURES}


def _scores(work: Work, run: Run) -> dict[str, float]:
    source, (model, checkpoint) = work.data(run), work.trained(run)
    if not isinstance(source, squad.Squad):
        raise Error(f"exact match and F1 need questions and answers; {source.name} has none")
    where, params = arrays.device(work.options.device), checkpoint.params
    with arrays.on(where):
        on_device = {name: to_device(value, where) for name, value in params.items()}
        found = logits(model, on_device, source.x_test, source.evaluation_batch_size, where)
    return squad.score(source.questions, squad.answers(source.questions, source.found, found))


def logits(model: Any, params: Any, x: Any, batch: int, where: Any) -> Any:
    """The logits of features x in evaluation mode, `batch` at a time, on the host."""
    parts = (to_device(x[start : start + batch], where) for start in range(0, len(x), batch))
    return np.concatenate([to_host(model(params, part)) for part in parts])
