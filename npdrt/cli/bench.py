"""`npdrt bench`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from npdrt import arrays, optim
from npdrt.cli.common import Name, answer, json_option, notice, on_terminal, table
from npdrt.cli.doctor import described, graph_in_words, versions
from npdrt.plain import counted
from npdrt.train import bench, bench_gpu
from npdrt.train.bench import QUICK, Case

DEFAULTS = Case()
_RULE = Name(list(optim.RULES))
_POSITIVE = click.IntRange(min=1)


@click.command("bench")
@click.option("--model", type=Name(["mlp"]), help=f"[default: {DEFAULTS.model}]")
@click.option("--depth", type=_POSITIVE, help=f"Weight matrices L.  [default: {DEFAULTS.depth}]")
@click.option("--width", type=_POSITIVE, help=f"Inputs and units.  [default: {DEFAULTS.width}]")
@click.option("--batch-size", type=_POSITIVE, help=f"[default: {DEFAULTS.batch_size}]")
@click.option(
    "--optimizer",
    "--optimiser",
    type=_RULE,
    help=f"{_RULE.listed} [default: {DEFAULTS.optimizer}]",
)
@click.option("--steps", type=_POSITIVE, help=f"Timed steps.  [default: {DEFAULTS.steps}]")
@click.option(
    "--dtype", type=Name(["float32", "float64"]), help=f"Of the step.  [default: {DEFAULTS.dtype}]"
)
@click.option(
    "--fast/--no-fast", default=None, help="Compiled loops too.  [default: if numba is installed]"
)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.  [default: auto]")
@click.option("--quick", is_flag=True, help="A small model and rough limits, in a few seconds.")
@json_option
def command(quick: bool, device: str, as_json: bool, **given: Any) -> None:
    """The speed of this machine's CPU or GPU, and of a training step on it.

    On a CPU, the limits are the GFLOP/s of float32 matrix products of the step's shapes (SGEMM)
    and the GB/s of memory (triad), whatever --dtype is. The step is forward, backward and update on
    random data, made eagerly, replayed from its program, and replayed with compiled loops; times
    are medians. Its GFLOP/s count its matrix products only. Its floor is the time of these products
    at the SGEMM rate plus the time of the bytes that its update must move at the triad's rate.

    \b
    --json prints one object:
      cpu, blas             the processor; BLAS libraries with kernels, threads
      case                  the options, and the number of parameters
      limits                sgemm, products (by name): GFLOP/s; triad: GB/s;
                            triad_threads
      step                  calls, gflop, update_gb, floor_ms: of one step
      ways                  eager, replay, fast (if measured), each with ms,
                            gflops, share_of_sgemm, share_of_floor
      record_ms             time to record and plan the step
      call_overhead_us      microseconds of a replayed call beyond NumPy's
      memory_mb             10^6 bytes of the program: weights, state, scratch

    On a GPU, the limits are the GFLOP/s of these products by cuBLAS, without TF32, in one CUDA
    graph, and the GB/s of x + y over large arrays. --json then prints

    \b
      gpu, software         the device; versions of CuPy, driver, runtime, cuBLAS,
                            NVRTC
      limits                sgemm, products (by name): GFLOP/s; add: GB/s
      step                  also graph, graph_error, nodes: whether the step is
                            one CUDA graph, why not, its nodes if that is known
      host_ms               time for the host to ask for a replayed step

    in place of cpu, blas, call_overhead_us.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    case, where = dataclasses.replace(QUICK if quick else DEFAULTS, **chosen), arrays.device(device)
    if where.kind == "cpu":
        found = bench.measure(case, _tell)
        answer(as_json, found, lambda: _text(found))
        return
    if case.fast:
        raise click.UsageError("--fast is for the CPU; on a GPU loops are compiled anyway.")
    found = bench_gpu.measure(case, where, _tell)
    answer(as_json, found, lambda: _gpu_text(found))


def _tell(text: str) -> None:
    """Progress, on a terminal."""
    if on_terminal():
        notice(f"measuring: {text}")


def _text(found: dict[str, Any]) -> str:
    """The report for a person."""
    case, limits = found["case"], found["limits"]
    blas = ", ".join(
        f"{b['library']} {b['version']} ({b['kernel']}, {counted(b['threads'], 'thread')})"
        for b in found["blas"]
    )
    rows = [
        ("cpu", f"{found['cpu']}; {blas}"),
        ("SGEMM", f"{limits['sgemm']:.0f} GFLOP/s at the step's shapes"),
        *(("", f"{rate:.0f} {name}") for name, rate in limits["products"].items()),
        ("triad", f"{limits['triad']:.1f} GB/s on {counted(limits['triad_threads'], 'thread')}"),
        *_step_rows(case, found),
        ("call", f"{found['call_overhead_us']:.2f} us beyond the bare NumPy call"),
        ("memory", f"{found['memory_mb']:.1f} MB of the program"),
    ]
    return f"{table(rows)}\n\n{_ways(found)}"


def _gpu_text(found: dict[str, Any]) -> str:
    """The report of a GPU for a person."""
    limits, step = found["limits"], found["step"]
    rows = [
        ("gpu", described(found["gpu"])),
        ("", versions(found["software"])),
        ("SGEMM", f"{limits['sgemm']:.0f} GFLOP/s at the step's shapes, by cuBLAS without TF32"),
        *(("", f"{rate:.0f} {name}") for name, rate in list(limits["products"].items())[1:]),
        ("add", f"{limits['add']:.0f} GB/s"),
        *_step_rows(found["case"], found),
        ("graph", graph_in_words(step)),
        ("host", f"{found['host_ms']:.3g} ms to ask for a replayed step"),
        ("memory", f"{found['memory_mb']:.1f} MB of the program"),
    ]
    return f"{table(rows)}\n\n{_ways(found)}"


def _step_rows(case: dict[str, Any], found: dict[str, Any]) -> list[tuple[str, str]]:
    """What the step is, and its floor."""
    sizes = f"depth {case['depth']}, width {case['width']}, batch {case['batch_size']}"
    step = found["step"]
    return [
        ("step", f"{case['model']}, {sizes}, {case['optimizer']}, {case['dtype']}"),
        ("", f"{case['parameters']:,} parameters, {step['calls']} calls"),
        ("", f"{step['gflop']:.3g} GFLOP of products, {step['update_gb']:.3g} GB of the update"),
        ("floor", f"{step['floor_ms']:.3g} ms at these limits"),
        ("record", f"{found['record_ms']:.3g} ms to record and plan the step"),
    ]


def _ways(found: dict[str, Any]) -> str:
    """The ways to run the step, as a table."""
    ways = [("", "ms a step", "GFLOP/s", "of SGEMM", "floor / time")]
    for name, way in found["ways"].items():
        shares = (f"{100 * way[key]:.0f} %" for key in ("share_of_sgemm", "share_of_floor"))
        ways.append((name, f"{way['ms']:.2f}", f"{way['gflops']:.1f}", *shares))
    return table(ways)
