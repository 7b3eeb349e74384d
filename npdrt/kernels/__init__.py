"""Kernels that take the place of a primitive's array calls on a GPU.

`npdrt.arrays.composite` launches them for CuPy's arrays, eager and in programs. The array calls
stay the definition, and the results are close to theirs: each kernel says in which order it adds.
"""

from npdrt.kernels import convolution, norms, softmax
from npdrt.kernels.kernel import Kernel

# by the name of a call
KERNELS: dict[str, Kernel] = {**convolution.KERNELS, **norms.KERNELS, **softmax.KERNELS}
