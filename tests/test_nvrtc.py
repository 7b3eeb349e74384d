"""Every kernel of npdrt, compiled by NVRTC, which needs no GPU: the PTX rounds as the kernel says.

NVRTC comes with `pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12`.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import struct
from functools import cache
from typing import Any

import numpy as np
import pytest
from cupy_standin import StandIn
from test_program_gpu import OPTIMIZERS, everything, extreme, network

from npdrt import arrays, philox, record
from npdrt.kernels import convolution, norms, row, softmax
from npdrt.program import kernels
from npdrt.program.cuda import CudaMemory

ARCHITECTURES = ("80", "90", "100")
OF_CUPY = ("--std=c++17", "-ftz=true")  # CuPy adds them after a kernel's own options


@cache
def nvrtc() -> Any:
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="CuPy is not installed")
    try:
        return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")


def ptx_of(source: str, architecture: str, options: tuple[str, ...] = kernels.OPTIONS) -> str:
    """The PTX of a source, compiled with options and then CuPy's."""
    return compiled(source, f"compute_{architecture}", options, "PTX").rstrip(b"\0").decode()


def compiled(source: str, architecture: str, options: tuple[str, ...], what: str) -> bytes:
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"k.cu", 0, None, None)
    every = [f"--gpu-architecture={architecture}", *options, *OF_CUPY]
    texts = (ctypes.c_char_p * len(every))(*(option.encode() for option in every))
    status = library.nvrtcCompileProgram(program, len(every), texts)
    what = what if status == 0 else "ProgramLog"
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, text.value.decode()
    return text.raw


def resources(source: str, architecture: str) -> dict[str, tuple[int, int]]:
    """Registers of a thread and bytes of its stack, of every kernel: `.nv.info` of the machine code
    (attributes EIATTR_REGCOUNT and EIATTR_FRAME_SIZE)."""
    image = compiled(source, f"sm_{architecture}", kernels.OPTIONS, "CUBIN")
    (start,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, start + k * size) for k in range(count)]

    def text(table: int, offset: int) -> str:
        begin = headers[table][4] + offset
        return image[begin : image.index(b"\0", begin)].decode()

    section = {text(names, header[0]): k for k, header in enumerate(headers)}
    symbols, strings = headers[section[".symtab"]][4], section[".strtab"]
    at, length = headers[section[".nv.info"]][4:6]
    found: dict[str, dict[int, int]] = {}
    end = at + length
    while at < end:
        form, attribute, nbytes = struct.unpack_from("<BBH", image, at)
        if form == 4 and attribute in (0x2F, 0x11):
            symbol, number = struct.unpack_from("<II", image, at + 4)
            (name,) = struct.unpack_from("<I", image, symbols + 24 * symbol)
            found.setdefault(text(strings, name), {})[attribute] = number
        at += 4 + (nbytes if form == 4 else 0)
    kernels_of = {name: numbers for name, numbers in found.items() if 0x2F in numbers}
    return {name: (numbers[0x2F], numbers.get(0x11, 0)) for name, numbers in kernels_of.items()}


def faults(ptx: str) -> set[str]:
    """Instructions that round otherwise than once, flush subnormal numbers, or that ptxas may
    contract: those without a rounding mode."""
    inexact = re.findall(r"\bfma\.\S+|\S+\.ftz\S*|\S+\.approx\S*", ptx)
    return {*inexact, *re.findall(r"\b(?:add|sub|mul|div|sqrt)\.f(?:32|64)\b", ptx)}


def elementwise(number: int, reads: str, writes: str, body: str) -> str:
    """The body of an elementwise kernel as a kernel of its own, with a thread an element."""
    every = list(enumerate([*kernels.parameters(reads), *kernels.parameters(writes)]))
    given = ", ".join(f"{kind}* p{j}" for j, (_, kind, _) in every)
    names = " ".join(
        f"{kind}* {name} = p{j};" if raw else f"{kind}& {name} = p{j}[i];"
        for j, (raw, kind, name) in every
    )
    index = "const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;"
    return f'extern "C" __global__ void k{number}({given}) {{ {index} {names} {body} }}'


class Uncompiled(StandIn):
    """A stand-in that notes the sources of kernels and does not compile them."""

    def __init__(self) -> None:
        super().__init__()
        self.raw: list[tuple[str, str]] = []

    def ElementwiseKernel(self, reads: str, writes: str, body: str, *_: Any, **__: Any) -> Any:
        self.kernels.append((reads, writes, body))
        return lambda *args: None

    def RawKernel(self, code: str, name: str, **_: Any) -> Any:
        self.raw.append((code.removeprefix(kernels.ARITHMETIC), name))
        return lambda *args: None


@cache
def source() -> str:
    """All kernels: chains and batches of every rule and function, norms, sums of rows, masks."""
    device = Uncompiled()
    for dtype in ("float32", "float64"):
        for name in OPTIMIZERS:
            step, args = network(name, dtype)
            record(step, *args, memory=CudaMemory(device, device.blas))(*args)
    args = (extreme("float32", 0), extreme("float32", 1), extreme("float64", 1), np.asarray(0.3))
    record(everything, *args, memory=CudaMemory(device, device.blas))(*args)
    chains = [elementwise(k, *found) for k, found in enumerate(dict.fromkeys(device.kernels))]
    assert len(chains) > 40
    raw = list(dict.fromkeys(device.raw))
    known = {"npdrt_batch", "npdrt_norm_lanes", "npdrt_norm_fold", philox.NAME}
    assert {name for _, name in raw} == known
    renamed = [code.replace(f"{name}(", f"{name}_{k}(") for k, (code, name) in enumerate(raw)]
    return "\n".join([kernels.ARITHMETIC, *chains, *renamed, sum_rows()])


def sum_rows() -> str:
    """The kernel of `npdrt.arrays.sum_rows`, from its source."""
    text = inspect.getsource(arrays._cupy_sum_rows)
    (body,) = re.findall(r'"(total = 0;.*?)"', text)
    assert '"--fmad=false"' in text
    before = "double* rows, long long count, long long width, double* totals"
    inside = f"const long long i = threadIdx.x; double& total = totals[i]; {body}"
    return f'extern "C" __global__ void sum_rows({before}) {{ {inside} }}'


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_round_once_and_keep_subnormal_numbers(architecture: str) -> None:
    ptx = ptx_of(source(), architecture)
    assert f".target sm_{architecture}" in ptx
    assert all(text in ptx for text in ("add.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f64"))
    assert faults(ptx) == set()


# --- the kernels of primitives ------------------------------------------------------------------


def defined(source: str, **names: Any) -> str:
    return "".join(f"#define {name} {value}\n" for name, value in names.items()) + source


def of_rows(kind: str) -> dict[str, str]:
    """The sources of the kernels of rows, with the most threads."""
    names = {"T": kind, "THREADS": row.MOST, "CHUNK": row.CHUNK}
    sources = {"norms": norms.NORMS, "softmax": softmax.SOFTMAX}
    return {name: defined(row.COMMON + source, **names) for name, source in sources.items()}


def of_convolution(factors: str, kind: str, tile: int) -> str:
    """The source of one product of a convolution."""
    window = {"KH": 3, "KW": 3, "SH": 2, "SW": 1, "PH": 1, "PW": 1}
    names = {"T": kind, "TM": tile, "TN": tile, "FACTORS": factors}
    return defined(convolution.SOURCE, **window, **names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_primitives_fuse_and_round_as_they_say(architecture: str) -> None:
    """Convolutions fuse every term, norms nothing; only functions like exp are approximate."""
    fused = ptx_of(of_convolution("Weight", "float", 8), architecture)
    norm, soft = (ptx_of(source, architecture) for source in of_rows("float").values())
    assert all(f".target sm_{architecture}" in ptx for ptx in (fused, norm, soft))
    assert len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", fused)) >= 64 * convolution.STEP
    assert not re.findall(r"\bfma\.|\.approx", norm)
    assert ".approx" not in fused
    assert "div.rn" in norm
    assert "sqrt.rn" in norm


def test_kernels_of_primitives_fit_a_multiprocessor_and_keep_no_stack() -> None:
    """A sum that is not in registers would go through memory in every term."""
    kinds = (("float", 8), ("double", 4))
    every = [(row.MOST, source) for source in of_rows("double").values()]
    every += [(convolution.THREADS, of_convolution(factors, *kind))
              for factors in convolution.FACTORS.values() for kind in kinds]  # fmt: skip
    for threads, source in every:
        for kernel, (registers, stack) in resources(source, "90").items():
            assert registers * threads <= 1 << 16, (kernel, registers)
            assert stack == 0, (kernel, stack)


def test_a_planted_array_outside_the_registers_is_seen() -> None:
    body = "float a[64] = {}; for (int i = 0; i < 64; ++i) a[(int)x[i]] += 1; x[0] = a[(int)x[64]];"
    (found,) = resources(f'extern "C" __global__ void k(float* x) {{ {body} }}', "90").values()
    assert found[1] >= 256


PLANTED = 'extern "C" __global__ void k(float* x) {{ x[0] = {}; }}'


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_planted_contraction_is_seen(architecture: str) -> None:
    contracted = ptx_of(PLANTED.format("x[1] * x[2] + x[3]"), architecture, ())
    assert any(fault.startswith("fma.rn") for fault in faults(contracted))
    flushed = ptx_of(PLANTED.format("x[1] + x[2]"), architecture)
    assert any(".ftz" in fault for fault in faults(flushed))
    fast = ptx_of(PLANTED.format("x[1] / x[2]"), architecture, ("--use_fast_math",))
    assert any(".approx" in fault for fault in faults(fast))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_source_that_does_not_compile_is_seen(architecture: str) -> None:
    with pytest.raises(AssertionError, match="identifier"):
        ptx_of(PLANTED.format("no_such_name"), architecture)
