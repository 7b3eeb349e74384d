"""One training step as a program, recorded on arrays without values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from npdrt.compute import arithmetic
from npdrt.data import Dataset
from npdrt.models import Model
from npdrt.program import Program, record
from npdrt.random import Random
from npdrt.train.adversarial import make_task
from npdrt.train.config import (
    Config,
    build_model,
    build_optimizer,
    example_shape,
    load_data,
    resolve,
)
from npdrt.train.run import blame
from npdrt.train.step import State, make_step


def record_step(config: Config, data_dir: Path | None = None) -> Program:
    """One step of `npdrt train` with that configuration, recorded on arrays without values."""
    dataset = load_data(config, data_dir)
    config = resolve(config, dataset)
    dataset = dataset.as_streams_for(config.batch_size)
    model, optimizer = build_model(config, dataset), build_optimizer(config)
    x, y = _batch(config, dataset, model)
    with arithmetic(config.arithmetic), blame(config):
        params = _parameters(model, config)
        task = make_task(config, model, dataset)
        buffers = task.buffers(config.seed, "cpu", config.dtype)
        state = State(params, buffers, optimizer.init(params))
        step = make_step(task, optimizer)
        return record(step, state, x, y, float(config.lr), Random(config.seed, "train", 0))


def _parameters(model: Model, config: Config) -> dict[str, Any]:
    """Arrays of the model's shapes; a user's model, which may not tell them, draws its own."""
    if ":" not in config.model and hasattr(model, "shapes"):
        shapes = model.shapes().items()
        return {name: np.zeros(shape, config.dtype) for name, shape in shapes}
    drawn: dict[str, Any] = model.init(seed=config.seed, device="cpu", dtype=config.dtype)
    return drawn


def _batch(config: Config, dataset: Dataset, model: Model) -> tuple[Any, Any]:
    """Arrays of the form of a batch's examples and labels or targets."""
    rows = len(dataset.sampler(config.batch_size, config.seed).batch(0))
    dtype = config.dtype if dataset.vocabulary is None else dataset.x.dtype
    x = np.zeros((rows, *example_shape(model, dataset)), dtype)
    if dataset.classes is not None:
        return x, np.zeros((rows, *dataset.y.shape[1:]), dataset.y.dtype)
    return x, np.zeros((rows, dataset.y[0].size), config.dtype)
