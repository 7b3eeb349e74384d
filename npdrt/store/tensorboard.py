"""The history of a run as a file that TensorBoard reads (extra `tensorboard`)."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.errors import Unavailable
from npdrt.store.log import Record


def _library() -> tuple[Any, Any]:
    """What tensorboardX has for one file: the messages, and the writer of records."""
    try:
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter
    except ImportError as error:
        raise Unavailable(
            'tensorboardX is not installed; install it with pip install "npdrt[tensorboard]"'
        ) from error
    return event_pb2, RecordWriter


def event_file(
    records: Sequence[Record], arrays: Mapping[str, Any], meta: Mapping[str, Any]
) -> bytes:
    """An event file of the records of a log and the tables of a trace (`npdrt.store.trace`).

    The tags are the names of the tables' columns, as history/test_loss and
    layers/relative_update/layers/00/weight, and step/loss, step/accuracy of logged minibatches.
    Numbers that are missing or not finite are left out. The wall time is that of training, in
    seconds, as far as the epochs say it.
    """
    event, writer = _library()
    epochs = [r for r in records if r["event"] == "epoch"]
    steps, seconds = ([r[name] for r in epochs] for name in ("step", "seconds"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events"
        out = writer(str(file))
        out.write(event.Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
        for step, values in _by_step([*_logged(records), *_columns(arrays, meta)]):
            made = event.Event(step=step, wall_time=_at(step, steps, seconds))
            for tag, value in values.items():
                made.summary.value.add(tag=tag, simple_value=value)
            out.write(made.SerializeToString())
        out.close()
        return file.read_bytes()


Point = tuple[int, str, float]  # step, tag, value


def _logged(records: Sequence[Record]) -> Iterator[Point]:
    """The minibatches of `--log-every`."""
    for record in (r for r in records if r["event"] == "step"):
        for name in record.keys() - {"event", "step"}:
            if record[name] is not None:
                yield record["step"], f"step/{name}", record[name]


def _columns(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> Iterator[Point]:
    """Every column of every table."""
    names = {"layers": meta["parameters"], "conditioning": meta.get("weights")}
    names["network"] = meta.get("networks")
    for table, values in arrays.items():
        group = table.partition("/")[0]
        if table == f"{group}/step":
            continue
        steps = arrays[f"{'layers' if group == 'network' else group}/step"].tolist()
        tags = [f"{table}/{name}" for name in names.get(group) or []] or [table]
        for tag, column in zip(tags, values.reshape(len(steps), -1).T, strict=True):
            yield from ((int(step), tag, v) for step, v in zip(steps, column.tolist(), strict=True))


def _by_step(points: Sequence[Point]) -> Iterator[tuple[int, dict[str, float]]]:
    found: dict[int, dict[str, float]] = {}
    for step, tag, value in points:
        if math.isfinite(value):
            found.setdefault(step, {})[tag] = value
    return iter(sorted(found.items()))


def _at(step: int, steps: Sequence[int], seconds: Sequence[float]) -> float:
    """The seconds at a step, between those of the epochs."""
    return float(np.interp(step, [0, *steps], [0.0, *seconds])) if steps else 0.0
