"""ImageNet: colours, sets with names, the made-up folder, processes that decode, and that runs on
them are the same with any number of processes and ranks, killed or not."""

from __future__ import annotations

import colorsys
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from npdrt import arrays, data, store
from npdrt.cli import cli
from npdrt.data import Decoders, augment, decode, folder, sample_images
from npdrt.data.decode import Picture
from npdrt.errors import DiskError, Error, FileRefused, Unavailable
from npdrt.models import ResNet50
from npdrt.random import Random
from npdrt.store import log
from npdrt.train import Config, resume, train
from npdrt.train.config import build_model, resolve
from npdrt.train.feed import Feed
from npdrt.train.shards import Alone, share
from npdrt.train.studies import recipe

PIL = pytest.importorskip("PIL.Image", reason="needs Pillow")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets with the made-up one."""
    place = tmp_path_factory.mktemp("sets")
    assert data.fetch("sample-imagenet", place) == place / "sample-imagenet"
    return place


@pytest.fixture(scope="module")
def paths(sets: Path) -> list[str]:
    return list(data.load("sample-imagenet-16", data_dir=sets).x.paths)


@pytest.fixture(autouse=True)
def _no_data_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NPDRT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- colours ---------------------------------------------------------------------------------


def test_amounts_and_orders_are_spread_as_documented() -> None:
    drawn = [augment.color_jitter(key) for key in Random(1, "test/keys").words(4000).tolist()]
    orders = Counter(tuple(name for name, _ in changes) for changes in drawn)
    assert len(orders) == 24
    assert max(orders.values()) < 167 + 5 * 13  # 4000 / 24, and five deviations
    amounts = {name: np.array([dict(changes)[name] for changes in drawn]) for name in orders_of(4)}
    for name, (low, high) in {
        "brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4),
        "hue": (-0.2, 0.2),
    }.items():  # fmt: skip
        found = amounts[name]
        assert low <= found.min() < low + 0.01
        assert high - 0.01 < found.max() <= high
        assert found.mean() == pytest.approx((low + high) / 2, abs=0.03)
        assert found.std() == pytest.approx((high - low) / 12**0.5, rel=0.05)
    assert abs(np.corrcoef([*amounts.values()])[np.triu_indices(4, 1)]).max() < 0.08
    assert augment.color_jitter(5) == augment.color_jitter(5) != augment.color_jitter(6)


def orders_of(n: int) -> list[str]:
    return list(augment.JITTER)[:n]


def noise(size: tuple[int, int] = (37, 23)) -> np.ndarray:
    """An image of all colours, some grey, black or white; bytes (height, width, 3)."""
    width, height = size
    x = Random(2, "test/noise").words(height * width).view(np.uint8)[: 3 * height * width].copy()
    x = x.reshape(height, width, 3)
    x[0, :8] = x[0, :8, :1]
    x[1, 0], x[1, 1] = 0, 255
    return x


def grey(x: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 luma, rounded, from integers."""
    weights = np.array([19595, 38470, 7471])
    return (x.astype(np.int64) @ weights + 32768) >> 16


def blend(other: Any, x: np.ndarray, factor: float) -> np.ndarray:
    exact = other + np.float32(factor) * (x.astype(np.float32) - other)
    return np.clip(exact, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("factor", [0.6, 0.83, 1.0, 1.27, 1.4])
def test_brightness_contrast_saturation(factor: float) -> None:
    x = noise()
    means = {
        "brightness": 0,
        "contrast": int(grey(x).mean() + 0.5),
        "saturation": grey(x)[..., None],
    }
    for name, other in means.items():
        found = np.asarray(decode.CHANGES[name](PIL.fromarray(x), factor)).astype(int)
        wrong = np.abs(found - blend(np.asarray(other, np.float32), x, factor).astype(int))
        assert wrong.max() <= 1, name  # a compiler may round once instead of twice
        assert (wrong > 0).mean() < 0.01, name


@pytest.mark.parametrize("turns", [-0.2, -0.11, 0.0, 0.07, 0.2])
def test_hue(turns: float) -> None:
    """By colorsys, in bytes: the hue turns by whole 255ths. One of them, which Pillow's floats may
    miss, is at most 6 steps of a colour."""
    x, wrong = noise((24, 16)), []
    found = np.asarray(decode.hue(PIL.fromarray(x), turns)).astype(int)
    for place in np.ndindex(x.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(x[place] / 255.0))
        h, s = int(h * 255), int(s * 255)
        turned = colorsys.hsv_to_rgb((h + int(turns * 255)) % 256 / 255, s / 255, v)
        wrong.append(np.abs(found[place] - np.array(turned) * 255).max())
    assert max(wrong) < 6.5
    assert np.mean(wrong) < 1


def test_jitter_is_its_changes_in_order() -> None:
    key, x = 12345, noise()
    image = PIL.fromarray(x)
    for name, amount in augment.color_jitter(key):
        image = decode.CHANGES[name](image, amount)
    found = np.asarray(decode.jittered(PIL.fromarray(x), key))
    np.testing.assert_array_equal(found, np.asarray(image))
    assert not np.array_equal(found, x)


def test_everything_is_torchvisions(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte: crops, resizing, each change of colour, and the middle."""
    transforms = pytest.importorskip("torchvision.transforms")
    function = transforms.functional
    changes = {
        "brightness": function.adjust_brightness, "contrast": function.adjust_contrast,
        "saturation": function.adjust_saturation, "hue": function.adjust_hue,
    }  # fmt: skip
    for number, path in enumerate(paths[:40]):
        key = 77 * number + 5
        image = PIL.open(path).convert("RGB")
        (left, top, right, bottom), flip = augment.random_resized_crop(key, *image.size)
        box = top, left, bottom - top, right - left
        theirs = function.resized_crop(image, *box, [48, 48])
        theirs = function.hflip(theirs) if flip else theirs
        for name, amount in augment.color_jitter(key):
            theirs = changes[name](theirs, amount)
        ours = decode.pixels(Picture(path, 48, key, True)).transpose(1, 2, 0)
        np.testing.assert_array_equal(ours, np.asarray(theirs))
        middle = function.center_crop(function.resize(image, 64), [56, 56])
        ours = decode.pixels(Picture(path, 56)).transpose(1, 2, 0)
        np.testing.assert_array_equal(ours, np.asarray(middle))


def test_colours_change_after_the_crop(sets: Path) -> None:
    """By the same word as the crop; other augmentations leave them alone."""
    found = data.load("sample-imagenet-32", data_dir=sets, standardise=False)
    rows, keys = np.arange(5), Random(9, "test/keys").words(5)
    plain = found.x.batch(rows, "imagenet", keys)
    jittered = found.x.batch(rows, "imagenet-jitter", keys)
    for image, colours, key in zip(plain, jittered, keys.tolist(), strict=True):
        cropped = PIL.fromarray(image.astype(np.uint8).transpose(1, 2, 0))
        expected = np.asarray(decode.jittered(cropped, key)).transpose(2, 0, 1)
        np.testing.assert_array_equal(colours, expected)
    with pytest.raises(Error, match="augment imagenet-jitter needs a folder of images"):
        data.load("digits").images("imagenet-jitter")


# --- sets with names ---------------------------------------------------------------------------


def test_val_is_split_by_even_and_odd_numbers(sets: Path) -> None:
    found = data.load("sample-imagenet-16", data_dir=sets)
    assert (found.classes, found.image_shape) == (1000, (3, 16, 16))
    assert [len(x) for x in (found.x, found.x_valid, found.x_test)] == [2000, 1000, 1000]
    plain = data.load(f"folder-16:{sets / 'sample-imagenet'}")
    assert plain.x_valid is None
    assert found.x_valid.paths == plain.x_test.paths[::2]
    assert found.x_test.paths == plain.x_test.paths[1::2]
    assert found.y_valid.tolist() == found.y_test.tolist() == list(range(1000))
    assert found.digests == plain.digests
    np.testing.assert_array_equal(found.x_test[:3], plain.x_test[1:7:2])
    assert data.load("sample-imagenet", data_dir=sets).x.shape == (2000, 3, 224, 224)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imagenet", ("imagenet", 224, None)),
        ("imagenette-64", ("imagenette", 64, None)),
        ("folder:a/b", ("", 224, Path("a/b"))),
        ("folder-32:imagenet", ("", 32, Path("imagenet"))),
    ],
)
def test_names(name: str, expected: tuple[Any, ...]) -> None:
    assert folder.named(name)
    assert tuple(folder.parse(name)) == expected


@pytest.mark.parametrize("name", ["imagenet-0", "imagenet:x", "imagenet-", "folder", "imagenets"])
def test_other_names_are_no_folder(name: str) -> None:
    assert not folder.named(name)
    with pytest.raises(Error, match="unknown data set"):
        data.load(name)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("imagenet-64", r"Put ILSVRC 2012 there, as train/<class>/\*.JPEG and val/<class>"),
        ("imagenette", "Unpack imagenette2.tgz"),
        ("sample-imagenet", "npdrt data fetch sample-imagenet"),
    ],
)
def test_a_set_that_is_not_here_says_how_to_lay_it_out(name: str, cure: str) -> None:
    for load in (data.load, data.verify):
        with pytest.raises(Unavailable, match=f"is not on this machine; looked in .*{cure}"):
            load(name)
    if not name.startswith("sample"):
        with pytest.raises(Unavailable, match=cure):
            data.fetch(name.partition("-")[0])


def small_set(place: Path, classes: int = 10) -> Path:
    """An imagenette: one image a class, two to validate."""
    for part, count in (("train", 1), ("val", 2)):
        for label in range(classes):
            inside = place / "imagenette" / part / f"n{label:02d}"
            inside.mkdir(parents=True)
            for number in range(count):
                PIL.fromarray(noise()).save(inside / f"{number}.JPEG")
    return place / "imagenette"


def lose_a_class(root: Path) -> None:
    shutil.rmtree(root / "train" / "n03")


def lose_a_class_of_val(root: Path) -> None:
    shutil.rmtree(root / "val" / "n03")


def lose_val(root: Path) -> None:
    shutil.rmtree(root / "val")


def rename_a_class(root: Path) -> None:
    (root / "val" / "n03").rename(root / "val" / "n3")


def flatten_val(root: Path) -> None:
    """As the archive of ImageNet unpacks."""
    for number, path in enumerate(list((root / "val").rglob("*.JPEG"))):
        path.rename(root / "val" / f"{number}.JPEG")
    for inside in [path for path in (root / "val").iterdir() if path.is_dir()]:
        inside.rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_class, "val/n03: expected a class of train; it has no such folder"),
        (lose_a_class_of_val, "val: expected a folder for each class of train; missing: n03"),
        (lose_val, "imagenette: expected a folder val next to train; found none"),
        (rename_a_class, "val/n3: expected a class of train; it has no such folder"),
        (flatten_val, "found none; move its 20 images into a folder for each class"),
    ],
)
def test_a_set_that_is_not_whole_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    root = small_set(tmp_path)
    assert data.load("imagenette-16", data_dir=tmp_path).x.shape == (10, 3, 16, 16)
    damage(root)
    with pytest.raises(FileRefused, match=message):
        data.load("imagenette-16", data_dir=tmp_path)


def test_half_an_unpacking_is_refused(tmp_path: Path) -> None:
    small_set(tmp_path, classes=9)
    message = (
        "train: expected the 10 class folders of imagenette; found 9; unpack the archive again"
    )
    with pytest.raises(FileRefused, match=message):
        data.load("imagenette", data_dir=tmp_path)
    done = CliRunner().invoke(cli, ["data", "verify", "imagenette", "--data-dir", str(tmp_path)])
    assert (done.exit_code, message in done.output) == (3, True)


def test_classes_are_numbered_as_their_names_are_sorted(tmp_path: Path) -> None:
    """By characters, as torchvision sorts: 10 comes before 2, and capitals before small letters."""
    for name in ("2", "10", "b", "A"):
        (tmp_path / "train" / name).mkdir(parents=True)
        PIL.fromarray(noise()).save(tmp_path / "train" / name / "x.png")
    found = data.load(f"folder-16:{tmp_path}")
    assert [Path(path).parent.name for path in found.x.paths] == ["10", "2", "A", "b"]
    assert found.y.tolist() == [0, 1, 2, 3]


# --- the made-up folder --------------------------------------------------------------------------


def test_the_made_up_folder_is_drawn_once_and_the_same(sets: Path, few: str) -> None:
    root, again = sets / "sample-imagenet", folder.parse(few).path
    assert again is not None
    assert len(list(root.rglob("*.JPEG"))) == 4000
    files = sorted(path.relative_to(again) for path in again.rglob("*.JPEG"))
    assert len(files) == 160
    assert all((again / path).read_bytes() == (root / path).read_bytes() for path in files)
    before = (root / files[0]).stat().st_mtime_ns
    assert data.fetch("sample-imagenet", sets) == root
    assert (root / files[0]).stat().st_mtime_ns == before
    assert [path.name for path in sets.iterdir()] == ["sample-imagenet"]


def test_the_made_up_folder_has_every_kind_of_file(paths: list[str]) -> None:
    kinds = Counter()
    for path in paths:
        with PIL.open(path) as image:
            kinds[image.format, image.mode] += 1
    assert kinds == {("JPEG", "RGB"): 1988, ("JPEG", "L"): 10, ("JPEG", "CMYK"): 1,
                     ("PNG", "RGB"): 1}  # fmt: skip


FULL_DISK = """
import resource, sys
from npdrt.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
sys.argv = ["npdrt", "data", "fetch", "sample-imagenet", "--data-dir", sys.argv[1]]
main()
"""


def test_a_full_disk_leaves_nothing_of_it(tmp_path: Path) -> None:
    words = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(words, text=True, stderr=subprocess.PIPE, env=environment(), check=False)
    assert done.returncode == DiskError.exit_code, done.stderr
    assert "cannot write the data set 'sample-imagenet'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_that_draw_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one wins, and the other finds its folder."""
    monkeypatch.setattr(sample_images, "CLASSES", 3)
    root = tmp_path / "sample-imagenet"
    sample_images.make(root)
    sample_images.make(root)
    assert len(list(root.rglob("*.JPEG"))) == 12


# --- processes that decode -----------------------------------------------------------------------


def pictures(paths: list[str], size: int = 24) -> list[Picture]:
    """With crops, colours and middles mixed, in an order of their own."""
    chosen = [Picture(path, size, [None, 3 * i][i % 2], i % 3 == 0) for i, path in enumerate(paths)]
    random.Random(0).shuffle(chosen)
    return chosen


@pytest.fixture(scope="module")
def pool() -> Iterator[Decoders]:
    with Decoders(2) as made:
        yield made


def test_any_number_of_processes_makes_the_same_pixels(pool: Decoders, paths: list[str]) -> None:
    asked = pictures(paths[:101])
    expected = decode.here(asked)
    assert expected.shape == (101, 3, 24, 24)
    np.testing.assert_array_equal(pool(asked), expected)
    np.testing.assert_array_equal(pool(asked[::-1]), expected[::-1])
    np.testing.assert_array_equal(pool(asked[:1]), expected[:1])
    assert pool([]).shape[0] == 0
    with Decoders(3) as three:
        np.testing.assert_array_equal(three(asked), expected)
        assert len(three._decoders) == 3
    np.testing.assert_array_equal(three(asked[:2]), expected[:2])  # in this process, after the end
    assert not three._decoders


def test_two_threads_ask_at_once(pool: Decoders, paths: list[str]) -> None:
    """An evaluation and the next batches."""
    asked = [pictures(paths[60 * i : 60 * i + 60]) for i in range(4)]
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: pool(asked[i])}))
               for i in range(4)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], decode.here(asked[i])) for i in range(4))


def bad(content: bytes, path: Path) -> Picture:
    path.write_bytes(content)
    return Picture(str(path), 24)


def test_a_file_that_is_not_whole_is_named(
    pool: Decoders, paths: list[str], tmp_path: Path
) -> None:
    """The first one in order; the processes go on."""
    content = Path(paths[0]).read_bytes()
    good = pictures(paths[:40])
    truncated = bad(content[: len(content) // 2], tmp_path / "truncated.JPEG")
    empty = bad(b"", tmp_path / "empty.JPEG")
    text = bad(b"<html>", tmp_path / "text.JPEG")
    for first, second, why in (
        (truncated, text, "truncated"), (empty, truncated, "cannot identify"),
        (text, Picture(str(tmp_path / "gone"), 24), "cannot identify"),
        (Picture(str(tmp_path / "gone"), 24), text, "does not exist"),
    ):  # fmt: skip
        for asked in ([*good[:9], first, *good[9:], second], [first, second], [*good, first]):
            with pytest.raises(FileRefused, match=f"^{first.path}:? .*{why}"):
                pool(asked)
        np.testing.assert_array_equal(pool(good), decode.here(good))


def test_grey_and_cmyk_files_become_rgb(pool: Decoders, tmp_path: Path) -> None:
    x = noise()
    asked, expected = [], []
    for mode in ("L", "CMYK"):
        path = tmp_path / f"{mode}.JPEG"
        PIL.fromarray(x).convert(mode).save(path, quality=95)
        asked.append(Picture(str(path), 24))
        expected.append(decode.middle(PIL.open(path).convert("RGB"), 24))
    found = pool(asked).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(found, np.stack([np.asarray(image) for image in expected]))
    assert (found[0] == found[0, ..., :1]).all()
    rgb = np.asarray(decode.middle(PIL.fromarray(x), 24)).astype(int)
    assert np.abs(found[1].astype(int) - rgb).mean() < 30  # not inverted


def processes(pool: Decoders) -> list[int]:
    return [decoder._worker.process.pid for decoder in pool._decoders]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_process_that_is_killed_is_an_error_and_no_wait(when: str, paths: list[str]) -> None:
    asked = pictures(paths[:64])
    with Decoders(2) as pool:
        pool(asked)
        first, second = processes(pool)
        if when == "before":
            os.kill(first, signal.SIGKILL)
        else:
            os.kill(first, signal.SIGSTOP)  # so that it has a request and does not answer
            threading.Timer(0.3, os.kill, (first, signal.SIGKILL)).start()
        with pytest.raises(Unavailable, match=r"ended \(killed by SIGKILL\) while it had .*JPEG"):
            pool(asked)
    assert not any(map(alive, (first, second)))


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


ORPHANS = """
import os, sys, time
from npdrt.data import Decoders
from npdrt.data.decode import Picture
with Decoders(2) as pool:
    pool([Picture(path, 16) for path in sys.argv[1:]])
    print(*[d._worker.process.pid for d in pool._decoders], flush=True)
    time.sleep(600)
"""


def test_processes_end_with_their_parent(paths: list[str]) -> None:
    words = [sys.executable, "-c", ORPHANS, *paths[:32]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment()) as parent:
        assert parent.stdout is not None
        found = [int(word) for word in parent.stdout.readline().split()]
        assert len(found) == 2
        assert all(map(alive, found))
        parent.kill()
    deadline = time.monotonic() + 60
    while any(map(running, found)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(process: int) -> bool:
    """Whether it is there and no zombie, which nobody here can wait for."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# --- runs ----------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "augment": "imagenet-jitter", "batch_size": 20, "epochs": 2, "label_smoothing": 0.1,
    "model_options": {"width": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a made-up set of 40 classes."""
    place = tmp_path_factory.mktemp("few") / "set"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sample_images, "CLASSES", 40)
        sample_images.make(place)
    return f"folder-16:{place}"


def bits(run: Path) -> tuple[Any, ...]:
    kept = store.load(run / "checkpoint.h5")
    arrays = {**kept.params, **kept.buffers, **kept.state}
    records = [{k: v for k, v in r.items() if k not in ("seconds", "config")} for r in log_of(run)]
    return {name: a.tobytes() for name, a in arrays.items()}, records


def test_a_run_is_the_same_with_any_number_of_processes(few: str, tmp_path: Path) -> None:
    """And may go on with another one."""
    for name, decoders in (("none", 0), ("two", 2)):
        train(Config(data=few, decoders=decoders, **SETTINGS), tmp_path / name)
    steps = iter(range(100))
    stop = {"stop": lambda: 15 * (next(steps) == 4)}
    train(Config(data=few, decoders=2, **SETTINGS), tmp_path / "part", **stop)
    resume(tmp_path / "part", decoders=1)
    assert bits(tmp_path / "part") == bits(tmp_path / "two") == bits(tmp_path / "none")


class Second(Alone):
    """Rank 1 of 2."""

    rank, size = 1, 2

    def mine(self, count: int) -> range:
        return share(1, 2, count)


def test_a_rank_makes_the_images_of_its_own_shards(few: str) -> None:
    config = Config(**{**SETTINGS, "data": few, "batch_size": 30, "shards": 5, "decoders": 0})
    dataset = data.load(few)
    config = resolve(config, dataset)
    ready = config, dataset, build_model(config, dataset), arrays.device("cpu")
    whole, own = Feed(*ready), Feed(*ready, Second())
    for step in (0, whole.epoch - 1):  # the last batch has 20 images: shards of 4
        x, y = whole.batch(step)
        mine, labels = own.batch(step)
        first = len(x) // 5 * 2
        np.testing.assert_array_equal(mine[first:], x[first:])
        assert not mine[:first].any()
        assert x[:first].any()
        np.testing.assert_array_equal(labels, y)
        np.testing.assert_array_equal(own.whole_batch(step)[0], x)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}


MPIEXEC = next(filter(None, map(shutil.which, ("mpiexec.hydra", "mpiexec"))), None)
RUN = ["--augment", "imagenet-jitter", "-q", "--width", "8", "--batch-size", "20", "--shards", "8",
       "--decoders", "1", "--label-smoothing", "0.1", "--clip", "5", "--checkpoint-every", "1",
       "--epochs"]  # fmt: skip


@pytest.fixture
def mpiexec() -> str:
    """The program that starts ranks; skipped without mpi4py."""
    pytest.importorskip("mpi4py")
    if MPIEXEC is None:
        pytest.skip("no mpiexec")
    return MPIEXEC


def test_killed_on_two_ranks_and_resumed(mpiexec: str, few: str, tmp_path: Path) -> None:
    killed_and_resumed(["--data", few, *RUN, "20"], tmp_path, mpiexec)


def killed_and_resumed(words: list[str], place: Path, mpiexec: str) -> None:
    """kill -9 of two ranks; one process goes on, to the bits of a run that was never killed."""
    command = [sys.executable, "-m", "npdrt", "train", *words, "--out"]
    subprocess.run([*command, str(place / "whole")], check=True, env=environment())
    part = place / "part"
    ranks = [mpiexec, "-n", "2", *command, str(part)]
    with subprocess.Popen(ranks, env=environment(), stderr=subprocess.DEVNULL) as process:
        while not (part / "checkpoint.prev.h5").exists():
            assert process.poll() is None
            time.sleep(0.005)
        for rank in ranks_in(part):
            os.kill(rank, signal.SIGKILL)
    assert process.returncode
    assert len(log_of(part)) < len(log_of(place / "whole"))
    subprocess.run([*command, str(part), "--resume"], check=True, env=environment())
    assert bits(part) == bits(place / "whole")


def log_of(run: Path) -> list[dict[str, Any]]:
    return list(log.read(run / "log.jsonl"))


@pytest.mark.soak
def test_the_recipe_on_two_ranks_killed_and_resumed(
    mpiexec: str, sets: Path, tmp_path: Path
) -> None:
    """ResNet-50 on 1,000 classes in 8 shards, as the recipe says at smoke scale, 4 epochs."""
    config = recipe.load("fromage/table-1-imagenet", "smoke").configs[0]
    words = ["--model", config.model, "--width", "2", "--init", "torchvision",
             "--data", config.data, "--augment", config.augment,
             "--batch-size", str(config.batch_size), "--shards", "8",
             "--label-smoothing", "0.1", "--clip", "5", "--lr", "0.01", "--schedule",
             "milestones:3:0.1", "--epochs", "4", "--trace-every", "0", "--checkpoint-every", "1",
             "--data-dir", str(sets), "-q"]  # fmt: skip
    killed_and_resumed(words, tmp_path, mpiexec)
    losses = [r["train_loss"] for r in log_of(tmp_path / "part") if r["event"] == "epoch"]
    assert losses == sorted(losses, reverse=True)


def ranks_in(run: Path) -> list[int]:
    """The ranks that train into a directory."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(run) in words and b"-n" not in words:
            found.append(int(place.name))
    return found


# --- ResNet-50's first weights -------------------------------------------------------------------


def test_first_weights_are_torchvisions() -> None:
    """Kernels: normal, of PyTorch's deviation for the fan-out; the last layer as by default."""
    torch = pytest.importorskip("torch")
    params = ResNet50(width=16, outputs=100, init="torchvision").init(seed=3, dtype="float64")
    for name, w in params.items():
        if w.ndim == 4:
            like = torch.empty(*w.shape)
            fan_out = torch.nn.init._calculate_correct_fan(like, "fan_out")
            expected = torch.nn.init.calculate_gain("relu") / fan_out**0.5
            assert w.std() == pytest.approx(expected, rel=5 / (2 * w.size) ** 0.5), name
            assert abs(w.mean()) < 5 * expected / w.size**0.5, name
    bound = 1 / params["linear/weight"].shape[1] ** 0.5
    for name in ("linear/weight", "linear/bias"):
        assert 0.95 * bound < np.abs(params[name]).max() <= bound
    plain = ResNet50(width=16, outputs=100).init(seed=3, dtype="float64")
    np.testing.assert_array_equal(params["linear/weight"], plain["linear/weight"])
    assert np.array_equal(params["norm/weight"], np.ones(16))
