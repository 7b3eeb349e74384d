"""The operations: one file for each family, each operation with its derivative.

Every operation takes arrays (or Tensors) as positional arguments and settings as keywords, works
in the dtype of its arguments, never casts up, and never writes to its arguments. Subgradients at
kinks and ties are stated where they are chosen.

It computes in float32 or float64 (complex under a complex step where analytic), all arguments in
one of the two, and refuses anything else: convert it first. Integers and booleans may meet
floating-point arrays in `add`, `subtract`, `multiply`, `divide`, `power`, `where`, `maximum` and
`minimum`, if the dtype of these holds them (int8 to int16 in float32), and so may numbers: those of
NumPy count as Python's, here and as settings. Operations that only move or select elements
(`moves=True` in their file: reshape, gather, max and others) take any dtype. Labels and indices are
integers, masks booleans. NumPy's masked arrays and matrices are refused.

A new operation goes into the file of its family and that file's `__all__`, and gets a line in
tests/primitives.py. A primitive is one function from arrays to `(value, vjps)`
(`npdrt.autodiff.primitive`):

    @primitive(computes=ALL)
    def exp(x):
        y = namespace(x).exp(x)
        return y, lambda g: g * y
"""

from types import FunctionType

from npdrt.ops.activation import *
from npdrt.ops.arithmetic import *
from npdrt.ops.attention import *
from npdrt.ops.conditional import *
from npdrt.ops.convolution import *
from npdrt.ops.dropout import *
from npdrt.ops.elementary import *
from npdrt.ops.embedding import *
from npdrt.ops.linear import *
from npdrt.ops.loss import *
from npdrt.ops.normalisation import *
from npdrt.ops.pooling import *
from npdrt.ops.reduction import *
from npdrt.ops.selection import *
from npdrt.ops.shape import *
from npdrt.ops.spectral import *

__all__ = sorted(name for name, item in globals().items() if isinstance(item, FunctionType))
