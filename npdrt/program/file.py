"""A program as a file: one JSON object, described in docs/programs.md.

Writing is atomic, and the same program gives the same bytes. Reading trusts nothing: every
function is one of `npdrt.program.calls.KINDS`, and the form of every result - shape, dtype,
memory layout, and for a view its place in its owner's memory - is worked out anew from the call
and must be the one in the file.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from npdrt.errors import Error, FileRefused
from npdrt.program import infer
from npdrt.program.calls import KINDS, Call, Draw, Fixed, Ref, Stream, Value
from npdrt.program.listing import encoded
from npdrt.program.recorder import DRAWN
from npdrt.program.tree import Leaf, is_container, record_of

if TYPE_CHECKING:
    from npdrt.program.program import Program

KIND, FORMAT = "npdrt program", 1
MAX_BYTES = 1 << 30
MAX_NUMBER = 1 << 62  # of a size, stride or index
MAX_ARANGE = 1 << 24  # elements; NumPy makes them to tell their dtype
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
SETTINGS = ("axis", "keepdims", "dtype", "stable", "side", "min", "max")
