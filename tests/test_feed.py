"""The batches of a run: functions of the configuration and the step alone."""

from __future__ import annotations

import random
from typing import Any

import backends
import numpy as np
import pytest

from npdrt import arrays, data
from npdrt.data import augment
from npdrt.random import Random
from npdrt.train import Config
from npdrt.train import feed as module
from npdrt.train.config import build_model, resolve
from npdrt.train.feed import Feed

MODELS = {
    "mlp": {"model_options": {"depth": 2, "width": 8}, "dtype": "float64"},
    "resnet18": {"model_options": {"width": 2}, "augment": "crop-flip"},
    "transformer": {"model_options": {"width": 8, "hidden": 8}, "data": "sample-text"},
}


def make_feed(model: str, device: str = "cpu", **changes: Any) -> tuple[Feed, Config]:
    settings = {"batch_size": 20, "epochs": 2, "seed": 3, **MODELS[model], **changes}
    config = Config(model=model, **settings)
    dataset = data.load(config.data, standardise=config.standardise)
    config = resolve(config, dataset)
    dataset = dataset.as_streams_for(config.batch_size)
    return Feed(config, dataset, build_model(config, dataset), arrays.device(device)), config


@pytest.mark.parametrize("worth_a_thread", [0, 1 << 60])
@pytest.mark.parametrize("model", MODELS)
def test_a_batch_depends_on_its_step_alone(
    model: str, worth_a_thread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for in any order, again, or by another process that resumes the run; with images made
    ahead on a thread or not."""
    whole, _ = make_feed(model)
    monkeypatch.setattr(module, "WORTH_A_THREAD", worth_a_thread)
    again, _ = make_feed(model)
    steps = random.Random(0).choices(range(whole.steps), k=8)
    with again.reading():
        for step in steps:
            for found, expected in zip(again.batch(step), whole.batch(step), strict=True):
                assert (found.dtype, found.tobytes()) == (expected.dtype, expected.tobytes())
    first, second = whole.batch(0)[0], whole.batch(whole.epoch)[0]
    assert model == "transformer" or first.tobytes() != second.tobytes()  # text keeps its order


@pytest.mark.parametrize("model", MODELS)
def test_an_epoch_has_every_label_once(model: str) -> None:
    feed, _ = make_feed(model)
    met = np.concatenate([feed.batch(step)[1] for step in range(feed.epoch)])
    assert sorted(met.ravel()) == sorted(np.ravel(feed.dataset.y))
    for step in (0, feed.epoch - 1):
        np.testing.assert_array_equal(feed.labels(step), feed.batch(step)[1])


def test_shapes_and_types_are_those_of_the_model() -> None:
    rows, config = make_feed("mlp")
    x, y = rows.batch(0)
    assert (x.shape, x.dtype.name, y.shape) == ((20, 64), config.dtype, (20,))
    order = Random(3, "data/order", 0).permutation(1437)[:20]
    np.testing.assert_array_equal(x, rows.train[0][order])
    images, _ = make_feed("resnet18")
    assert images.batch(0)[0].shape == (20, 1, 8, 8)
    assert images.train[0].shape[1:] == (1, 8, 8)
    assert images.valid is None
    text, _ = make_feed("transformer")
    assert (text.batch(0)[0].shape, text.batch(0)[0].dtype.kind) == ((35, 20), "i")


def test_images_are_cropped_on_any_device(backend: backends.Backend) -> None:
    """Every place and flip, with the bits of the host, and without waiting for the device."""
    rng = np.random.default_rng(0)
    keys = ((np.arange(162, dtype=np.uint64) << 32) // 162 + 1) << 32  # choices 0 to 161
    for dtype, fill in (("float32", -0.25), ("float64", 0.1)):
        images = rng.standard_normal((20, 3, 8, 6)).astype(dtype)
        images[0, 0, 0, :3] = (np.nan, -0.0, 1e-45)
        indices = rng.integers(0, 20, 162)
        waits = backends.synchronisations
        given = map(backend.asarray, (images, indices, keys))
        found = augment.crop_flip_by_index(*given, fill)
        assert backends.synchronisations == waits
        expected = augment.crop_flip(images[indices], keys, fill)
        assert backend.to_host(found).tobytes() == expected.tobytes()
        assert len({image.tobytes() for image in expected}) > 150


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("model", ["mlp", "resnet18"])
def test_gpu_batches_are_those_of_the_host(model: str, dtype: str) -> None:
    try:
        feed, _ = make_feed(model, "cuda", augment="crop-flip", dtype=dtype)
    except arrays.Unavailable as error:
        pytest.skip(str(error))
    host, _ = make_feed(model, augment="crop-flip", dtype=dtype)
    for step in (0, 1, host.epoch - 1, host.epoch):
        for found, expected in zip(feed.batch(step), host.batch(step), strict=True):
            assert found.get().tobytes() == expected.tobytes()
