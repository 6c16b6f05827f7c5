"""Reads a pickle of plain data. It interprets the opcodes itself: nothing is imported or called.

A pickle is a program, and Python's own loader is never used on a foreign one. This machine knows
only the opcodes that build containers, scalars, text, numpy arrays and paths (given as text), and
names only what the file's dialect lists.
"""

import io
import pickletools
import struct
from collections.abc import Callable
from typing import Any

from core.artifacts.importers.pickle_values import (
    PLAIN,
    Dialect,
    Dtype,
    Global,
    PendingArray,
    check_keys,
)
from core.artifacts.limits import Limits
from core.errors import DataInvalid, TooLarge

_MARK = object()
_DAMAGED = (ValueError, IndexError, KeyError, OverflowError, EOFError, struct.error)


def loads(data: bytes, *, limits: Limits, dialect: Dialect = PLAIN) -> Any:
    """Return the plain data a pickle describes; ``dialect`` says what else it may hold.

    Raises:
        DataInvalid: it names a forbidden global, uses an opcode plain data never needs, is
            truncated, refers to itself or nests too deep.
        TooLarge: too many bytes or opcodes.
    """
    if len(data) > limits.pickle_bytes:
        raise TooLarge(f"the pickle has {len(data)} bytes; the limit is {limits.pickle_bytes}")
    machine = _Machine(dialect)
    try:
        stream = io.BytesIO(data)
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            if count >= limits.pickle_opcodes:
                raise TooLarge(f"the pickle has more than {limits.pickle_opcodes} opcodes")
            machine.step(opcode.name, arg)
        if stream.read(1):
            raise DataInvalid("bytes follow the end of the pickle; one pickle a file")
    except _DAMAGED as error:
        raise DataInvalid(f"the pickle is truncated or damaged ({error})") from error
    return _Finish(limits.pickle_depth, dialect).value(machine.result(), 0)


class _Machine:
    """The stack, the memo and the opcodes that plain data needs."""

    def __init__(self, dialect: Dialect) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._dialect = dialect

    def step(self, name: str, arg: Any) -> None:
        """Do one opcode."""
        if name in _PUSH:
            if isinstance(arg, int) and arg.bit_length() > 4096:
                raise DataInvalid("the pickle holds a whole number of more than 4096 bits")
            self.stack.append(arg)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _MEMO:
            _MEMO[name](self, arg)
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif name == "GLOBAL":
            self.name(arg)
        elif name not in _SKIPPED:
            self.refuse(name)

    def refuse(self, name: str) -> None:
        """Raise DataInvalid for an opcode that nothing allowed needs."""
        raise DataInvalid(
            f"the pickle uses {name}, which plain data never needs; {self._dialect.allowed}"
        )

    def result(self) -> Any:
        """Return the one value left at the end."""
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise DataInvalid("the pickle is damaged: it does not end with one value")
        return self.stack[0]

    def pop(self) -> Any:
        """Take the top of the stack, which must be a value."""
        value = self.stack.pop()
        if value is _MARK:
            raise DataInvalid("the pickle is damaged: a mark where a value belongs")
        return value

    def drop(self) -> None:
        """Forget the top of the stack."""
        self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise DataInvalid("the pickle is damaged: a mark is missing")

    def drop_to_mark(self) -> None:
        """Forget everything above the last mark, and the mark."""
        self.pop_to_mark()

    def take(self, count: int) -> tuple[Any, ...]:
        """Take ``count`` values, the deepest first."""
        return tuple([self.pop() for _ in range(count)][::-1])

    def top(self, kind: type[Any]) -> Any:
        """Return the top of the stack, which must be exactly a ``kind``."""
        if type(self.stack[-1]) is not kind:
            raise DataInvalid(f"the pickle is damaged: no {kind.__name__} to fill")
        return self.stack[-1]

    def name(self, name: str) -> None:
        """Push a known global, or refuse it by name."""
        known = self._dialect
        if name in known.texts:
            self.stack.append(known.texts[name])
            return
        if name not in known.calls and name not in known.named_only:
            shown = name.replace(" ", ".")[:120]
            raise DataInvalid(f"the pickle asks for {shown!r}, which is forbidden; {known.allowed}")
        self.stack.append(Global(name))

    def name_from_stack(self) -> None:
        """Push the global whose module and name are on the stack."""
        module, name = self.take(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise DataInvalid("the pickle is damaged: a global without a name")
        self.name(f"{module} {name}")

    def reduce(self) -> None:
        """Build what a known global builds from plain arguments."""
        called, args = self.take(2)
        known = self._dialect
        if not isinstance(called, Global) or called.name not in known.calls:
            raise DataInvalid(f"the pickle calls a {type(called).__name__}; {known.allowed}")
        if not isinstance(args, tuple):
            raise DataInvalid("the pickle is damaged: a call without arguments")
        try:
            self.stack.append(known.calls[called.name](*args))
        except TypeError as error:
            raise DataInvalid(
                f"the pickle is damaged: {called.name} with {len(args)} arguments"
            ) from error

    def build(self) -> None:
        """Fill the array or dtype on top of the stack."""
        state = self.pop()
        filled = self.stack[-1]
        if isinstance(filled, PendingArray | Dtype):
            filled.build(state)
        elif not (self._dialect.skips_attributes and type(filled) is type(state) is dict):
            raise DataInvalid(
                f"the pickle sets the state of a {type(filled).__name__}; {self._dialect.allowed}"
            )

    def refer(self) -> None:
        """Replace a persistent id by the data it stands for."""
        if self._dialect.persistent is None:
            self.refuse("BINPERSID")
        else:
            self.stack.append(self._dialect.persistent(self.pop()))

    def append(self) -> None:
        """Put one item into the list below it."""
        item = self.pop()
        self.top(list).append(item)

    def appends(self) -> None:
        """Put everything above the mark into the list below it."""
        items = self.pop_to_mark()
        self.top(list).extend(items)

    def set_item(self) -> None:
        """Put one key and value into the dict below them."""
        self.fill(list(self.take(2)))

    def set_items(self) -> None:
        """Put every key and value above the mark into the dict below it."""
        self.fill(self.pop_to_mark())

    def fill(self, items: list[Any]) -> None:
        """Put keys and values, in turn, into the dict on top of the stack."""
        table = self.top(dict)
        if len(items) % 2:
            raise DataInvalid("the pickle is damaged: a key without a value")
        check_keys(items[::2])
        table.update(zip(items[::2], items[1::2], strict=True))

    def add_items(self) -> None:
        """Put everything above the mark into the set below it."""
        items = self.pop_to_mark()
        check_keys(items)
        self.top(set).update(items)

    def make_list(self) -> None:
        """Push a list of everything above the mark."""
        self.stack.append(self.pop_to_mark())

    def make_tuple(self) -> None:
        """Push a tuple of everything above the mark."""
        self.stack.append(tuple(self.pop_to_mark()))

    def make_dict(self) -> None:
        """Push a dict of everything above the mark."""
        items = self.pop_to_mark()
        self.stack.append({})
        self.fill(items)

    def make_frozenset(self) -> None:
        """Push a frozenset of everything above the mark."""
        items = self.pop_to_mark()
        check_keys(items)
        self.stack.append(frozenset(items))

    def tuple_1(self) -> None:
        """Push a tuple of the top value."""
        self.stack.append(self.take(1))

    def tuple_2(self) -> None:
        """Push a tuple of the top two."""
        self.stack.append(self.take(2))

    def tuple_3(self) -> None:
        """Push a tuple of the top three."""
        self.stack.append(self.take(3))

    def remember(self, index: int) -> None:
        """Note the top of the stack under a number; the memo is a dict, so a huge one is cheap."""
        if self.stack[-1] is _MARK:
            raise DataInvalid("the pickle is damaged: a mark cannot be remembered")
        self.memo[index] = self.stack[-1]

    def remember_next(self) -> None:
        """Note the top of the stack under the next number."""
        self.remember(len(self.memo))

    def recall(self, index: int) -> None:
        """Push what was noted under a number."""
        if index not in self.memo:
            raise DataInvalid("the pickle is damaged: it recalls what it never stored")
        self.stack.append(self.memo[index])


_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXT = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_PUSH = frozenset((*_NUMBERS, *_TEXT, *_BYTES, "BYTEARRAY8"))
_SKIPPED = frozenset(("PROTO", "FRAME", "STOP"))
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_MEMO: dict[str, Callable[[_Machine, int], None]] = {
    "PUT": _Machine.remember,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "GET": _Machine.recall,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
}
_ACTIONS: dict[str, Callable[[_Machine], None]] = {
    "MEMOIZE": _Machine.remember_next,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_to_mark,
    "LIST": _Machine.make_list,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": _Machine.tuple_1,
    "TUPLE2": _Machine.tuple_2,
    "TUPLE3": _Machine.tuple_3,
    "DICT": _Machine.make_dict,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "FROZENSET": _Machine.make_frozenset,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.refer,
}
"""Every other opcode (text persistent ids, extensions, instances, buffers) is refused."""


class _Finish:
    """Swaps the arrays in, copies each container once, and bounds the nesting."""

    def __init__(self, depth: int, dialect: Dialect) -> None:
        self._depth = depth
        self._allowed = dialect.allowed
        self._done: dict[int, Any] = {}

    def value(self, value: Any, depth: int) -> Any:
        """Return ``value`` with real arrays; shared containers stay shared."""
        if isinstance(value, PendingArray):
            return value.finished()
        if isinstance(value, Global | Dtype):
            raise DataInvalid(f"the pickle holds a class or a dtype as a value; {self._allowed}")
        if not isinstance(value, list | tuple | dict):
            return value
        if depth >= self._depth:
            raise DataInvalid(f"the pickle nests deeper than {self._depth} levels")
        if id(value) not in self._done:
            # A value that refers to itself runs into the depth limit.
            self._done[id(value)] = self._container(value, depth + 1)
        return self._done[id(value)]

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return {key: self.value(item, depth) for key, item in value.items()}
        return type(value)(self.value(item, depth) for item in value)
