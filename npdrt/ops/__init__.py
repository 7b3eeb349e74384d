"""The primitives, a file a family, each with its derivative beside it.

Every operation takes arrays (or Tensors) as positional arguments and settings as keywords, works
in the dtype of its arguments (float32 and float64; complex under a complex step where analytic),
never casts up, and never writes to its arguments. Subgradients at kinks and ties are stated where
they are chosen.
"""

from npdrt.ops.activation import gelu, leaky_relu, relu, softplus
from npdrt.ops.arithmetic import add, divide, multiply, negative, power, subtract
from npdrt.ops.elementary import absolute, erf, exp, log, sigmoid, sqrt, tanh
from npdrt.ops.linear import linear, matmul
from npdrt.ops.loss import (
    hinge,
    log_softmax,
    softmax,
    softmax_cross_entropy,
    squared_error,
)
from npdrt.ops.reduction import logsumexp, max, mean, sum, var
from npdrt.ops.selection import clip, maximum, minimum, where
from npdrt.ops.shape import (
    broadcast_to,
    concat,
    gather,
    getitem,
    pad,
    reshape,
    split,
    transpose,
)
from npdrt.ops.spectral import spectral_normalise

__all__ = [
    "absolute",
    "add",
    "broadcast_to",
    "clip",
    "concat",
    "divide",
    "erf",
    "exp",
    "gather",
    "gelu",
    "getitem",
    "hinge",
    "leaky_relu",
    "linear",
    "log",
    "log_softmax",
    "logsumexp",
    "matmul",
    "max",
    "maximum",
    "mean",
    "minimum",
    "multiply",
    "negative",
    "pad",
    "power",
    "relu",
    "reshape",
    "sigmoid",
    "softmax",
    "softmax_cross_entropy",
    "softplus",
    "spectral_normalise",
    "split",
    "sqrt",
    "squared_error",
    "subtract",
    "sum",
    "tanh",
    "transpose",
    "var",
    "where",
]
