"""Pickles as Python 2's cPickle wrote them in protocol 2: with byte strings and numpy's names of
that time."""

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np


def write_python2_pickle(file: Path, content: Any) -> None:
    """Write dictionaries, lists, strings, whole numbers and arrays."""
    file.write_bytes(pickle.PROTO + b"\x02" + _encoded(content) + pickle.STOP)


def _encoded(value: Any) -> bytes:
    if isinstance(value, dict):
        items = b"".join(_encoded(part) for pair in value.items() for part in pair)
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, list):
        return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(_encoded, value)) + pickle.APPENDS
    if isinstance(value, str):
        short = len(value) < 256
        code, size = (pickle.SHORT_BINSTRING, "B") if short else (pickle.BINSTRING, "<i")
        return code + struct.pack(size, len(value)) + value.encode()
    if isinstance(value, int):
        return pickle.BININT + struct.pack("<i", value)
    return _array(value)


def _array(array: np.ndarray) -> bytes:
    empty = _call(
        "numpy.core.multiarray",
        "_reconstruct",
        b"cnumpy\nndarray\n",
        _tuple(_encoded(0)),
        _encoded("b"),
    )
    state = [_encoded(1), _tuple(*map(_encoded, array.shape)), _dtype(array.dtype), pickle.NEWFALSE]
    data = pickle.BINSTRING + struct.pack("<i", array.nbytes) + array.tobytes()
    return empty + _tuple(*state, data) + pickle.BUILD


def _dtype(dtype: np.dtype) -> bytes:
    made = _call("numpy", "dtype", _encoded(dtype.str[1:]), _encoded(0), _encoded(1))
    state = [_encoded(3), _encoded(dtype.str[0]), pickle.NONE * 3, _encoded(-1) * 2, _encoded(0)]
    return made + _tuple(*state) + pickle.BUILD


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + _tuple(*arguments) + pickle.REDUCE


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
