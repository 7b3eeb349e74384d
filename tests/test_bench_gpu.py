"""`npdrt doctor` and `npdrt bench` on a GPU, and benchmarks/gpu.py: what they report."""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_bench import SCRIPTS, TINY_ANYWHERE, numbers
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


# --- benchmarks/gpu.py ----------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, with a small transformer."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    script = importlib.import_module("gpu")
    transformer = importlib.import_module("transformer")
    for name, value in {"WORDS": 50, "LENGTH": 4, "WIDTH": 8, "LAYERS": 1}.items():
        monkeypatch.setattr(transformer, name, value)
    yield script
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == SCRIPTS:
            del sys.modules[name]


def small(script: Any) -> dict[str, Any]:
    return {
        "fromage": script.perceptron(3, "fromage", 16, 8),
        "adam": script.perceptron(2, "adam", 16, 8),
        "resnet18": script.resnet18(2, 2),
        "transformer": script.language_model(2),
    }


def test_the_networks_are_the_same_in_both_libraries(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of the first step, and the update where it is by hand."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(sys.modules["transformer"], "DROPOUT", 0.0)
    for name, network in small(script).items():
        function, (state, *batch, lr) = network.step("cpu")
        done = function(state, *batch, lr, script.Random(0))
        weights, loss_fn = network.in_torch(torch, "cpu")
        before = [w.detach().clone() for w in weights]
        loss = loss_fn()
        assert abs(float(loss.detach()) - float(done.loss)) < 1e-5, name
        loss.backward()
        if name in ("fromage", "adam"):
            script.torch_update(torch, weights, network)()
            after = dict(zip(state.params, weights, strict=True))
            for key, w in done.state.params.items():
                change = np.abs(w - state.params[key]).max()
                assert np.abs(after[key].detach().numpy() - w).max() < 0.01 * change + 1e-7
            assert any((a != b).any() for a, b in zip(before, weights, strict=True))


def test_the_script_needs_a_gpu(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Any:
        raise arrays.Unavailable("no CUDA device")

    monkeypatch.setattr(arrays, "_import_cupy", missing)
    with pytest.raises(SystemExit) as exit:
        script.main([])
    assert exit.value.code == 4
    assert "this benchmark needs a GPU: no CUDA device" in capsys.readouterr().err


def test_the_table(script: Any) -> None:
    ways = {name: [2.0 + k, 1.0 + k, 3.0 + k] for k, name in enumerate(script.WAYS)}
    whole = {"network": "a", "rule": "sgd", "ms": ways, "host_us": dict.fromkeys(ways, 7.0),
             "graph": True, "graph_error": None, "nodes": 12, "left_out": {}}  # fmt: skip
    bare = {"network": "b", "rule": "sgd", "ms": {"npdrt eager": [1.0]}, "host_us": {},
            "left_out": {"PyTorch eager": "Unavailable: none"}}  # fmt: skip
    refused = {**whole, "graph": False, "graph_error": "Error: refused", "nodes": None}
    about = {"gpu": {"name": "G"}, "software": {"cupy": "14"}, "torch": None, "precision": "ieee",
             "convolutions": "npdrt"}  # fmt: skip
    text = script.text_of([whole, bare, refused], about)
    assert text.startswith(
        "G; cupy 14; precision ieee; convolutions by npdrt\n\n| network | rule | npdrt eager |"
    )
    assert "| a | sgd | 2.00 | 3.00 | 4.00 | 5.00 | 0.60 | 12 | 7 |" in text
    assert "| b | sgd | 1.00 |  |  |  |  |  |  |" in text
    assert "a: no graph: Error: refused\n\nb, PyTorch eager: Unavailable: none" in text


@pytest.mark.gpu
def test_gpu_script(
    gpu: Any,  # noqa: F811
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    networks = small(script)
    chosen = [networks["fromage"], networks["transformer"]]
    monkeypatch.setattr(script, "networks", lambda given: iter(chosen))
    monkeypatch.setattr(script, "BURST", 2)
    script.main(["--turns", "1", "--output", str(tmp_path / "found.1"), "--precision", "tf32"])
    found = json.loads((tmp_path / "found.1.json").read_text())
    assert set(found["machine"]["software"]) == SOFTWARE
    assert [r["network"] for r in found["results"]] == [network.name for network in chosen]
    for r in found["results"]:
        assert (r["graph"], r["graph_error"]) == (True, None)
        assert set(r["ms"]) >= {"npdrt eager", "npdrt graph"}
        assert set(r["ms"]) | set(r["left_out"]) == set(script.WAYS)
        assert r["loss"]["npdrt eager"] == r["loss"]["npdrt graph"]
    table = (tmp_path / "found.1.md").read_text()
    assert "precision tf32" in table
    assert "| transformer, 2 streams | sgd |" in table
