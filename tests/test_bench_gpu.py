"""`npdrt doctor` and `npdrt bench` on a GPU, and benchmarks/gpu.py: what they report."""

from __future__ import annotations

import ctypes
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from test_bench import TINY_ANYWHERE, numbers
from test_program_gpu import gpu  # noqa: F401 - a fixture

from npdrt import arrays, cublas
from npdrt.cli import bench, cli, doctor
from npdrt.program import nodes
from npdrt.train import bench_gpu

SOFTWARE = {"cupy", "driver", "runtime", "cublas", "nvrtc"}


def call(*words: Any) -> Any:
    return CliRunner().invoke(cli, list(map(str, words)), prog_name="npdrt")


def test_nodes_are_those_that_the_driver_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def driver(status: int) -> Any:
        def ask(graph: Any, list_of_nodes: None, count: Any) -> int:
            assert graph.value == 77
            ctypes.cast(count, ctypes.POINTER(ctypes.c_size_t))[0] = 1 << 33
            return status

        return SimpleNamespace(cuGraphGetNodes=ask)

    graph = SimpleNamespace(graph=77)
    for found, expected in ((driver(0), 1 << 33), (driver(1), None), (None, None)):
        monkeypatch.setattr(nodes, "_driver", lambda found=found: found)
        assert nodes.count_nodes(graph) == expected


def test_advice_on_graphs() -> None:
    trial = {"graph": False, "graph_error": "RuntimeError: refused", "nodes": None}
    found = {"gpu": {"devices": [{}], **trial}, "blas": []}
    advice, _ = doctor.advice(found)
    assert "several times slower than a CUDA graph (RuntimeError: refused)" in advice
    words = doctor.graph_in_words(trial)
    assert words == "none, the step runs call by call: RuntimeError: refused"
    graph = {"graph": True, "graph_error": None, "nodes": 12}
    assert doctor.graph_in_words(graph) == "a step is one CUDA graph of 12 nodes"
    assert len(doctor.advice({"gpu": {"devices": [{}], **graph}, "blas": []})) == 1


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise arrays.Unavailable("no CUDA device")

    monkeypatch.setattr(arrays, "_import_cupy", missing)
    result = call("bench", "--device", "cuda")
    assert result.exit_code == 4
    assert "no CUDA device" in result.output
    assert doctor._gpu() == {"devices": [], "why": "no CUDA device"}


@pytest.mark.gpu
def test_gpu_reports(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(bench_gpu, "ROUNDS", 2)
    found = json.loads(call("doctor", "--json").stdout)["gpu"]
    assert (found["graph"], found["graph_error"]) == (True, None)
    assert set(found["software"]) == SOFTWARE
    assert found["software"]["cublas"] == cublas.version()
    words = ("bench", *TINY_ANYWHERE, "--device", "cuda", "--json")
    result = call(*words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    documented = call("bench", "--help").output.partition("On a GPU")[2]
    assert all(key in documented for key in ("gpu", "software", "host_ms", "graph_error", "nodes"))
    assert set(found) == {
        *("gpu", "software", "case", "limits", "step", "ways"),
        *("host_ms", "record_ms", "memory_mb"),
    }
    assert (found["step"]["graph"], found["step"]["graph_error"]) == (True, None)
    assert set(found["ways"]) == {"eager", "replay"}
    measured = {name: found[name] for name in ("limits", "ways", "host_ms", "record_ms")}
    assert all(0 < n < math.inf for n in numbers(measured))
    text = bench._gpu_text(found)
    assert "a step is one CUDA graph" in text
    assert "GFLOP/s at the step's shapes, by cuBLAS without TF32" in text
