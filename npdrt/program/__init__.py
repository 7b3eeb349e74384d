"""A step as a program: recorded once, listed, and replayed without allocating.

`record(step, *args)` runs a step once on arrays that have no data and returns a `Program`: the
straight-line list of its array calls, forward, backward and update alike.
"""

from npdrt.program.difference import Difference, compare
from npdrt.program.memory import Memory
from npdrt.program.program import Program, load, memory_on, record

__all__ = ["Difference", "Memory", "Program", "compare", "load", "memory_on", "record"]
