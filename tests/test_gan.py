"""The adversarial network: its tables, a step beside PyTorch, its training and its pictures."""

from __future__ import annotations

import io
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_program import check
from test_train import assert_same, contents, stop_after

from npdrt import Error, arrays, data, optim, store
from npdrt.cli import cli
from npdrt.frechet import images as made_images
from npdrt.models import GAN
from npdrt.random import Random
from npdrt.store import png, trace
from npdrt.train import Config, resume, train
from npdrt.train.adversarial import Adversarial
from npdrt.train.pictures import grid
from npdrt.train.step import State, make_step
from npdrt.train.studies.figure_of_file import load

TABLE = {  # the matrix of a weight at width 64 -> how many there are, and first RMS
    (4096, 20): (1, 0.015625), (256, 2304): (5, 0.0208333), (128, 2304): (1, 0.0208333),
    (256, 1152): (1, 0.0294628), (128, 1152): (2, 0.0294628), (64, 1152): (1, 0.0294628),
    (80, 1000): (1, 0.0316228), (1000, 256): (1, 0.0316228), (128, 576): (1, 0.0416667),
    (64, 576): (2, 0.0416667), (3, 576): (1, 0.0416667), (256, 100): (6, 0.0625),
    (256, 128): (1, 0.0625), (128, 256): (1, 0.0625), (1, 256): (1, 0.0625),
    (128, 100): (4, 0.0883883), (128, 64): (3, 0.0883883), (64, 128): (3, 0.0883883),
    (16, 128): (4, 0.0883883), (64, 100): (2, 0.1), (64, 27): (1, 0.125), (64, 3): (1, 0.125),
}  # fmt: skip
MODEL, N = GAN(width=4), 6
IMAGES = np.tanh(Random(1, "images").normal((N, 3, 32, 32)))
LABELS = np.array([3, 0, 9, 3, 1, 7])


# --- the tables ------------------------------------------------------------------------------


def test_the_networks_are_those_of_the_tables() -> None:
    """44 weights with the first RMS that the authors' logs show; biases; counts."""
    model = GAN()
    params = model.init(seed=0)
    found: Counter[tuple[int, int]] = Counter()
    for name in model.normalised:
        w = params[name].astype(np.float64)
        found[shape := (len(w), w[0].size)] += 1
        assert math.sqrt((w * w).mean()) == pytest.approx(TABLE[shape][1], rel=5e-6)
    assert found == {shape: count for shape, (count, _) in TABLE.items()}
    for network, tensors, numbers, weights in (
        ("generator/", 57, 2_183_092, 27),
        ("discriminator/", 34, 2_644_130, 17),
    ):
        own = {n: w for n, w in params.items() if n.startswith(network)}
        assert (len(own), sum(w.size for w in own.values())) == (tensors, numbers)
        assert sum(n.startswith(network) for n in model.normalised) == weights
    biases = np.concatenate([w for n, w in params.items() if n.endswith("/bias")])
    assert biases.std() == pytest.approx(0.01, rel=0.05)
    ones = [w for n, w in params.items() if n.endswith("gate") or n == "generator/norm/weight"]
    assert len(ones) == 3
    assert all((w == 1).all() for w in ones)


# --- a step beside PyTorch --------------------------------------------------------------------


def start(dtype: str) -> State:
    params, buffers = MODEL.init(seed=3, dtype=dtype), MODEL.buffers(seed=3, dtype=dtype)
    return State(params, buffers, optim.sgd(lr=0.1).init(params))


def noises(random: Random) -> list[Any]:
    return [MODEL.noise(random.of(f"noise/{name}"), N) for name in MODEL.networks]


def test_two_steps_equal_pytorch() -> None:
    """Losses, gradients, statistics and singular vectors, through three passes of the discriminator
    and two of the generator a step; then both networks in evaluation mode."""
    torch = pytest.importorskip("torch")
    from torch_gan import Twin

    task, rate, state = Adversarial(MODEL, 10), 0.01, start("float64")
    step = make_step(task, optim.sgd(lr=rate))
    twin = Twin(state.params, state.buffers, torch.float64)
    for number in range(2):
        random = Random(7, "train", number)
        done = step(state, IMAGES, LABELS, rate, random)
        given = [torch.from_numpy(a) for a in (IMAGES, LABELS, *noises(random))]
        losses, grads = twin.step(*given[:2], given[2:], rate)
        assert float(done.loss) - 2.0 == pytest.approx(losses[0], abs=1e-12)
        assert float(done.others["generator"]) == pytest.approx(losses[1], abs=1e-12)
        for name, after in done.state.params.items():
            ours = (state.params[name] - after) / rate
            np.testing.assert_allclose(ours, grads[name].numpy(), rtol=0, atol=1e-11, err_msg=name)
        for name, value in done.state.buffers.items():
            theirs = twin.buffers[name].numpy()
            np.testing.assert_allclose(value, theirs, rtol=0, atol=1e-12, err_msg=name)
        state = done.state
    z = noises(Random(8))[0]
    images = MODEL(state.params, z, labels=LABELS, buffers=state.buffers)
    scores, kept = MODEL.discriminate(state.params, state.buffers, images, LABELS)
    assert all(kept[name] is value for name, value in state.buffers.items())
    with torch.no_grad():
        y = torch.from_numpy(LABELS)
        theirs = twin.generate(torch.from_numpy(z), y, train=False)
        judged = twin.discriminate(theirs, y, train=False)
    np.testing.assert_allclose(images, theirs.numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores, judged.numpy(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (2, 24, 24)])
def test_images_of_other_sizes(image_shape: Any) -> None:
    """The same network from a smaller or larger stem, as in PyTorch."""
    torch = pytest.importorskip("torch")
    from torch_gan import Twin

    model = GAN(width=4, image_shape=image_shape)
    params, buffers = model.init(seed=2, dtype="float64"), model.buffers(seed=2, dtype="float64")
    twin, z = Twin(params, buffers, torch.float64), model.noise(Random(8), N)
    images, _ = model.generate(params, buffers, z, LABELS)
    scores, _ = model.discriminate(params, buffers, images, LABELS)
    with torch.no_grad():
        y = torch.from_numpy(LABELS)
        theirs = twin.generate(torch.from_numpy(z), y, train=False)
        judged = twin.discriminate(theirs, y, train=False)
    assert images.shape == (N, *image_shape)
    np.testing.assert_allclose(images, theirs.numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores, judged.numpy(), rtol=0, atol=1e-11)


def test_the_first_version_starts_from_zeros() -> None:
    """Biases and gates; all else as in the second."""
    first, second = (GAN(width=4, start=start).init(seed=1) for start in ("v1", "v2"))
    for name, value in first.items():
        if name.endswith(("/bias", "/gate")):
            assert not value.any(), name
        else:
            np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_the_loss_is_the_hinge() -> None:
    """Of generated images first; the authors' form is smaller by 2. Right: the sign."""
    task, scores = Adversarial(MODEL, 10), np.array([-3.0, 0.5, 2.0, 0.25])
    fake, real = scores[:2], scores[2:]
    authors = np.maximum(fake, -1).mean() - np.minimum(real, 1).mean()
    assert float(task.loss(scores, LABELS[:2], smoothed=True)) == pytest.approx(authors + 2)
    assert int(task.correct(scores, LABELS[:2])) == 3
    assert task.count(LABELS[:2]) == 4


def test_a_recorded_step_has_the_bits_of_the_eager_one() -> None:
    """One program, of both networks; Adam's powers and step count are shared."""
    optimizer, first = optim.adam(lr=0.01), start("float32")
    inner = make_step(Adversarial(MODEL, 10), optimizer, traced=True)

    def step(state: Any, x: Any, y: Any, lr: Any, random: Any) -> Any:
        done = inner(State(*state), x, y, lr, random)
        after = done.state
        return (after.params, after.buffers, after.optimizer), done.loss, done.others, done.measured

    slots, x = optimizer.init(first.params), IMAGES.astype(np.float32)
    state, random = (first.params, first.buffers, slots), Random(5, "train", 1)
    program = check(step, state, x, LABELS, 0.01, random)
    assert {call.phase for call in program.calls} == {"forward", "backward", "update", "measure"}
    (_, _, after), *_ = program(state, x, LABELS, 0.01, random)
    assert list(after) == list(slots)
    assert int(after["step"]) == 1


def test_the_norms_grow_as_the_closed_form() -> None:
    """A normalised weight's gradient is orthogonal to it: the lesion multiplies every norm by
    sqrt(1 + lr^2) a step, but for -lr cos(w, g), and Fromage keeps it (Figure 2, right)."""
    for rule, growth in ((optim.lars_lesion, 0.5 * math.log1p(0.1**2)), (optim.fromage, 0.0)):
        optimizer, state = rule(lr=0.1), start("float64")
        state = State(state.params, state.buffers, optimizer.init(state.params))
        step, first = make_step(Adversarial(MODEL, 10), optimizer), state.params
        for number in range(3):
            random = Random(0, "train", number)
            state = step(state, IMAGES, LABELS, 0.1, random).state
        for name in MODEL.normalised:
            grown = np.log(np.linalg.norm(state.params[name]) / np.linalg.norm(first[name]))
            assert grown == pytest.approx(3 * growth, abs=1e-12), name


# --- training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 20 byte images, 4 of them for tests."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("gan") / "images.npz"
    x, y = rng.integers(0, 256, (20, 3, 32, 32)).astype(np.uint8), np.arange(20) % 4
    np.savez(path, x=x[:16], y=y[:16], x_test=x[16:], y_test=y[16:])
    return path


def settings(images: Path, **changes: Any) -> Config:
    config: dict[str, Any] = {
        "model": "gan", "model_options": {"width": 4}, "data": str(images), "augment": "flip",
        "lr": 0.01, "epochs": 2, "batch_size": 8, "log_every": 1, "checkpoint_every": 1,
        "trace_every": 1, "threads": 1,
    }  # fmt: skip
    return Config(**{**config, **changes})


@pytest.fixture(scope="module")
def whole(images: Path) -> Path:
    """A run that nothing stopped."""
    train(settings(images), images.parent / "whole")
    return images.parent / "whole"


def pictures(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "images").iterdir())}


def test_the_records_of_a_run(whole: Path) -> None:
    tables, about = trace.read(whole / "trace.h5")
    assert about["networks"] == ["discriminator", "generator"]
    assert tables["network/deep_relative_trust"].shape == (4, 2)
    names = about["parameters"]
    for column, network in enumerate(about["networks"]):
        chosen = [i for i, n in enumerate(names) if n.startswith(network) and n in MODEL.normalised]
        expected = np.prod(1 + tables["layers/relative_update"][:, chosen], axis=1) - 1
        found = tables["network/deep_relative_trust"][:, column]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    lines = [line for line in store.log.read(whole / "log.jsonl") if line["event"] == "step"]
    assert len(lines) == 4
    assert all(math.isfinite(line["generator_loss"]) for line in lines)
    (panel,) = [p for p in load(whole).panels if p.title == "Deep relative trust"]
    assert [line.label for line in panel.lines] == about["networks"]


def test_the_run_sees_images_from_minus_one_to_one(images: Path) -> None:
    from npdrt.train.config import load_data

    x = load_data(settings(images)).x
    assert (x.min(), x.max()) == (-1.0, 1.0)


KILLED = """
import os, signal, sys
from pathlib import Path
from npdrt.train import resume

rule = sys.modules["npdrt.optim.fromage"]
calls, usual = iter(range(1 << 30)), rule.relative_rate

def deadly(w, g, lr):
    if next(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return usual(w, g, lr)

rule.relative_rate = deadly
resume(Path(sys.argv[1]), eager=True)
"""


@pytest.fixture(scope="module")
def stopped(images: Path, whole: Path) -> Path:
    """A run that was stopped after its first step, without a program."""
    train(settings(images, eager=True), images.parent / "stopped", stop=stop_after(1))
    return images.parent / "stopped"


@pytest.mark.parametrize("array", [10, 60], ids=MODEL.networks)
def test_a_kill_in_the_middle_of_an_update(
    array: int, stopped: Path, whole: Path, tmp_path: Path
) -> None:
    """At an array of the second step: 34 of the discriminator are updated, then 57 of the other.
    The run goes on eagerly, and has the bits of the one that ran a program."""
    run = shutil.copytree(stopped, tmp_path / "run")
    command = [sys.executable, "-c", KILLED, str(run), str(array)]
    killed = subprocess.run(command, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    resume(run, eager=True)
    found, expected = contents(run), contents(whole)
    for part in (found, expected):
        part["meta"]["config"].pop("eager")
        part["log"][0]["config"].pop("eager")
        part["meta"]["progress"]["log"].pop("sha256")
    assert_same(found, expected)
    assert pictures(run) == pictures(whole)


def test_what_does_not_fit(images: Path, tmp_path: Path) -> None:
    small, targets = tmp_path / "small.npz", tmp_path / "targets.npz"
    with np.load(images) as file:
        x, y = file["x"], file["y"]
    np.savez(small, x=x[:, :, :28, :28], y=y)
    np.savez(targets, x=x, y=y.astype(np.float32))
    np.savez(tmp_path / "floats.npz", x=x.astype(np.float32), y=y)
    for changes, words in (
        ({"data": str(small)}, r"a multiple of 8; got \(3, 28, 28\); resize them"),
        ({"data": str(targets)}, "needs labels, and the examples have targets; use data"),
        ({"data": str(tmp_path / "floats.npz")}, r"is for pixels, bytes or floats from 0 to 1"),
        ({"model_options": {"width": 4, "outputs": 7}}, "has outputs=7, the data set has 4"),
        ({"model_options": {"width": 6}}, "width must be a multiple of 4, at least 4; got 6"),
        ({"label_smoothing": 0.1}, "label smoothing is for cross-entropy"),
        ({"model_options": {"width": 4, "start": "v3"}}, "one of v2, v1; got 'v3'"),
    ):
        with pytest.raises(Error, match=words):
            train(settings(images, **changes), tmp_path / "none")
    with pytest.raises(Error, match="expected 1 to 1000 classes; got 1001"):
        GAN(outputs=1001)
    for shape in ((3, 32, 24), (3, 0, 0), (3, 32)):
        with pytest.raises(Error, match="whose side is a multiple of 8; got"):
            GAN(image_shape=shape)
    assert not (tmp_path / "none").exists()


def test_divergence_names_the_network(images: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"step 1: .*(discriminator|generator).* is not finite"):
        train(settings(images, optimizer="sgd", lr=1e38, eager=True), tmp_path / "run")


# --- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_gives_its_pixels_back(channels: int) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(1).integers(0, 256, (7, 5, channels)).astype(np.uint8)
    with pillow.open(io.BytesIO(png.encode(pixels))) as image:
        image.load()
        np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    with pytest.raises(Error, match=r"\(height, width, 1 or 3\); got uint8\(7, 5, 2\)"):
        png.encode(np.zeros((7, 5, 2), np.uint8))


def test_the_grids_of_a_run_and_of_sample(whole: Path, tmp_path: Path) -> None:
    """The picture after the last step is the one that `sample` makes; a class has its own row."""
    assert list(pictures(whole)) == ["step-000000.png", "step-000002.png", "step-000004.png"]
    out = tmp_path / "grid.png"
    made = CliRunner().invoke(cli, ["sample", str(whole), "--out", str(out)])
    assert made.exit_code == 0, made.output
    assert out.read_bytes() == pictures(whole)["step-000004.png"]
    checkpoint = store.load(whole / "checkpoint.h5")
    model = GAN(outputs=4, width=4)
    every = grid(model, checkpoint.params, checkpoint.buffers, range(4), 10, 0)
    assert every.shape == (4 * 32, 10 * 32, 3)
    some = ["sample", str(whole), "--classes", "3,0", "--out", str(out), "--force"]
    assert CliRunner().invoke(cli, some).exit_code == 0
    chosen = np.concatenate([every[96:], every[:32]])
    assert out.read_bytes() == png.encode(chosen)
    z = MODEL.noise(Random(0, "samples", 3), 10).astype(np.float32)
    labels = np.full(10, 3)
    shown, _ = model.generate(checkpoint.params, checkpoint.buffers, z, labels)
    last = np.round((shown[9] + 1) * 127.5).transpose(1, 2, 0)
    np.testing.assert_allclose(every[96:, -32:], last, atol=1)


def test_the_images_of_a_run_for_the_frechet_distance(whole: Path) -> None:
    """Any slice has the same images; classes take turns; they are what the generator makes."""
    made = made_images.of_run(whole, arrays.device("cpu")).first(9)
    images = made[0:9]
    assert (images.shape, images.dtype, len(made)) == ((9, 3, 32, 32), np.uint8, 9)
    np.testing.assert_allclose(np.concatenate([made[0:4], made[4:9]]), images, atol=1)
    checkpoint = store.load(whole / "checkpoint.h5")
    model = GAN(outputs=4, width=4)
    z = model.noise(Random(0, "images", 6), 1).astype(np.float32)
    shown, _ = model.generate(checkpoint.params, checkpoint.buffers, z, np.array([6 % 4]))
    np.testing.assert_allclose(images[6], np.round((shown[0] + 1) * 127.5), atol=1)
    with pytest.raises(Error, match="real images are those of a data set or in a folder"):
        made_images.of_name(str(whole))


def test_sample_refuses(whole: Path, tmp_path: Path) -> None:
    train(Config(data="digits", epochs=0), tmp_path / "mlp")
    for words, message in (
        ([str(whole), "--classes", "4"], "the classes are 0 to 3; got 4"),
        ([str(whole), "--classes", "a"], "'a' is not a list of classes, such as 0,3"),
        ([str(tmp_path / "mlp")], "mlp makes no images; give a run of a model like gan"),
        ([str(tmp_path / "nothing")], "nothing"),
    ):
        found = CliRunner().invoke(cli, ["sample", *words, "--out", str(tmp_path / "a.png")])
        assert found.exit_code == 2, found.output
        assert message in found.output
    assert not (tmp_path / "a.png").exists()


def test_a_command_for_one_loss_refuses_two_networks(images: Path) -> None:
    words = ["audit-gradients", "--model", "gan", "--width", "4", "--data", str(images)]
    found = CliRunner().invoke(cli, [*words, "--batch-size", "2"])
    assert found.exit_code == 2
    assert "has two networks with a loss each" in found.output


# --- data ------------------------------------------------------------------------------------


def test_flips_depend_on_the_word_alone(images: Path) -> None:
    x = data.load(images, standardise="symmetric").x.reshape(-1, 3, 32, 32)
    from npdrt.data.augment import flip

    keys = np.array([0, 1 << 63, (1 << 63) - 1, 2**64 - 1], np.uint64)
    found = flip(x[:4], keys)
    for row, mirrored in enumerate((False, True, False, True)):
        expected = x[row, :, :, ::-1] if mirrored else x[row]
        np.testing.assert_array_equal(found[row], expected)
