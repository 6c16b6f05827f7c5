"""Pickles that attack their reader. Those in ``armed`` make a marker file when really loaded."""

import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

P2 = b"\x80\x02"
P4 = b"\x80\x04"


def text(value: str) -> bytes:
    """Return the opcodes that push a text."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(name: str, *args: bytes) -> bytes:
    """Return the opcodes that call ``module name`` with pushed arguments."""
    module, attribute = name.split(" ")
    return b"c" + f"{module}\n{attribute}\n".encode() + b"(" + b"".join(args) + b"tR"


class Reduces:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def armed(marker: str) -> dict[str, bytes]:
    """Return pickles that create ``marker`` where Python's own loader reads them."""
    shell, code = text(f"touch {marker}"), text(f"open({marker!r}, 'w').close()")
    expression = text(f"__import__('os').system('touch {marker}')")
    inner = pickle.dumps(Reduces(eval, f"__import__('os').system('touch {marker}')"), 2)
    pushed = b"B" + struct.pack("<I", len(inner)) + inner
    raw_shell = f"touch {marker}".encode()
    evil_array = np.empty(1, object)
    evil_array[0] = Reduces(eval, f"open({marker!r}, 'w').close()")
    getter = call("builtins getattr", call("builtins __import__", text("os")), text("system"))
    return {
        "os.system, protocol 0": b"cos\nsystem\n(S'" + raw_shell + b"'\ntR.",
        "posix.system": P2 + call("posix system", shell) + b".",
        "stack global": P4 + text("posix") + text("system") + b"\x93(" + shell + b"tR.",
        "os.popen": P2 + call("os popen", shell) + b".",
        "os.posix_spawnp": P2
        + call("os spawnlp", b"K\x00", text("touch"), text("touch"), text(marker))
        + b".",
        "eval": P2 + call("builtins eval", expression) + b".",
        "exec": P2 + call("builtins exec", code) + b".",
        "python 2 names": P2 + call("__builtin__ eval", expression) + b".",
        "open": P2 + call("builtins open", text(marker), text("w")) + b".",
        "io.open": P2 + call("_io open", text(marker), text("w")) + b".",
        "getattr chain": P2 + getter + b"(" + shell + b"tR.",
        "subprocess": P2
        + call("subprocess check_output", b"(", text("touch"), text(marker), b"l")
        + b".",
        "instance": b"(S'" + raw_shell + b"'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'" + raw_shell + b"'\no.",
        "nested pickle": P2 + call("pickle loads", pushed) + b".",
        "nested pickle, private name": P2 + call("_pickle loads", pushed) + b".",
        "partial": P2 + call("functools partial", b"cos\nsystem\n", shell) + b")R.",
        "methodcaller": P2
        + call("operator methodcaller", text("system"), shell)
        + b"("
        + call("builtins __import__", text("os"))
        + b"tR.",
        "run code": P2
        + call("code InteractiveInterpreter")
        + b"0"
        + call("builtins exec", code)
        + b".",
        "runpy": P2
        + b"("
        + call("builtins exec", code)
        + call("runpy run_module", text("this"))
        + b"t.",
        "numpy object array": pickle.dumps(evil_array, 4),
        "reduce in a dict": pickle.dumps({"temperature": Reduces(exec, f"open({marker!r},'w')")}),
        "reduce in a list, protocol 0": pickle.dumps([Reduces(exec, f"open({marker!r},'w')")], 0),
        "dotted path": P4
        + text("pathlib")
        + text("Path.touch")
        + b"\x93("
        + call("pathlib Path", text(marker))
        + b"tR.",
        "dotted globals": P4
        + call("builtins exec", code)
        + b"0"
        + text("numpy")
        + text("dtype.__class__")
        + b"\x93.",
        "timeit": P2
        + call("timeit timeit", code, text("pass"), b"cbuiltins\nint\n", b"K\x01")
        + b".",
        "cProfile": P2 + call("cProfile run", code) + b".",
        "map, lazily": P2
        + call("builtins list", call("builtins map", b"cos\nsystem\n", b"](" + shell + b"e"))
        + b".",
        "two pickles": pickle.dumps({}) + P2 + call("posix system", shell) + b".",
    }


def quiet(marker: str) -> dict[str, bytes]:
    """Return pickles that attack in other ways: memory, time, the stack, or by hidden doors."""
    array = pickle.dumps(np.zeros(3, np.float32), 2)
    laughs = b"]q\x00" + b"".join(b"0](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(20))
    twins = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    return {
        "new object": P2 + b"csubprocess\nPopen\n(]" + b"(" + text("touch") + text(marker) + b"et"
        b"\x81.",
        "new object, keywords": P4
        + text("subprocess")
        + text("Popen")
        + b"\x93)}"
        + text("args")
        + b"]("
        + text("touch")
        + text(marker)
        + b"es\x92.",
        "persistent id": b"Pos.system\n.",
        "binary persistent id": P2 + text(marker) + b"Q.",
        "extension 1": P2 + b"\x82\x01.",
        "extension 2": P2 + b"\x83\x01\x00.",
        "extension 4": P2 + b"\x84\x01\x00\x00\x00.",
        "extension registry": P2
        + call("copyreg add_extension", text("os"), text("system"), b"K\x01")
        + b".",
        "reconstructor": P2
        + call("copyreg _reconstructor", b"csubprocess\nPopen\n", b"cbuiltins\nobject\n", b"N")
        + b".",
        "next buffer": b"\x80\x05\x97.",
        "read-only buffer": b"\x80\x05C\x01a\x98.",
        "dup": P2 + b"K\x012.",
        "build on a dict": P2 + b"}}" + text("__class__") + b"K\x01sb.",
        "build on a global": P2 + b"cnumpy\nndarray\n}" + text("__setstate__") + b"K\x01sb.",
        "slot state": P2 + b"cnumpy\ndtype\n(N}" + text("x") + b"K\x01stb.",
        "numpy subclass": array.replace(b"cnumpy\nndarray\n", b"cnumpy\nmatrix\n"),
        "numpy runstring": P2
        + call("numpy.testing._private.utils runstring", text("1"), b"}")
        + b".",
        "numpy load": P2 + call("numpy load", text(marker)) + b".",
        "dtype of code": P2 + call("numpy dtype", text("O8"), b"\x89", b"\x88") + b".",
        "array huge": array.replace(b"K\x03\x85", b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"),
        "array negative": array.replace(b"K\x03\x85", b"J\xff\xff\xff\xff\x85"),
        "marshal": P2 + call("marshal loads", b"U\x01a") + b".",
        "import module": P2 + call("importlib import_module", text("this")) + b".",
        "codec": P2 + call("_codecs encode", text("a"), text("rot13")) + b".",
        "codec lookup": P2 + call("_codecs lookup", text("rot13")) + b".",
        "bytes of a number": P2 + call("builtins bytes", b"J\xff\xff\xff\x7f") + b".",
        "bytearray of a number": P2 + call("builtins bytearray", b"J\xff\xff\xff\x7f") + b".",
        "range": P2 + call("builtins list", call("builtins range", b"J\xff\xff\xff\x7f")) + b".",
        "laughs": P2 + laughs + b".",
        "laughs as a key": P2 + b"}" + twins + b"K\x01s.",
        "laughs in a set": P4 + b"\x8f(" + twins + b"\x90.",
        "deep lists": P2 + b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep tuples": P2 + b")" + b"\x85" * 100_000 + b".",
        "deep tuple as a key": P2 + b"})" + b"\x85" * 100_000 + b"K\x01s.",
        "refers to itself": P2 + b"]q\x00h\x00a.",
        "dict in itself": P2 + b"}q\x00" + text("a") + b"h\x00s.",
        "huge memo index": P2 + b"Nr\xff\xff\xff\xff.",
        "huge bytes": P4 + b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        "huge frame": P4 + b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
        "huge number": P2 + b"\x8b" + struct.pack("<i", 4_000_000) + b"\x7f" * 4_000_000 + b".",
        "huge decimal": b"L" + b"9" * 1_000_000 + b"L\n.",
        "too many opcodes": P2 + b"N0" * 400_000 + b"N.",
        "no stop": P2 + b"}",
        "empty stack": P2 + b".",
        "only a mark": P2 + b"(.",
        "mark as a value": P2 + b"](a.",
        "pop too much": P2 + b"000.",
        "unknown opcode": P2 + b"\xff.",
        "protocol 200": b"\x80\xc8N.",
        "a class as a value": P2 + b"cnumpy\nndarray\n.",
        "an array never filled": P2
        + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n)tR.",
        "call of a text": P2 + text("eval") + b")R.",
        "call without a tuple": P2 + b"cnumpy\ndtype\n]R.",
    }
