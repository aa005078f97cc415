# SPDX-License-Identifier: Apache-2.0
"""Pickles that may come from anybody, gone through opcode by opcode before anything unpickles them.

Which names a pickle may hold, a restricted unpickler says. Here it is what a pickle may cost: an unpickler believes the
lengths and memo numbers in it, hashes tuples that hold one another in time that doubles with each, and calls itself
for every tuple within a tuple. What is simulated is the size that the values on its stack have when all references
in them are followed.
"""

import pickle
import pickletools
from collections.abc import Callable, Sequence

MOST_HASHED = 10_000  # values in one that is hashed, all references followed
MOST_STACK = 1 << 20  # values on the stack at once; Python's own pickles have a few thousand
LONGEST_INTEGER = 7  # bytes: Python's hashes of whole numbers repeat after 2^61
_SIZES = {"BINUNICODE8": 8, "BINBYTES8": 8, "BINUNICODE": 4, "BINBYTES": 4, "BINSTRING": 4, "LONG4": 4,
          "SHORT_BINUNICODE": 1, "SHORT_BINBYTES": 1, "SHORT_BINSTRING": 1, "LONG1": 1}  # fmt: skip
_LINES = {"GLOBAL": 2, "STRING": 1, "UNICODE": 1, "INT": 1, "LONG": 1, "FLOAT": 1, "PUT": 1, "GET": 1}
_INTEGERS = ("INT", "LONG", "LONG1", "LONG4")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
          "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")  # fmt: skip
_NEVER = ("POP", "POP_MARK", "DUP", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "BYTEARRAY8", "NEXT_BUFFER",
          "READONLY_BUFFER")  # fmt: skip
_HUGE = 1 << 40


class _Value:
    """What is known of a value on the stack.

    ``size``: of all in it, references followed. ``made``: an object that a call made, whose state may be set.
    ``referred``: the memo was asked for it. ``parts``: of a tuple, how many.
    """

    __slots__ = ("made", "parts", "referred", "size")

    def __init__(self, size: int, *, made: bool = False, parts: int = -1) -> None:
        self.size, self.made, self.parts, self.referred = min(size, _HUGE), made, parts, False

    def grow(self, values: Sequence["_Value"]) -> None:
        self.size = min(self.size + sum(value.size for value in values), _HUGE)


_TEXT, _OTHER = _Value(1), _Value(1)


class _Scan:
    """One pickle in some bytes, from ``at`` on."""

    def __init__(self, content: bytes, at: int, *, persistent: bool) -> None:
        self.content, self.at, self.start, self.persistent = content, at, at, persistent
        self.stack: list[_Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Value] = {}
        self.hashed = 0

    def run(self) -> int:
        """Go through the pickle, and return where it ends."""
        while True:
            if self.at >= len(self.content):
                raise ValueError("it ends too early")
            opcode = _OPCODES.get(self.content[self.at])
            self.at += 1
            if opcode is None:
                raise ValueError("it is no pickle")
            name = opcode.name
            argument = self._argument(name, opcode.arg)
            if name == "STOP":
                return self.at
            if name in _NEVER or (name == "BINPERSID" and not self.persistent):
                raise pickle.UnpicklingError(f"the opcode {name}")
            try:
                self._step(name, argument)
            except (IndexError, KeyError, ValueError):
                raise ValueError("its parts do not fit each other") from None
            if len(self.stack) > MOST_STACK:
                raise pickle.UnpicklingError(f"more than {MOST_STACK:,} values that are put nowhere")

    def _argument(self, name: str, kind: pickletools.ArgumentDescriptor | None) -> bytes:
        """Return the bytes of an opcode's argument, without its length."""
        begin = self.at
        if name in _SIZES:
            begin += _SIZES[name]
            end = begin + int.from_bytes(self.content[self.at : begin], "little")
        elif name in _LINES:
            end = begin
            for _ in range(_LINES[name]):
                end = self.content.find(b"\n", end) + 1 or len(self.content) + 1
        else:
            end = begin + (max(kind.n, 0) if kind else 0)
            if name == "FRAME":
                end = begin + 8  # what it says is in the bytes that follow
        if end > len(self.content):
            raise ValueError(f"a length in it leads behind its end ({name})")
        self.at = end
        if name in _INTEGERS and end - begin > (LONGEST_INTEGER if name.startswith("LONG1") else 20):
            raise pickle.UnpicklingError("a whole number of more than 56 bits")
        return self.content[begin:end]

    def _step(self, name: str, argument: bytes) -> None:
        """Do to the stack what an opcode does."""
        if (take := _STEPS.get(name)) is not None:
            take(self)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            number = int(argument) if name == "PUT" else int.from_bytes(argument, "little")
            if not 0 <= number <= self.at - self.start:  # picklers count up, and each takes at least a byte
                raise pickle.UnpicklingError(f"a memo number of {number:,}")
            self.memo[number] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            value = self.memo[int(argument) if name == "GET" else int.from_bytes(argument, "little")]
            value.referred = True
            self.stack.append(value)
        elif name not in ("PROTO", "FRAME"):
            self.stack.append(_TEXT if name in _TEXTS else _OTHER)

    def pop(self) -> _Value:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError
        return self.stack.pop()

    def to_mark(self) -> list[_Value]:
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def hash(self, values: Sequence[_Value]) -> None:
        """Refuse values whose hashes take long; those of texts are kept, and differ from run to run."""
        for value in values:
            if value is _TEXT:
                continue
            self.hashed += value.size
            if value.size > MOST_HASHED or self.hashed > MOST_HASHED + len(self.content):
                raise pickle.UnpicklingError("values that hold one another so often that hashing them would not end")

    def tuple_of(self, values: Sequence[_Value]) -> None:
        made = _Value(1, parts=len(values))
        made.grow(values)
        self.stack.append(made)

    def container(self, values: Sequence[_Value], hashed: Sequence[_Value] = ()) -> None:
        self.hash(hashed)
        made = _Value(1)
        made.grow(values)
        self.stack.append(made)

    def add(self, values: Sequence[_Value], hashed: Sequence[_Value] = ()) -> None:
        self.hash(hashed)
        if self.stack[-1] in (_TEXT, _OTHER):
            raise IndexError
        self.stack[-1].grow(values)

    def call(self, arguments: Sequence[_Value]) -> None:
        """Take a function or class off the stack, and put on it what it makes of its arguments."""
        self.pop()
        self.hash(arguments)
        made = _Value(1, made=True)
        made.grow(arguments)
        self.stack.append(made)

    def build(self) -> None:
        """Set an object's state: as a mapping of its own, and before anything else refers to it."""
        state = self.pop()
        target = self.stack[-1]
        if not target.made or state.parts == 2:
            raise pickle.UnpicklingError("attributes to be set on what is no object of its own")
        if target.referred:
            raise pickle.UnpicklingError("an object whose state is set after it was used")
        target.grow([state])


def _add_one(scan: _Scan) -> None:
    scan.add([scan.pop()])


def _set_item(scan: _Scan) -> None:
    value, key = scan.pop(), scan.pop()
    scan.add([key, value], [key])


def _set_items(scan: _Scan) -> None:
    values = scan.to_mark()
    scan.add(values, values[::2])


def _add_items(scan: _Scan) -> None:
    values = scan.to_mark()
    scan.add(values, values)


def _frozen_set(scan: _Scan) -> None:
    values = scan.to_mark()
    scan.container(values, values)


def _dictionary(scan: _Scan) -> None:
    values = scan.to_mark()
    scan.container(values, values[::2])


def _tuple(parts: int) -> Callable[[_Scan], None]:
    return lambda scan: scan.tuple_of([scan.pop() for _ in range(parts)])


def _replaced(parts: int) -> Callable[[_Scan], None]:
    """Return a step that takes so many values off the stack, and puts something else on it."""

    def step(scan: _Scan) -> None:
        for _ in range(parts):
            scan.pop()
        scan.stack.append(_OTHER)

    return step


_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_STEPS: dict[str, Callable[[_Scan], None]] = {
    "MARK": lambda scan: scan.marks.append(len(scan.stack)),
    "MEMOIZE": lambda scan: scan.memo.__setitem__(len(scan.memo), scan.stack[-1]),
    "EMPTY_TUPLE": _tuple(0),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda scan: scan.tuple_of(scan.to_mark()),
    "EMPTY_LIST": lambda scan: scan.container([]),
    "EMPTY_DICT": lambda scan: scan.container([]),
    "EMPTY_SET": lambda scan: scan.container([]),
    "LIST": lambda scan: scan.container(scan.to_mark()),
    "DICT": _dictionary,
    "FROZENSET": _frozen_set,
    "APPEND": _add_one,
    "APPENDS": lambda scan: scan.add(scan.to_mark()),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "ADDITEMS": _add_items,
    "STACK_GLOBAL": _replaced(2),
    "BINPERSID": _replaced(1),
    "REDUCE": lambda scan: scan.call([scan.pop()]),
    "NEWOBJ": lambda scan: scan.call([scan.pop()]),
    "NEWOBJ_EX": lambda scan: scan.call([scan.pop(), scan.pop()]),
    "BUILD": _Scan.build,
}


def check_pickle(content: bytes, at: int = 0, *, persistent: bool = False) -> int:
    """Go through a pickle without unpickling anything.

    Parameters
    ----------
    content : bytes
    at : int, default 0
        Where it begins.
    persistent : bool, default False
        It refers to things outside of it, as torch's do to their storages.

    Returns
    -------
    int
        Where it ends.

    Raises
    ------
    ValueError
        It is broken.
    pickle.UnpicklingError
        Unpickling it could take memory or time out of proportion to its size, or set attributes of what it did not make
        itself; the error names what it holds.
    """
    return _Scan(content, at, persistent=persistent).run()
