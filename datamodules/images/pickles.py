"""Arrays from untrusted pickles: no code in them runs, and large arrays are mapped, not read."""

import mmap
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from lightning_maml.datamodules.messages import first_five
from lightning_maml.errors import UserValueError

_LARGE = 1 << 12  # bytes; a string of this size or larger is left in the file


def read_pickle(file: Path) -> Any:
    """Read arrays, lists, dictionaries, strings and numbers, pickled by Python 2 or 3.

    Nothing that the pickle names is imported: stand-ins in this file do what numpy needs to
    describe an array, and everything else is refused. Raw arrays stay in the file, which is mapped
    copy-on-write: reading costs neither time nor memory until pixels are used. (Pickles of Python 3
    with protocol 2 or older hold arrays as text, which is decoded in memory.)

    Returns:
        What was pickled, with Python 2's byte strings as text.

    Raises:
        ValueError: If the file is cut short or damaged, or holds anything but arrays and
            containers.
    """
    with file.open("rb") as stream:
        try:
            return _unpickle(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
        except _Refused as error:
            raise UserValueError(
                f"Expected {file} to hold arrays and containers only but got {error}; it is not "
                "read, and nothing ran."
            ) from error
        except Exception as error:  # a damaged pickle raises nearly anything
            raise UserValueError(
                f"Expected {file} to be a whole pickle but it is cut short or damaged "
                f"({type(error).__name__}: {error}); download it again."
            ) from error


def read_entries(file: Path, *names: str) -> list[Any]:
    """Read a pickled dictionary, as :func:`read_pickle` does, and return some of its entries.

    Raises:
        ValueError: If the file is damaged, or holds no dictionary with these entries.
    """
    content = read_pickle(file)
    check_is_dictionary(str(file), content)
    if not set(names) <= set(content):
        raise UserValueError(
            f"Expected {file} to hold {' and '.join(map(repr, names))} but it holds "
            f"{first_five([*map(repr, content)]) or 'nothing'}."
        )
    return [content[name] for name in names]


def check_is_dictionary(what: str, value: Any) -> None:
    """Check that what was read is a dictionary.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, dict):
        got = type(value).__name__
        # no TypeError, as it is the file that is wrong
        raise UserValueError(f"Expected {what} to be a dictionary but got {got}.")


def _unpickle(mapped: mmap.mmap) -> Any:
    # bytes: strings of Python 2 are raw data
    return _plain(_Unpickler(_Mapped(mapped), encoding="bytes").load(), {})


class _Refused(pickle.UnpicklingError):
    pass


class _Mapped:
    """A file that is read in copies, except for large pieces, which are views of it."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped, self._view = mapped, memoryview(mapped)

    def read(self, size: int) -> Any:  # bytes, or a view
        start = self._mapped.tell()
        if size < _LARGE:
            return self._mapped.read(size)
        self._mapped.seek(min(start + size, len(self._view)))
        return self._view[start : start + size]

    def readline(self) -> bytes:
        return self._mapped.readline()


def _list_of_last(unpickler: "_Unpickler", size: int) -> None:
    unpickler.stack[-size:] = [unpickler.stack[-size:]]


# the Python version: the C version copies large strings of Python 2 twice
class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return this file's stand-in for the name."""
        if (module, name) not in _STAND_INS:
            raise _Refused(f"{module}.{name}")
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Refuse what lies outside the pickle."""
        raise _Refused("a persistent object")

    def load_build(self) -> None:
        """Set the state of a stand-in, and of nothing else."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Dtype, _Array)):
            raise _Refused(f"a state for {type(self.stack[-1]).__name__}")
        self.stack[-1].set_state(state)

    dispatch[pickle.BUILD[0]] = load_build

    # its own loader allocates before it looks for the bytes
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]

    # Tuples become lists, which cannot be keys: to hash a tuple that holds another twice, which
    # holds another twice, ..., takes for ever.
    dispatch[pickle.EMPTY_TUPLE[0]] = dispatch[pickle.EMPTY_LIST[0]]
    dispatch[pickle.TUPLE[0]] = dispatch[pickle.LIST[0]]
    dispatch[pickle.TUPLE1[0]] = partial(_list_of_last, size=1)
    dispatch[pickle.TUPLE2[0]] = partial(_list_of_last, size=2)
    dispatch[pickle.TUPLE3[0]] = partial(_list_of_last, size=3)


class _Dtype:
    def __init__(self, code: Any, *_: Any) -> None:
        self._code, self._order = _text(code), "|"

    def set_state(self, state: list[Any]) -> None:
        self._order = _text(state[1])

    def numpy(self) -> np.dtype[Any]:
        if self._code.startswith("O"):
            raise _Refused("an array of objects, such as images of several sizes")
        if not re.fullmatch("[biuf][1248]", self._code) or self._order not in "<>|=":
            raise _Refused(f"an array of type {self._code}")
        return np.dtype(self._order.replace("|", "=") + self._code)


class _Array:
    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray = np.empty(0)

    def set_state(self, state: list[Any]) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _from_buffer(data, dtype, shape, "F" if fortran else "C").array


def _from_buffer(data: Any, dtype: _Dtype, shape: Any, order: Any) -> _Array:
    result = _Array()
    c_or_f: Literal["C", "F"] = "F" if _text(order) == "F" else "C"
    result.array = np.frombuffer(data, dtype.numpy()).reshape(tuple(shape), order=c_or_f)
    return result


def _scalar(dtype: _Dtype, data: bytes) -> int | float:
    number: int | float = np.frombuffer(data, dtype.numpy())[0].item()
    return number


def _encode(text: str, encoding: str) -> bytearray:
    return bytearray(text, {"latin1": "latin1", "latin-1": "latin1"}[encoding])


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):
    _STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _Array
    _STAND_INS[f"{_core}.multiarray", "scalar"] = _scalar
    _STAND_INS[f"{_core}.numeric", "_frombuffer"] = _from_buffer


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value, "latin1")


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Return the value with arrays in place of their stand-ins and text in place of bytes.

    ``done`` holds what was converted, by id.
    """
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {_plain(key, done): _plain(item, done) for key, item in value.items()}
        elif isinstance(value, list):
            done[id(value)] = [_plain(item, done) for item in value]
        elif isinstance(value, _Array):
            done[id(value)] = value.array
        elif isinstance(value, (str, bytes, bytearray, memoryview)):
            done[id(value)] = _text(value)
        elif value is None or isinstance(value, (bool, int, float)):
            return value
        else:
            raise _Refused(type(value).__name__)
    return done[id(value)]


def whole_numbers(what: str, value: Any) -> np.ndarray:
    """Return a list or array of whole numbers as an array.

    Args:
        what: What it is, for the message.
        value: What was read.

    Raises:
        ValueError: If it is anything else.
    """
    # nested lists are refused before numpy reads them: they may hold one item 2^30 times
    is_list = isinstance(value, list) and all(isinstance(item, int) for item in value)
    numbers = np.asarray(value) if is_list or isinstance(value, np.ndarray) else np.empty((0, 0))
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise UserValueError(
            f"Expected {what} to hold lists of whole numbers but got {type(value).__name__} of "
            "another kind."
        )
    return numbers.astype(np.int64)
