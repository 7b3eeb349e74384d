"""Images a second from a folder of JPEG files, next to torchvision's DataLoader, as a table.

The files are made up: 512 images with ImageNet's usual sizes, 94 KB each on average. Both readers
make batches of 128 images of 224x224 as floats: for training a random part, mirrored, with changed
colours; for evaluation the middle. They take turns. Images a second, and the processor time of the
reader with its processes, are from the first batch to the last, so that the start does not count.

--torchvision PYTHON: the interpreter of an environment with torch and torchvision. --parts: the
time of each part of an image instead, in this process, and of other decoders (simplejpeg if it is
there).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import report

FILES, CLASSES, BATCH, SIZE = 512, 4, 128, 224
SIZES = [(500, 375)] * 11 + [(375, 500)] * 4 + [(500, 333)] * 3 + [(320, 240), (1600, 1200)]
BATCHES = 7  # of a run
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
WAYS = (("training", 1), ("training", 2), ("evaluation", 2))  # with so many processes


def make(folder: Path) -> None:
    """Smooth colours with a texture, of a quality that gives ImageNet's sizes of files."""
    from PIL import Image

    rng = np.random.default_rng(0)

    def field(width: int, height: int) -> Any:
        raw = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(raw).resize(size, Image.Resampling.BICUBIC)

    for number in range(FILES):
        size = SIZES[number % len(SIZES)]
        image = Image.blend(field(16, 12), field(size[0] // 3, size[1] // 3), 0.4)
        place = folder / "train" / f"n{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:04d}.JPEG", quality=90)


# --- the readers, each in a process of its own ---------------------------------------------------


def npdrt_batches(folder: Path, way: str, processes: int, batches: int) -> Iterator[Any]:
    """Batches as a run of npdrt is given them."""
    from npdrt.data import Ahead, Decoders, load
    from npdrt.data.augment import words

    dataset = load(f"folder-{SIZE}:{folder}")
    sampler = dataset.sampler(BATCH, seed=0)
    with Decoders(processes) as decoders:
        images = dataset.images("imagenet-jitter").decoded_by(decoders)
        augment = "imagenet-jitter" if way == "training" else "none"

        def batch(step: int) -> Any:
            indices = sampler.batch(step)
            keys = words(0, step // sampler.batches_per_epoch, FILES, indices)
            return images.batch(indices, augment, keys), dataset.y[indices]

        with Ahead(batch, batches) as ahead:
            yield from map(ahead, range(batches))


def torchvision_batches(folder: Path, way: str, processes: int, batches: int) -> Iterator[Any]:
    """Batches of torchvision's ImageFolder and PyTorch's DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    training = [
        transforms.RandomResizedCrop(SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.2),
    ]
    evaluation = [transforms.Resize(256), transforms.CenterCrop(SIZE)]
    made = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    chosen = transforms.Compose([*(training if way == "training" else evaluation), *made])
    order = np.resize(np.random.default_rng(0).permutation(FILES), BATCH * batches).tolist()
    dataset = datasets.ImageFolder(str(folder / "train"), chosen)
    yield from DataLoader(dataset, BATCH, sampler=order, num_workers=processes)


def read(reader: str, folder: str, way: str, processes: str) -> None:
    """Print the images a second after the first batch, and the processor time of an image, ms."""
    made = {"npdrt": npdrt_batches, "torchvision": torchvision_batches}[reader]
    found = made(Path(folder), way, int(processes), BATCHES)
    assert tuple(next(found)[0].shape) == (BATCH, 3, SIZE, SIZE)
    before = cpu_seconds()
    start = time.perf_counter()
    for batch in found:
        last, used = batch, cpu_seconds()
    seconds = time.perf_counter() - start
    assert len(last[0]) == BATCH
    images = BATCH * (BATCHES - 1)
    print(json.dumps([images / seconds, 1e3 * (used - before) / images]))


def cpu_seconds() -> float:
    """The processor time of this process and of its children, so far."""
    total = 0
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = place.read_text().rpartition(")")[2].split()
            if os.getpid() in (int(place.parent.name), int(fields[1])):
                total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def versions(python: str, names: Sequence[str]) -> str:
    """Packages of an interpreter with their versions."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    found = subprocess.check_output([python, "-c", code, *names], text=True).split()
    return ", ".join(map(" ".join, zip(names, found, strict=True)))


# --- the comparison ------------------------------------------------------------------------------


def measure(pythons: dict[str, str], folder: Path, turns: int) -> list[dict[str, Any]]:
    """A row for each of WAYS: per reader, images a second and CPU ms an image, in every turn."""
    rows = []
    for way, processes in WAYS:
        found: dict[str, Any] = {reader: {"rate": [], "cpu": []} for reader in pythons}
        for _ in range(turns):
            for reader, python in pythons.items():
                words = [python, "-W", "ignore", __file__, "--read", reader, str(folder), way]
                rate, cpu = json.loads(subprocess.check_output([*words, str(processes)]))
                found[reader]["rate"].append(rate)
                found[reader]["cpu"].append(cpu)
        rows.append({"way": way, "processes": processes, **found})
    return rows


def line(row: dict[str, Any]) -> list[str]:
    """A line of the table; the ratio is the median of those of the turns."""
    readers = [row[name] for name in ("npdrt", "torchvision") if name in row]
    cells = [row["way"], str(row["processes"])]
    for measured, form in (("rate", "{:.0f}"), ("cpu", "{:.2f}")):
        cells += [form.format(statistics.median(found[measured])) for found in readers]
        if len(readers) > 1:
            ours, theirs = (found[measured] for found in readers)
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
    return cells


def compared(pythons: dict[str, str], turns: int) -> tuple[str, Any]:
    """The table and the numbers of a comparison."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        rows = measure(pythons, Path(folder), turns)
    used = {"npdrt": ("numpy", "pillow"), "torchvision": ("torch", "torchvision", "pillow")}
    about = "; ".join(f"{name}: {versions(python, used[name])}" for name, python in pythons.items())
    head = ["", "processes"]
    for what in ("images/s", "CPU ms an image"):
        head += [f"{reader}, {what}" for reader in pythons]
        head += ["ratio"] * (len(pythons) > 1)
    return f"{about}\n\n{report.table(head, map(line, rows))}", rows


# --- the parts of an image -----------------------------------------------------------------------


def parts(turns: int) -> tuple[str, Any]:
    """The table and the numbers of the CPU time of each part of an image."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        paths = [str(path) for path in sorted(Path(folder).rglob("*.JPEG"))]
        found: dict[str, list[float]] = {}
        for _ in range(turns):
            for name, function in ways_to_decode().items():
                start = time.process_time()
                for key, path in enumerate(paths):
                    function(path, key)
                found.setdefault(name, []).append(1e3 * (time.process_time() - start) / len(paths))
    rows = [[name, f"{statistics.median(times):.2f}"] for name, times in found.items()]
    return report.table(["of one image", "CPU ms"], rows), found


def ways_to_decode() -> dict[str, Callable[[str, int], Any]]:
    """What is timed of an image, by name; each begins with the file."""
    from PIL import Image

    from npdrt.data import decode
    from npdrt.data.augment import random_resized_crop

    def draft(path: str, key: int) -> Any:
        with Image.open(path) as image:
            (left, top, right, bottom), _ = random_resized_crop(key, *image.size)
            smaller = max(1, min(right - left, bottom - top) // SIZE)
            image.draft("RGB", tuple(side // smaller for side in image.size))
            return decode.cut(image, SIZE, key)

    found: dict[str, Callable[[str, int], Any]] = {
        "read the file": lambda path, key: Path(path).read_bytes(),
        "decode it": lambda path, key: decode.decode(path),
        "decode it, random part": lambda path, key: decode.pixels(
            decode.Picture(path, SIZE, key)
        ).copy(),
        "the same with draft": draft,
        "decode it, random part, colours": lambda path, key: decode.pixels(
            decode.Picture(path, SIZE, key, True)
        ).copy(),
    }
    with suppress(ImportError):
        import simplejpeg

        found["decode it with simplejpeg"] = lambda path, key: simplejpeg.decode_jpeg(
            Path(path).read_bytes()
        )

        def simple(path: str, key: int) -> Any:
            image = Image.fromarray(simplejpeg.decode_jpeg(Path(path).read_bytes()))
            return decode.jittered(decode.cut(image, SIZE, key), key)

        found["simplejpeg, random part, colours"] = simple
    return found


def main(words: list[str] | None = None) -> None:
    """Print a table."""
    given = sys.argv[1:] if words is None else words
    if given[:1] == ["--read"]:
        read(*given[1:])
        return
    options = report.parser(__doc__)
    options.add_argument("--torchvision", metavar="PYTHON")
    options.add_argument("--parts", action="store_true")
    options.add_argument("--turns", type=int, default=3)
    chosen = options.parse_args(given)
    pythons = {"npdrt": sys.executable}
    pythons |= {"torchvision": chosen.torchvision} if chosen.torchvision else {}
    text, results = parts(chosen.turns) if chosen.parts else compared(pythons, chosen.turns)
    import step

    report.publish(text, step.machine(), results, chosen.output)


if __name__ == "__main__":
    main()
