"""The number formats of the vectors: rounding, spacing and hex bit patterns.

Every value of the four formats is a float64, so values are held as float64 arrays and a format
says which of them it can represent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from npdrt.errors import FileRefused

Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Format:
    """A binary IEEE 754 format. width: bits in all; precision: bits of the significand, the hidden
    one included; emax: the exponent of the largest binade."""

    name: str
    width: int
    precision: int
    emax: int

    @cached_property
    def largest(self) -> float:
        """The largest finite number."""
        return float((2.0 - 2.0 ** (1 - self.precision)) * 2.0**self.emax)

    @cached_property
    def smallest_normal(self) -> float:
        """The smallest positive number that is not subnormal."""
        return float(2.0 ** (1 - self.emax))

    @cached_property
    def smallest(self) -> float:
        """The smallest positive number."""
        return float(2.0 ** (2 - self.emax - self.precision))

    def ulp(self, scale: Any) -> Any:
        """The spacing of the format at `scale`: the distance from |scale|, rounded towards zero to
        the format, to the next number above; never below `smallest`, inf or NaN where scale is.

        In the last binade it is the spacing of that binade, so it is finite for finite numbers.
        """
        scale = np.abs(scale)
        finite = np.isfinite(scale)
        exponent = np.minimum(np.maximum(np.frexp(scale)[1], 2 - self.emax), self.emax + 1)
        return np.where(finite, np.ldexp(scale.dtype.type(1), exponent - self.precision), scale)

    def round(self, x: Any) -> Values:
        """`x` rounded once to the format, to nearest even; subnormals kept, overflow to inf."""
        with np.errstate(all="ignore"):
            spacing = self.ulp(x)
            rounded = np.where(np.isfinite(x), np.rint(x / spacing) * spacing, x)
        over = np.where(np.abs(rounded) > self.largest, np.copysign(np.inf, rounded), rounded)
        return np.asarray(over, dtype=np.float64)

    def bits(self, values: Any) -> str:
        """The values, all numbers of this format, as big-endian hex, one after another."""
        values = np.asarray(values, dtype=np.float64).reshape(-1)
        with np.errstate(all="ignore"):
            if self.name == "bfloat16":  # the upper half of a float32
                data = (values.astype(np.float32).view(np.uint32) >> 16).astype(">u2").tobytes()
            else:
                data = values.astype(f">f{self.width // 8}").tobytes()
        return bytes(data).hex()

    def values(self, text: str) -> Values:
        """The numbers of a text made by `bits`. Raises `FileRefused` for another text."""
        try:
            data = bytes.fromhex(text)
            if self.name == "bfloat16":
                words = np.frombuffer(data, dtype=">u2").astype(np.uint32) << 16
                return words.view(np.float32).astype(np.float64)
            return np.frombuffer(data, dtype=f">f{self.width // 8}").astype(np.float64)
        except ValueError as error:
            shown = text if len(text) < 40 else text[:40] + "..."
            raise FileRefused(
                f"expected {self.name} bit patterns of {self.width // 4} hex digits each; "
                f"got {shown!r}"
            ) from error


FORMATS = {
    f.name: f
    for f in (
        Format("float16", 16, 11, 15),
        Format("bfloat16", 16, 8, 127),
        Format("float32", 32, 24, 127),
        Format("float64", 64, 53, 1023),
    )
}


@lru_cache
def rounding_error(number: Format, x: float) -> float:
    """|x rounded to a format / x - 1|; 0 for 0."""
    return abs(float(number.round(np.float64(x))) / x - 1) if x else 0.0
