"""`--precision tf32`: float32 products on a GPU, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from cupy_standin import StandIn, tf32
from test_program_gpu import gpu, on_device  # noqa: F401 - gpu is a fixture

from npdrt import arrays, cublas, data, record, store
from npdrt.cli import cli
from npdrt.errors import Error, Unavailable
from npdrt.program.cuda import WARM_UPS, CudaMemory
from npdrt.train import Config, train
from npdrt.train.studies import sweep

rng = np.random.default_rng(0)
A, B = (rng.standard_normal(shape).astype("float32") for shape in ((5, 7), (7, 4)))


def product(device: StandIn, a: Any = A, b: Any = B) -> Any:
    blas = cublas.Cublas(device, device.blas)
    return np.asarray(blas.matmul(device.asarray(a), device.asarray(b)).get())


def test_float32_products_are_of_the_precision_asked_for() -> None:
    device = StandIn()
    ieee, rounded = A @ B, tf32(A) @ tf32(B)
    assert 1e-5 < np.max(np.abs(ieee - rounded)) < 1e-1
    assert (product(device) == ieee).all()
    with cublas.precision("tf32"):
        assert (product(device) == rounded).all()
        wide = A.astype("float64"), B.astype("float64")
        assert (product(device, *wide) == wide[0] @ wide[1]).all()
        with cublas.precision("ieee"):
            assert (product(device) == ieee).all()
        assert (product(device) == rounded).all()
        other: list[Any] = []
        thread = threading.Thread(target=lambda: other.append(product(device)))
        thread.start()
        thread.join()
        assert (other[0] == ieee).all(), "another thread did not ask for it"
    assert (product(device) == ieee).all()


def test_a_graph_has_the_precision_of_its_program() -> None:
    expected = {"ieee": A @ B, "tf32": tf32(A) @ tf32(B)}
    for name in cublas.PRECISIONS:
        device = StandIn()
        program = record(arrays.product, A, B, memory=CudaMemory(device, device.blas))
        with cublas.precision(name):
            for _ in range(WARM_UPS + 2):
                found = program(A, B)
        assert program.graph, program.graph_error
        assert (np.asarray(found.get()) == expected[name]).all()
        assert (np.asarray(program(A, B).get()) == expected[name]).all(), "as it was captured"


def test_unknown_precisions_are_refused() -> None:
    with (
        pytest.raises(Error, match="unknown precision 'bf16'; use one of ieee, tf32"),
        cublas.precision("bf16"),
    ):
        pass
    with pytest.raises(Error, match="unknown precision 'bf16'"):
        Config(precision="bf16")
    with pytest.raises(Error, match="precision tf32 is of float32; the dtype is float64"):
        Config(precision="tf32", dtype="float64")


def test_the_cpu_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="precision tf32 needs a GPU, and the device is cpu"):
        train(Config(precision="tf32", epochs=0), tmp_path / "run")
    words = ["train", "--precision", "tf32", "--device", "cpu", "--out", str(tmp_path / "other")]
    result = CliRunner().invoke(cli, words, prog_name="npdrt")
    assert result.exit_code == 4
    assert "--device cuda" in result.stderr


def test_finished_runs_of_a_sweep_keep_their_names() -> None:
    """Only another precision than the one all runs had before is part of a run's digest."""
    digits = data.load("digits")
    names = {p: sweep._hash(Config(precision=p), digits) for p in cublas.PRECISIONS}
    assert names["ieee"] == "40fe5e80be3b"
    assert names["tf32"] != names["ieee"]


@pytest.mark.gpu
def test_gpu_a_run_says_its_precision(
    gpu: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: set[int] = set()
    call = cublas.Cublas._call

    def noted(self: Any, name: str, *args: Any) -> None:
        asked.update({args[-2]} if "Gemm" in name else ())
        call(self, name, *args)

    monkeypatch.setattr(cublas.Cublas, "_call", noted)
    options = {"depth": 2, "width": 8}
    config = Config(
        device="cuda", precision="tf32", epochs=1, batch_size=512, model_options=options
    )
    train(config, tmp_path / "run")
    meta = store.load(tmp_path / "run" / "checkpoint.h5").meta
    assert meta["config"]["precision"] == meta["provenance"]["precision"] == "tf32"
    assert asked == {cublas.TF32}
    assert not cublas.takes_tf32()
    with arrays.on(arrays.device("cuda")):
        program = record(arrays.product, *map(on_device, (A, B)), memory=CudaMemory())
        program(*map(on_device, (A, B)))
    assert asked == {cublas.TF32, cublas.TYPES["float32"][1]}
