"""Read a pickle without running it.

A pickle is a program for a stack machine that may call any function. `Machine` knows the
instructions that make numbers, texts, tuples, lists and dicts. Whatever else a file's format needs,
its calls above all, a subclass names one by one; any other instruction, name or call is refused
before anything happens. The standard library's `pickletools.genops` splits the file into
instructions, and executes nothing.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from typing import IO, Any, ClassVar

from npdrt.errors import FileRefused

DAMAGE = (ValueError, TypeError, IndexError, KeyError, OverflowError, RecursionError)


class Name(str):
    """The name in a GLOBAL instruction: one of the machine's `names`."""


class _Mark:
    """The start of a list, tuple or dict that is being collected."""


class Machine:
    """The stack, the memo, and the effect of each instruction on them.

    A subclass has: names, those that GLOBAL may give; key, the type of a dict's keys; holds, what
    its files are, for messages; and the methods `call`, `build` and `text`.
    """

    names: ClassVar[tuple[str, ...]]
    key: ClassVar[type]
    holds: ClassVar[str]
    more: ClassVar[dict[str, Callable[..., None]]] = {}  # instructions besides the usual ones

    def __init__(self, name: str) -> None:
        self.name, self.place = name, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes | IO[bytes]) -> Any:
        """The value of the next pickle in a stream.

        Raises FileRefused for an instruction, name or call that the format does not have, and for
        a damaged pickle.
        """
        try:
            with warnings.catch_warnings():  # of escapes in strings, which Python reads anyway
                warnings.simplefilter("ignore")
                for opcode, argument, place in pickletools.genops(pickle):
                    self.step(opcode.name, argument, place or 0)
            (found,) = self.stack
        except DAMAGE as error:
            raise FileRefused(f"{self.name}: damaged pickle: {error}") from error
        return found

    def step(self, opcode: str, argument: Any, place: int) -> None:
        """Carry out one instruction."""
        self.place = place
        action = self.more.get(opcode) or _ACTIONS.get(opcode)
        if action is None:
            raise self.refusal(f"opcode {opcode}")
        action(self, argument)

    def refusal(self, what: str) -> FileRefused:
        """The error that refuses the file."""
        return FileRefused(
            f"{self.name}: {what} at byte {self.place}; {self.holds}, and nothing of this file was "
            "run"
        )

    def call(self, function: Any, arguments: Any) -> Any:
        """The value of a call: REDUCE."""
        raise self.refusal("opcode REDUCE")

    def build(self, value: Any, state: Any) -> None:
        """Give a value its state: BUILD."""
        raise self.refusal("opcode BUILD")

    def since_mark(self) -> list[Any]:
        """Take the values above the last mark off the stack, and the mark."""
        for n in range(len(self.stack) - 1, -1, -1):
            if type(self.stack[n]) is _Mark:
                taken = self.stack[n + 1 :]
                del self.stack[n:]
                return taken
        raise ValueError("a mark is missing")

    def last(self, n: int) -> list[Any]:
        """Take the last n values off the stack."""
        if len(self.stack) < n:
            raise ValueError("the stack is empty")
        taken = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return taken

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def _extend(self, items: list[Any]) -> None:
        """Put items into the list on the stack."""
        if type(self.stack[-1]) is not list:
            raise ValueError("items for a value that is not a list")
        self.stack[-1].extend(items)

    def _fill(self, items: list[Any]) -> None:
        """Put keys and values into the dict on the stack."""
        keys, values = items[::2], items[1::2]
        if type(self.stack[-1]) is not dict or any(type(key) is not self.key for key in keys):
            kind = "byte strings" if self.key is bytes else "texts"
            raise ValueError(f"entries without a dict, or keys that are not {kind}")
        self.stack[-1].update(zip(keys, values, strict=True))

    def _dict(self, _: Any) -> None:
        items = self.since_mark()
        self.push({})
        self._fill(items)

    def _proto(self, version: int) -> None:
        """PROTO: the files that npdrt knows are of protocol 2."""
        if version > 2:
            raise self.refusal(f"opcode PROTO {version}")

    def _named(self, value: str) -> None:
        """GLOBAL."""
        if value not in self.names:
            raise self.refusal(f"opcode GLOBAL naming {value[:80]!r}")
        self.push(Name(value))

    def _reduce(self, _: Any) -> None:
        self.push(self.call(*self.last(2)))

    def _build(self, _: Any) -> None:
        (state,) = self.last(1)
        self.build(self.stack[-1], state)

    def _put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]


_Action = Callable[[Any, Any], None]
_ACTIONS: dict[str, _Action] = {
    "PROTO": Machine._proto,
    "STOP": lambda m, _: None,
    "MARK": lambda m, _: m.push(_Mark()),
    "GLOBAL": Machine._named,
    "REDUCE": Machine._reduce,
    "BUILD": Machine._build,
    "NONE": Machine.push,
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "DICT": Machine._dict,
    "LIST": lambda m, _: m.push(m.since_mark()),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "APPEND": lambda m, _: m._extend(m.last(1)),
    "APPENDS": lambda m, _: m._extend(m.since_mark()),
    "SETITEM": lambda m, _: m._fill(m.last(2)),
    "SETITEMS": lambda m, _: m._fill(m.since_mark()),
    **{f"TUPLE{n}": lambda m, _, n=n: m.push(tuple(m.last(n))) for n in (1, 2, 3)},  # type: ignore[misc]
    **dict.fromkeys(("INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2"), Machine.push),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, key: m.push(m.memo[key])),
}
