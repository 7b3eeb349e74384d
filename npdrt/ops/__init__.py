"""The primitives, a file a family, each with its derivative beside it.

Every operation takes arrays (or Tensors) as positional arguments and settings as keywords, works
in the dtype of its arguments, never casts up, and never writes to its arguments. Subgradients at
kinks and ties are stated where they are chosen.

It computes in float32 or float64 (complex under a complex step where analytic), all arguments in
one of the two, and refuses anything else: convert it first. Integers and booleans may meet
floating-point arrays in `add`, `subtract`, `multiply`, `divide`, `power`, `where`, `maximum` and
`minimum`, if the dtype of these holds them (int8 to int16 in float32), and so may numbers: those of
NumPy count as Python's, here and as settings. Operations that only move or choose elements take
any dtype: broadcast_to, clip, concat, embedding, gather, getitem, max, maximum, minimum, pad,
reshape, split, transpose and where. Labels and indices are integers, masks booleans. NumPy's masked
arrays and matrices are refused.
"""

from npdrt.ops.activation import gelu, leaky_relu, relu, softplus
from npdrt.ops.arithmetic import add, divide, multiply, negative, power, subtract
from npdrt.ops.attention import attention, multi_head_attention
from npdrt.ops.convolution import conv2d
from npdrt.ops.dropout import dropout
from npdrt.ops.elementary import absolute, erf, exp, log, sigmoid, sqrt, tanh
from npdrt.ops.embedding import embedding
from npdrt.ops.linear import linear, matmul
from npdrt.ops.loss import (
    hinge,
    log_softmax,
    softmax,
    softmax_cross_entropy,
    squared_error,
)
from npdrt.ops.normalisation import (
    batch_norm,
    batch_norm_inference,
    entry_norm,
    group_norm,
    layer_norm,
    weight_norm,
)
from npdrt.ops.pooling import average_pool, global_average_pool, max_pool
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
    "attention",
    "average_pool",
    "batch_norm",
    "batch_norm_inference",
    "broadcast_to",
    "clip",
    "concat",
    "conv2d",
    "divide",
    "dropout",
    "embedding",
    "entry_norm",
    "erf",
    "exp",
    "gather",
    "gelu",
    "getitem",
    "global_average_pool",
    "group_norm",
    "hinge",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log",
    "log_softmax",
    "logsumexp",
    "matmul",
    "max",
    "max_pool",
    "maximum",
    "mean",
    "minimum",
    "multi_head_attention",
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
    "weight_norm",
    "where",
]
