"""Archives and tensor files that attack their reader."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from typing import Any

import numpy as np

from tests.core.artifacts.federated_files import model, npz, tarred, zipped
from tests.core.artifacts.hostile_pickles import Reduces

EYE = np.eye(3, dtype=np.float32)
PAIRS = {"query_embeddings": EYE, "target_embeddings": EYE}


def npy(header: str, data: bytes = b"", *, version: int = 1) -> bytes:
    """Return an .npy with a header of our choosing."""
    width = "<H" if version == 1 else "<I"
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + struct.pack(width, len(header))
        + header.encode()
        + data
    )


def with_queries(raw: bytes) -> bytes:
    """Return an .npz of pairs whose queries are ``raw``."""
    return zipped({"query_embeddings.npy": raw, "target_embeddings.npy": npz_member(EYE)})


def npz_member(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def header(descr: str = "'<f4'", shape: str = "(3, 3)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def evil_objects(marker: str) -> Any:
    array = np.empty(3, object)
    array[:] = [Reduces(eval, f"open({marker!r}, 'w').close()")] * 3
    return array


def arrays(marker: str) -> dict[str, bytes]:
    """Return hostile .npz files."""
    objects = evil_objects(marker)
    code = f"open({marker!r}, 'w')"
    zeros = npz({"query_embeddings": np.zeros((2_500_000, 1), "f4")}, compressed=True)
    sound = npz(PAIRS)
    return {
        "npz, object ids": npz({**PAIRS, "ids": objects}),
        "npz, object queries": npz({**PAIRS, "query_embeddings": objects}),
        "npz, code in the header": with_queries(npy(f"{code}\n")),
        "npz, code in the shape": with_queries(npy(header(shape=f"({code},)"))),
        "npz, code in the dtype": with_queries(npy(header(descr=code))),
        "npz, huge shape": with_queries(npy(header(shape=f"({2**62}, {2**62})"), bytes(36))),
        "npz, shape of 1e18 digits": with_queries(npy(header(shape="(" + "9" * 9000 + ",)"))),
        "npz, shape overflows to fit": with_queries(npy(header(shape=f"({2**62}, 4)"), b"")),
        "npz, negative shape": with_queries(npy(header(shape="(-3, 3)"), bytes(36))),
        "npz, deep header": with_queries(npy("(" * 15_000)),
        "npz, huge header": with_queries(
            npy("x" * 100, version=2).replace(b"d\0\0\0", b"\xff" * 4)
        ),
        "npz, record dtype": with_queries(npy(header(descr="[('a', '<f4')]"), bytes(36))),
        "npz, dates": with_queries(npy(header(descr="'<M8[s]'"), bytes(72))),
        "npz, zero width text": with_queries(npy(header(descr="'<U0'"), b"")),
        "npz, bomb": zeros,
        "npz, member is a pickle": with_queries(pickle.dumps(Reduces(exec, code))),
        "npz, truncated": sound[: len(sound) // 2],
        "npz, tail missing": sound[:-30],
        "npy alone, objects": npz_member_pickled(objects),
    }


SKEW = np.array([[[0, 1, 0], [-1, 0, 2], [0, -2, 0]]], np.float32)


def caches(marker: str) -> dict[str, bytes]:
    """Return hostile files of bivectors and of targets."""
    objects = evil_objects(marker)
    b, t = {"bivectors": SKEW}, {"targets": EYE}

    def raw(name: str, member: bytes) -> bytes:
        return zipped({f"{name}.npy": member})

    def own(told: str, tensors: dict[str, Any], data: bytes) -> bytes:
        return tensor_file({"__metadata__": {"manifest": told}, **tensors}, data)

    bivector = {"bivectors": entry(shape=(1, 3, 3))}
    return {
        "cache, object bivectors": npz({"bivectors": objects}),
        "cache, object targets": npz({"targets": objects}),
        "cache, object ids": npz({**b, "cluster_ids": objects}),
        "cache, object fingerprint": npz({**t, "fingerprint": objects}),
        "cache, object settings": npz({**t, "settings": objects}),
        "cache, code in the header": raw("targets", npy(f"open({marker!r}, 'w')\n")),
        "cache, a pickle": raw("B", pickle.dumps(Reduces(exec, f"open({marker!r}, 'w')"))),
        "cache, huge shape": raw("targets", npy(header(shape=f"({2**62}, {2**62})"), bytes(36))),
        "cache, rows that are not there": raw("targets", npy(header(shape="(9, 3)"), bytes(36))),
        "cache, bytes after": raw("targets", npy(header(), bytes(40))),
        "cache, too many dimensions": raw(
            "logs", npy(header(shape="(1, 20000, 20000)"), bytes(100))
        ),
        "cache, bomb": npz({"targets": np.ones((2_500_000, 2), "f4")}, compressed=True),
        "cache, both": npz({**b, **t}),
        "cache, two names": npz({**t, "teacher_targets": EYE}),
        "cache, infinite": npz({"bivectors": np.where(SKEW > 0, np.float32(np.inf), SKEW)}),
        "cache, 1e30": npz({"bivectors": SKEW * np.float32(1e30)}),
        "cache, not skew": npz({"bivectors": np.abs(SKEW)}),
        "cache, not square": npz({"bivectors": SKEW[:, :2]}),
        "cache, of half floats": npz({"bivectors": SKEW.astype("f2")}),
        "cache, NaN targets": npz({"targets": np.where(EYE > 0, np.float32(np.nan), EYE)}),
        "cache, no targets": npz({"targets": EYE[:0]}),
        "cache, digests of other width": npz({**t, "query_digests": np.zeros((3, 8), "u1")}),
        "cache, too few ids": npz({**b, "cluster_ids": np.array(["a", "b"])}),
        "cache, control characters": npz({**b, "cluster_ids": np.array(["a\x1b[2J"])}),
        "cache, fingerprint is a path": npz({**t, "fingerprint": np.array("../../etc/passwd")}),
        "cache, settings are a list": npz({**t, "settings": np.array("[1]")}),
        "cache, settings too deep": npz({**t, "settings": np.array('{"a":' + "[" * 60_000)}),
        "cache, settings infinite": npz({**t, "settings": np.array('{"a": 1e999}')}),
        "cache, settings NaN": npz({**t, "settings": np.array('{"a": NaN}')}),
        "cache, truncated": npz(t)[:-30],
        "cache, own without a tensor": own(
            '{"format":"targets_cache"}', {"x": entry()}, EYE.tobytes()
        ),
        "cache, own and not skew": own(
            '{"format":"bivectors_cache"}', bivector, np.abs(SKEW).tobytes()
        ),
        "cache, own claims a list": own(
            '{"format":"bivectors_cache","settings":[1]}', bivector, SKEW.tobytes()
        ),
        "cache, own claims a number": own(
            '{"format":"bivectors_cache","fingerprint":3}', bivector, SKEW.tobytes()
        ),
    }


def npz_member_pickled(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def zip_entry(name: str = "a.txt", *, mode: int = 0, method: int = 0, flags: int = 0) -> bytes:
    """Return the sound model's zip with one odd member more."""
    out = io.BytesIO(zipped(model().files()))
    with zipfile.ZipFile(out, "a") as archive:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        info.external_attr = mode << 16
        archive.writestr(info, b"/etc/passwd", compress_type=method)
    data = bytearray(out.getvalue())
    if flags:
        data[data.rindex(b"PK\x01\x02") + 8] |= flags
    return bytes(data)


def zips(marker: str) -> dict[str, bytes]:
    """Return hostile .zip files."""
    files = model().files()
    # The writer warns of a name used twice, so it is renamed afterwards.
    twice = zip_entry("toy.PKL").replace(b"toy.PKL", b"toy.pkl")
    lying = bytearray(zipped({"toy.pkl": bytes(7_000_000), **model().files(name="b")}))
    at = lying.index(b"PK\x01\x02")
    lying[at + 24 : at + 28] = struct.pack("<I", 10)
    return {
        "zip, parent": zip_entry("../" * 8 + marker.lstrip("/")),
        "zip, parent inside": zip_entry("toy/../../x"),
        "zip, absolute": zip_entry(marker),
        "zip, backslash": zip_entry("..\\..\\x"),
        "zip, drive": zip_entry("C:/x"),
        "zip, control character": zip_entry("a\nb"),
        "zip, long name": zip_entry("a" * 5000),
        "zip, deep name": zip_entry("a/" * 100 + "b"),
        "zip, link": zip_entry("toy/link.npz", mode=0o120777),
        "zip, device": zip_entry("toy/device.npz", mode=0o020666),
        "zip, encrypted": zip_entry(flags=1),
        "zip, bzip2": zip_entry(method=zipfile.ZIP_BZIP2),
        "zip, lzma": zip_entry(method=zipfile.ZIP_LZMA),
        "zip, name twice": twice,
        "zip, bomb": zipped({**files, "toy/zeros.npz": bytes(10_000_000)}),
        "zip, size lies": bytes(lying),
        "zip, ten thousand members": zipped({f"{i}": b"" for i in range(10_100)}),
        "zip, truncated": zipped(files)[:-100],
        "zip, nested bomb": zipped({**files, "toy/routing_data.npz": arrays(marker)["npz, bomb"]}),
        "zip, objects in a cluster": zipped(
            {**files, "toy/cluster_1.npz": npz({"W_stack": evil_objects(marker)})}
        ),
        "zip, empty": zipped({}),
        "torch checkpoint": zipped(
            {
                "archive/data.pkl": pickle.dumps(Reduces(exec, f"open({marker!r}, 'w')")),
                "archive/version": b"3",
                "archive/data/0": b"1234",
            }
        ),
    }


def tar_entry(name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", **pax: str) -> bytes:
    """Return the sound model's tar with one odd member first."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.pax_headers = kind, link, pax
        archive.addfile(info)
        for member, data in model().files().items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def huge_pax() -> bytes:
    """Return a tar whose extended header claims 1 GiB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    return gzip.compress(info.tobuf() + bytes(2048))


def tars(marker: str) -> dict[str, bytes]:
    """Return hostile .tar and .tar.gz files."""
    sound = tarred(model().files())
    broken = bytearray(sound)
    broken[-6] ^= 0xFF
    long_chain = tarfile.TarInfo("x")
    long_chain.type = tarfile.GNUTYPE_LONGNAME
    return {
        "tar, parent": tar_entry("../" * 8 + marker.lstrip("/")),
        "tar, absolute": tar_entry(marker),
        "tar, symlink": tar_entry("toy/link.npz", tarfile.SYMTYPE, link="/etc/passwd"),
        "tar, symlink then through it": tar_entry("toy", tarfile.SYMTYPE, link="/tmp"),
        "tar, hard link": tar_entry("toy/link.npz", tarfile.LNKTYPE, link="/etc/passwd"),
        "tar, pipe": tar_entry("toy/pipe", tarfile.FIFOTYPE),
        "tar, device": tar_entry("toy/device", tarfile.CHRTYPE),
        "tar, sparse": tar_entry("toy/sparse", tarfile.GNUTYPE_SPARSE),
        "tar, pax parent": tar_entry("x", path="../../x"),
        "tar, pax negative size": tar_entry("x", size="-1024"),
        "tar, pax huge size": tar_entry("x", size=str(1 << 62)),
        "tar, pax sparse": tar_entry("x", **{"GNU.sparse.map": "0,9999999999"}),
        "tar, huge header": huge_pax(),
        "tar, header chain": gzip.compress(long_chain.tobuf() * 3000 + bytes(2048)),
        "tar, name twice": tar_entry("toy.pkl"),
        "tar, bomb": tarred({**model().files(), "toy/zeros": bytes(10_000_000)}),
        "tar, many members": tarred({f"{i}": b"" for i in range(10_100)}),
        "tar, truncated": sound[: len(sound) // 2],
        "tar, checksum": bytes(broken),
        "gzip of nothing": gzip.compress(b""),
        "gzip of text": gzip.compress(b"hello " * 200),
        "gzip, truncated": b"\x1f\x8b\x08",
    }


def tensor_file(header_value: Any, data: bytes = b"") -> bytes:
    """Return a .safetensors with a header of our choosing."""
    raw = header_value if isinstance(header_value, bytes) else json.dumps(header_value).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str = "F32", shape: Any = (3, 3), span: Any = (0, 36)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def tensors(marker: str) -> dict[str, bytes]:
    """Return hostile .safetensors files."""
    q, t = "query_embeddings", "target_embeddings"
    two = {q: entry(), t: entry(span=(36, 72))}
    body = EYE.tobytes() * 2
    text = {**two, "ids": entry("U8", [6], (72, 78))}
    offsets = np.array([0, 2, 99, 6]).tobytes()
    return {
        "tensors, header of 2**40": struct.pack("<Q", 1 << 40) + b'{"a":1}' + bytes(200),
        "tensors, header of 100 MB": struct.pack("<Q", 100_000_000) + b'{"a":1}' + bytes(200),
        "tensors, deep json": tensor_file(b'{"a":' + b"[" * 200_000),
        "tensors, deep manifest": tensor_file(
            {"__metadata__": {"manifest": "[" * 200_000}, **two}, body
        ),
        "tensors, manifest NaN": tensor_file(
            {"__metadata__": {"manifest": '{"format":"federated_model","temperature":NaN}'}, **two},
            body,
        ),
        "tensors, manifest is a list": tensor_file(
            {"__metadata__": {"manifest": "[]"}, **two}, body
        ),
        "tensors, not json": tensor_file(b"{" + b"x" * 50),
        "tensors, truncated": tensor_file(two, body)[:-10],
        "tensors, bytes after": tensor_file(two, body + b"PK\x03\x04evil"),
        "tensors, overlap": tensor_file({q: entry(), t: entry(span=(0, 36))}, body),
        "tensors, huge shape": tensor_file({q: entry(shape=(2**62, 2**62)), t: entry()}, body),
        "tensors, negative shape": tensor_file({**two, q: entry(shape=(-3, -3))}, body),
        "tensors, bfloat16": tensor_file({**two, q: entry("BF16", (3, 6))}, body),
        "tensors, shape is text": tensor_file({**two, q: entry(shape="33")}, body),
        "tensors, name is a path": tensor_file({**two, marker: entry("U8", [0], (72, 72))}, body),
        "tensors, text bounds": tensor_file(
            {**text, "ids_offsets": entry("I64", [4], (78, 110))}, body + b"abcdef" + offsets
        ),
        "tensors, text not UTF-8": tensor_file(
            {**text, "ids_offsets": entry("I64", [4], (78, 110))},
            body + b"\xff" * 6 + np.array([0, 2, 4, 6]).tobytes(),
        ),
        "tensors, model without parts": tensor_file(
            {"__metadata__": {"manifest": '{"format":"federated_model"}'}, **two}, body
        ),
        "tensors, foreign": tensor_file({"weight": entry()}, EYE.tobytes()),
    }


def texts(marker: str) -> dict[str, bytes]:
    """Return hostile prompts."""
    line = b'{"text": "x"}\n'
    told = {"format": "prompts", "version": 1}
    return {
        "prompts, too deep": b'{"text": ' + b"[" * 200_000,
        "prompts, no text": b'{"id": "x"}\n',
        "prompts, a list": line + b'["x"]\n',
        "prompts, number of a million digits": b'{"text": "x", "id": ' + b"9" * 10**6 + b"}",
        "prompts, code": line + f"__import__('os').system('touch {marker}')\n".encode(),
        "prompts, half a character": b'{"text": "\\ud800"}\n',
        "prompts, escapes": b'{"text": "\\u001b[2J"}\n',
        "prompts, not UTF-8": b'{"text": "\xff"}\n',
        "prompts, endless line": b'{"text": "' + b"x" * (5 << 20) + b'"}\n',
        "prompts, id twice": b'{"text": "x", "id": 1}\n' * 2,
        "prompts, key twice": b'{"text": "x", "text": "y"}\n',
        "prompts, path as language": b'{"text": "x", "language": "../../etc"}\n',
        "prompts, table without its cells": b"id\ttext\n1\n",
        "prompts, table of one line": b"id\ttext\n",
        "prompts, UTF-16": "id\ttext\n1\tx\n".encode("utf-16"),
        "prompts, own without a tensor": tensor_file(
            {"__metadata__": {"manifest": json.dumps(told)}, "texts": entry()}, EYE.tobytes()
        ),
    }


def others(marker: str) -> dict[str, bytes]:
    """Return polyglots and files that are something else."""
    evil = pickle.dumps(Reduces(exec, f"open({marker!r}, 'w')"))
    return {
        "pickle with a zip behind it": evil + npz(PAIRS),
        "shell script with a zip behind it": f"#!/bin/sh\ntouch {marker}\n".encode() + npz(PAIRS),
        "bare pickle": evil,
        "bare pickle, protocol 0": pickle.dumps({"a": 1}, 0),
        "python source": f"open({marker!r}, 'w')\n".encode(),
        "yaml": f"!!python/object/apply:os.system ['touch {marker}']\n".encode(),
        "json": b'{"query_embeddings": [[1, 2]]}',
        "elf": b"\x7fELF" + bytes(200),
        "xz": b"\xfd7zXZ\x00" + bytes(100),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "empty": b"",
        "one byte": b"\x80",
        "zip magic only": b"PK",
        "only zeros": bytes(1000),
    }
