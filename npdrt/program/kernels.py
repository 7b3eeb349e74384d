"""The sources of the GPU's kernels: a chain of exact calls as one loop, and the norm.

They are written in PTX operations that round once (`add.rn.f32`), so that no compiler flag changes
them: CuPy passes `-ftz=true` to its compiler after any other option, and so CuPy's own float32
functions take subnormal numbers for zero; these do not, as NumPy does not. Compiled by a C++
compiler they have the same bits, which is how they are tested without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npdrt.optim.norm import CHUNK, LANES
from npdrt.program.calls import Call, Ref, Value
from npdrt.program.chain import Language, computed_in, expression, read_by
from npdrt.program.fused import can_fuse

OPTIONS = ("--fmad=false", "--prec-div=true", "--prec-sqrt=true")
TYPES = {"bool": "bool", "float32": "float", "float64": "double"}
_BITWISE = {"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}

# On the device each operation is the PTX instruction that rounds once and keeps subnormals,
# whatever the compiler was told; elsewhere, in the tests, the operator of C.
ARITHMETIC = r"""
#ifdef __CUDA_ARCH__
#define NPDRT_TWO(name, ptx, sign) \
  __device__ inline float npdrt_##name(float a, float b) { \
    float r; asm(ptx ".f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; } \
  __device__ inline double npdrt_##name(double a, double b) { \
    double r; asm(ptx ".f64 %0, %1, %2;" : "=d"(r) : "d"(a), "d"(b)); return r; }
#define NPDRT_ONE(name, ptx, c) \
  __device__ inline float npdrt_##name(float a) { \
    float r; asm(ptx ".f32 %0, %1;" : "=f"(r) : "f"(a)); return r; } \
  __device__ inline double npdrt_##name(double a) { \
    double r; asm(ptx ".f64 %0, %1;" : "=d"(r) : "d"(a)); return r; }
#define NPDRT_IS(name, ptx, sign) \
  __device__ inline bool npdrt_##name(float a, float b) { int r; \
    asm("{.reg .pred p; setp." ptx ".f32 p, %1, %2; selp.s32 %0, 1, 0, p;}" \
        : "=r"(r) : "f"(a), "f"(b)); return r != 0; } \
  __device__ inline bool npdrt_##name(double a, double b) { int r; \
    asm("{.reg .pred p; setp." ptx ".f64 p, %1, %2; selp.s32 %0, 1, 0, p;}" \
        : "=r"(r) : "d"(a), "d"(b)); return r != 0; }
__device__ inline double npdrt_double(float a) {
  double r; asm("cvt.f64.f32 %0, %1;" : "=d"(r) : "f"(a)); return r; }
__device__ inline float npdrt_float(double a) {
  float r; asm("cvt.rn.f32.f64 %0, %1;" : "=f"(r) : "d"(a)); return r; }
__device__ inline float npdrt_bits(unsigned int a) { return __uint_as_float(a); }
__device__ inline double npdrt_bits(unsigned long long a) {
  return __longlong_as_double((long long)a); }
#else
#define NPDRT_TWO(name, ptx, sign) \
  __device__ inline float npdrt_##name(float a, float b) { return a sign b; } \
  __device__ inline double npdrt_##name(double a, double b) { return a sign b; }
#define NPDRT_ONE(name, ptx, c) \
  __device__ inline float npdrt_##name(float a) { return c(a); } \
  __device__ inline double npdrt_##name(double a) { return c(a); }
#define NPDRT_IS(name, ptx, sign) \
  __device__ inline bool npdrt_##name(float a, float b) { return a sign b; } \
  __device__ inline bool npdrt_##name(double a, double b) { return a sign b; }
__device__ inline double npdrt_double(float a) { return (double)a; }
__device__ inline float npdrt_float(double a) { return (float)a; }
__device__ inline float npdrt_bits(unsigned int a) {
  union { unsigned int i; float f; } u; u.i = a; return u.f; }
__device__ inline double npdrt_bits(unsigned long long a) {
  union { unsigned long long i; double f; } u; u.i = a; return u.f; }
#endif
__device__ inline double npdrt_double(double a) { return a; }
NPDRT_TWO(add, "add.rn", +)
NPDRT_TWO(subtract, "sub.rn", -)
NPDRT_TWO(multiply, "mul.rn", *)
NPDRT_TWO(divide, "div.rn", /)
NPDRT_ONE(sqrt, "sqrt.rn", sqrt)
NPDRT_ONE(negative, "neg", -)
NPDRT_ONE(abs, "abs", fabs)
NPDRT_IS(equal, "eq", ==)
NPDRT_IS(not_equal, "neu", !=)
NPDRT_IS(less, "lt", <)
NPDRT_IS(less_equal, "le", <=)
NPDRT_IS(greater, "gt", >)
NPDRT_IS(greater_equal, "ge", >=)
"""

NORM_LANES = f"""
extern "C" __global__ void npdrt_norm_lanes(
    const TYPE* __restrict__ x, long long size, double* __restrict__ lanes) {{
  const long long start = (long long)blockIdx.x * {CHUNK};
  const long long end = start + {CHUNK} < size ? start + {CHUNK} : size;
  double total = 0.0;
  #pragma unroll 16
  for (long long i = start + threadIdx.x; i < end; i += {LANES}) {{
    const double v = npdrt_double(x[i]);
    total = npdrt_add(total, npdrt_multiply(v, v));
  }}
  lanes[(long long)blockIdx.x * {LANES} + threadIdx.x] = total;
}}
"""
NORM_FOLD = f"""
extern "C" __global__ void npdrt_norm_fold(
    const double* __restrict__ lanes, long long chunks, double* __restrict__ out) {{
  __shared__ double folded[{LANES}];
  const int k = threadIdx.x;
  double total = lanes[k];
  #pragma unroll 16
  for (long long c = 1; c < chunks; ++c) total = npdrt_add(total, lanes[c * {LANES} + k]);
  folded[k] = total;
  __syncthreads();
  for (int half = {LANES // 2}; half; half /= 2) {{
    if (k < half) folded[k] = npdrt_add(folded[k], folded[k + half]);
    __syncthreads();
  }}
  if (k == 0) out[0] = npdrt_sqrt(folded[0]);
}}
"""


class Loop(NamedTuple):
    """The source of an elementwise kernel, and the values its parameters are, in their order."""

    reads: str
    writes: str
    body: str
    read: tuple[int, ...]
    written: tuple[int, ...]


def can_compile(call: Call, values: list[Value]) -> bool:
    """Whether a call can be in a kernel: on float32, float64 and bool, with NumPy's bits."""
    if not can_fuse(call, values):
        return False
    if call.function in ("astype", "where"):
        return all(isinstance(x, Ref | float | int | bool | str) for x in call.args)
    dtype = computed_in(call, values)
    return (dtype == "bool") == (call.function in _BITWISE)


def loop_source(
    calls: list[Call], values: list[Value], kept: list[int], place: Callable[[int], Any]
) -> Loop:
    """Elementwise calls as the body of a kernel for one element.

    kept: the results it writes. place(i): equal for values that are the same array. Everything is
    read before anything is written, and an array that is also written is a parameter once, so a
    result may replace an argument. 0-d arrays are read where they are, on the device. Names count
    from 0: the same calls of another layer have the same source.
    """
    shape = values[calls[0].result].shape
    read: dict[Any, tuple[str, int]] = {}
    written = {place(i): (f"o{k}", i) for k, i in enumerate(kept)}
    names: dict[int, str] = {}
    reads, body = [], []
    for i in read_by(calls):
        key, value, scalar = place(i), values[i], values[i].shape == () != shape
        if key not in written and key not in read:
            read[key] = (f"a{len(read)}", i)
            reads.append(f"{'raw ' if scalar else ''}{value.dtype} {read[key][0]}")
        source = (written.get(key) or read[key])[0] + ("[0]" if scalar else "")
        names[i] = f"x{len(names)}"
        body.append(f"const {TYPES[value.dtype]} {names[i]} = {source};")
    for call in calls:
        names[call.result] = f"x{len(names)}"
        kind = TYPES[values[call.result].dtype]
        body.append(f"const {kind} {names[call.result]} = {expression(call, values, names, CUDA)};")
    body += [f"{written[place(i)][0]} = {names[i]};" for i in kept]
    writes = ", ".join(f"{values[i].dtype} {name}" for name, i in written.values())
    order = (tuple(i for _, i in read.values()), tuple(i for _, i in written.values()))
    return Loop(", ".join(reads), writes, "\n".join(body), *order)


def _cast(name: str, given: str, wanted: str) -> str:
    if given == wanted:
        return name
    if wanted == "bool":
        return f"npdrt_not_equal({name}, {_literal(0.0, given)})"
    return f"({TYPES[wanted]}){name}" if given == "bool" else f"npdrt_{TYPES[wanted]}({name})"


def _literal(x: float, dtype: str) -> str:
    """A Python number rounded to a dtype, in C; by its bits if a compiler might lose some."""
    if dtype == "bool":
        return "true" if x else "false"
    with np.errstate(all="ignore"):
        value = np.dtype(dtype).type(x)
    if np.isfinite(value) and (value == 0 or abs(value) >= np.finfo(dtype).tiny):
        return f"({TYPES[dtype]})({float(value)!r})"
    bits, suffix = ("uint32", "u") if dtype == "float32" else ("uint64", "ull")
    return f"npdrt_bits({int(value.view(bits)):#x}{suffix})"


def _apply(function: str, operands: list[str], dtype: str) -> str:
    if function == "where":
        return f"{operands[0]} ? {operands[1]} : {operands[2]}"
    if function in _BITWISE:
        return f"{operands[0]} {_BITWISE[function]} {operands[1]}"
    if function == "isfinite":
        return f"npdrt_less(npdrt_abs({operands[0]}), {_literal(math.inf, dtype)})"
    return f"npdrt_{function}({', '.join(operands)})"


CUDA = Language(cast=_cast, literal=_literal, apply=_apply)
