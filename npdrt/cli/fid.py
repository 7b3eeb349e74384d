"""`npdrt fid`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from npdrt import arrays, frechet
from npdrt.cli.common import (
    answer,
    bars,
    code_option,
    data_dir_option,
    json_option,
    quiet_option,
    table,
    warn,
)
from npdrt.frechet import images
from npdrt.frechet.compare import Report, compare
from npdrt.frechet.networks import BATCH


@click.command("fid")
@click.argument("folder", metavar="RUN|FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "real",
    default="cifar-10",
    metavar="NAME|FOLDER",
    help="The real images.  [default: cifar-10]",
)
@click.option(
    "--part",
    type=click.Choice(images.PARTS),
    default="train",
    help="Which set of the data.  [default: train]",
)
@click.option(
    "--count",
    type=click.IntRange(min=2),
    help="Only the first so many of both.  [default: all; 10000 of a run]",
)
@click.option(
    "--features",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Weights of a network.  [default: EfficientNet-Lite0's]",
)
@click.option(
    "--stretch",
    is_flag=True,
    help="Stretch every image to its own minimum and maximum, as the authors of Fromage did.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=BATCH,
    help=f"Images at a time.  [default: {BATCH}]",
)
@click.option("--device", default="cpu", help="cpu, cuda or cuda:N.  [default: cpu]")
@data_dir_option
@quiet_option
@json_option
@code_option
def command(
    folder: Path, real: str, part: str, count: int | None, features: Path | None, stretch: bool,
    batch: int, device: str, data_dir: Path | None, quiet: bool, as_json: bool,
    code: tuple[Path, ...],
) -> None:  # fmt: skip
    """How far images are from real ones: the Frechet distance of the features that a network makes
    of both. The images are in FOLDER (PNG, JPEG or npz; or one .npz file), or the generator in the
    directory, checkpoint or snapshot RUN makes them, of all classes in turn.

    Only with the published weights of 2015 (--features pt_inception-2015-12-05-6726825d.pth) it is
    the FID. By default the features are those of EfficientNet-Lite0 (extra fid), offline, and the
    distance has that name. Two distances can be compared if they have the same name, numbers of
    images and stretch: docs/frechet.md.
    """
    where = arrays.device(device)
    fakes = images.of_run(folder, where, code) if images.is_run(folder) else images.of_path(folder)
    fakes = fakes.first(count)
    reals = images.of_name(real, part, data_dir).first(count)
    for note in reals.notes:
        warn(note)
    network = frechet.load(features, where=device)
    with arrays.on(where), bars(quiet=quiet) as shown:
        found = compare(
            *(network, fakes, reals),
            stretch=stretch,
            batch=batch,
            progress=shown.progress,
            warn=warn,
        )
    answer(as_json, asdict(found), lambda: _text(found))


def _text(found: Report) -> str:
    rows = [
        (found.name, f"{found.distance:.6g}"),
        ("made", f"{found.made}, {found.made_images:,} images"),
        ("real", f"{found.real}, {found.real_images:,} images"),
        ("features", f"{found.width} of {found.features} (weights {found.weights[:12]})"),
        ("stretch", "each image, as the authors of Fromage did" if found.stretch else "none"),
    ]
    return "\n".join([table(rows), *(f"note: {note}" for note in found.notes)])
