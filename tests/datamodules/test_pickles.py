"""Pickles of arrays are read, Python 2's too, and no code in a pickle runs."""

import collections
import os
import pickle
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from helpers import another_process
from helpers.python2_pickles import write_python2_pickle
from lightning_maml.datamodules.images.pickles import read_pickle

pytestmark = pytest.mark.cpu_only  # files

IMAGES = np.random.RandomState(0).randint(0, 256, (40, 84, 84, 3)).astype(np.uint8)


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def python2_pickle(array: np.ndarray, labels: list[int]) -> bytes:
    with TemporaryDirectory() as folder:
        write_python2_pickle(Path(folder) / "a.pickle", {"data": array, "labels": labels})
        return (Path(folder) / "a.pickle").read_bytes()


def test_the_pickle_that_these_tests_write_for_python_2_is_valid() -> None:
    read = pickle.loads(python2_pickle(IMAGES, [3, 1, 2]), encoding="latin1")
    assert np.array_equal(read["data"], IMAGES)
    assert read["labels"] == [3, 1, 2]


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    read = read_pickle(write(tmp_path / "a.pickle", python2_pickle(IMAGES, [3, 1, 2])))
    assert np.array_equal(read["data"], IMAGES)
    assert read["labels"] == [3, 1, 2]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "images", [IMAGES, np.asfortranarray(IMAGES), IMAGES[::2, ::-1]], ids=["plain", "F", "strided"]
)
def test_every_protocol_of_python_3_is_read(
    tmp_path: Path, protocol: int, images: np.ndarray
) -> None:
    content = {
        "image_data": images,
        "class_dict": collections.OrderedDict(
            {
                "n01532829": [0, 2],
                "n02091244": np.arange(3),
                "n03476684": (np.int64(5), np.uint8(6)),
            }
        ),
        "big-endian": np.arange(5, dtype=">i2"),
        "floats": np.linspace(0, 1, 7, dtype=np.float32),
    }
    read = read_pickle(write(tmp_path / "a.pkl", pickle.dumps(content, protocol=protocol)))
    assert np.array_equal(read["image_data"], images)
    assert list(read["class_dict"]) == list(content["class_dict"])
    assert read["class_dict"]["n01532829"] == [0, 2]
    assert read["class_dict"]["n02091244"].tolist() == [0, 1, 2]
    assert read["class_dict"]["n03476684"] == [5, 6]
    assert read["big-endian"].tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(read["floats"], content["floats"])


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments) -> None:
        self._call = function, arguments

    def __reduce__(self):
        return self._call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "function",
    [os.system, exec, eval, print, subprocess.run, getattr, np.load, __import__, list, bytearray],
)
def test_no_function_that_a_pickle_names_is_called(tmp_path: Path, function, protocol: int) -> None:
    proof = tmp_path / "proof"
    code = f"open({str(proof)!r}, 'w').close()"
    argument = f"touch {proof}" if function in (os.system, subprocess.run) else code
    for content in ({"data": IMAGES, "labels": Call(function, argument)}, Call(function, argument)):
        file = write(tmp_path / "a.pkl", pickle.dumps(content, protocol=protocol))
        with pytest.raises(
            ValueError,
            match=r"a.pkl to hold arrays and containers only but got [\w.]+; it is not read, and "
            "nothing ran",
        ):
            read_pickle(file)
        assert not proof.exists()


def test_the_pickle_module_would_run_the_code_of_a_pickle(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Call(exec, f"open({str(tmp_path / 'proof')!r}, 'w').close()")))
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nndarray\n}(U\x08__init__cnumpy\ndtype\nub.",  # a new method for a class of ours
        # other defaults for a function of ours
        b"cnumpy.core.multiarray\nscalar\nN}(U\x0c__defaults__)u\x86b.",
        b"ccollections\nOrderedDict\n)R}(U\x01aK\x01ub.",
    ],
    ids=["class", "function", "instance"],
)
def test_state_is_set_of_arrays_and_their_types_only(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="arrays and containers only but got a state for"):
        read_pickle(write(tmp_path / "a.pkl", content))


def test_numpy_itself_sets_up_no_array_of_a_pickle(tmp_path: Path) -> None:
    """An array that claims to hold numbers but holds addresses would make numpy follow them."""
    lying = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
    lying += b"(I1\n(I1\ntcnumpy\ndtype\n(U\x02O8I0\nI1\ntR"
    lying += b"(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\nU\x08AAAAAAAAtb."
    with pytest.raises(
        ValueError, match="only but got an array of objects, such as images of several sizes"
    ):
        read_pickle(write(tmp_path / "a.pkl", lying))


def test_images_of_several_sizes_are_named(tmp_path: Path) -> None:
    ragged = np.empty(2, object)
    ragged[:] = [np.zeros((84, 84, 3), np.uint8), np.zeros((84, 90, 3), np.uint8)]
    with pytest.raises(
        ValueError, match="only but got an array of objects, such as images of several sizes"
    ):
        read_pickle(write(tmp_path / "a.pkl", pickle.dumps({"data": ragged})))


@pytest.mark.parametrize("dtype", ["U5", "S5", "M8[s]", "c8", "f2,u1"])
def test_arrays_of_other_than_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match="arrays and containers only but got an array of type"):
        read_pickle(write(tmp_path / "a.pkl", pickle.dumps({"data": np.zeros(3, dtype)})))


@pytest.mark.parametrize("kept", [0, 1, 100, 20_000, 84 * 84 * 3 * 20, -1])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_is_cut_short_is_refused(tmp_path: Path, kept: int, protocol: int) -> None:
    whole = (
        python2_pickle(IMAGES, [1])
        if protocol == 2
        else pickle.dumps({"data": IMAGES}, protocol=protocol)
    )
    with pytest.raises(
        ValueError,
        match=r"a.pkl to be a whole pickle but it is cut short or damaged .*; download it again",
    ):
        read_pickle(write(tmp_path / "a.pkl", whole[:kept]))


def test_shared_lists_are_converted_once(tmp_path: Path) -> None:
    shared: list = []
    for _ in range(200):
        shared = [shared, shared]
    assert len(read_pickle(write(tmp_path / "a.pkl", pickle.dumps(shared)))) == 2


def test_persistent_objects_and_stand_ins_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="containers only but got a persistent object"):
        read_pickle(write(tmp_path / "a.pkl", b"Pelsewhere\n."))
    for name in ("ndarray", "dtype"):
        with pytest.raises(ValueError, match="containers only but got type"):
            read_pickle(write(tmp_path / "a.pkl", f"cnumpy\n{name}\n.".encode()))


def test_a_list_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_pickle(write(tmp_path / "a.pkl", pickle.dumps(loop)))


@pytest.mark.parametrize("form", ["python 2", "protocol 4", "protocol 3"])
def test_arrays_are_mapped_into_memory_and_not_read(tmp_path: Path, form: str) -> None:
    """Few images are read before the measurement, so that the code is in memory already."""
    images = np.ones((4000, 84, 84, 3), np.uint8)
    for count in (100, 4000):  # the last is what is measured
        read = images[:count]
        content = (
            python2_pickle(read, [1])
            if form == "python 2"
            else pickle.dumps({"data": read}, protocol=int(form[-1]))
        )
        file = write(tmp_path / f"{count}.pkl", content)
    script = (
        "import resource; from pathlib import Path; from "
        "lightning_maml.datamodules.images.pickles import read_pickle\nfor count in (100, "
        "4000):\n    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n    data = "
        "read_pickle(Path(f'{count}.pkl'))['data']\n    assert data[count // 2].sum() == 84 * 84 "
        "* 3; data[0] = 2\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = another_process.output(script, folder=tmp_path)
    assert int(grown) * 1024 < images.nbytes / 3
    assert file.read_bytes() == content, "writing to the array leaves the file as it was"
