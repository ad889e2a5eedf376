"""numpy's dtypes as text and its arrays as bytes: what goes in comes out, or is refused with words."""

import numpy as np
import pytest

import shmcast
from shmcast import arrays
from shmcast.errors import HandleError, UnsupportedArrayError

SIMPLE = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32",
          "float64", "longdouble", "complex64", "complex128", "clongdouble"]  # fmt: skip
OTHERS = [
    ">f4", ">i8", ">c16", "<M8[ns]", "<M8[25s]", "<m8[D]", ">M8[us]", "M8", "S5", "U7", ">U7", "V9",
    [("x", "<f4"), ("y", ">i2")],
    [("box", "f4", (2, 3)), ("label", "U10"), ("when", "M8[ms]")],
    [("outer", [("inner", "i1"), ("rest", "S3")]), ("tail", "?")],
    {"names": ["a", "b"], "formats": ["u1", "f8"], "offsets": [0, 8], "itemsize": 24},
    [(("a title", "a"), "i4"), ("b", "i4")],
    np.dtype([("a", "u1"), ("b", "f8")], align=True),
]  # fmt: skip
DTYPES = [np.dtype(dtype) for dtype in SIMPLE + OTHERS]


@pytest.fixture(scope="module")
def module_arena():
    """One arena for all dtypes; in a namespace that the single tests do not look at."""
    with shmcast.Arena.create("16MiB", namespace="test-arrays") as arena:
        yield arena


def filled(dtype: np.dtype, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """An array of random bytes, of random characters where not all bytes are values."""
    count = int(np.prod(shape, dtype=int))
    if dtype.kind == "U":
        flat = np.array(["".join(map(chr, rng.integers(32, 1000, 4))) for _ in range(count)], dtype)
    elif dtype.kind == "b":
        flat = rng.integers(0, 2, count).astype(dtype)
    elif dtype.names and any(field[0].base.kind in "Ub" for field in dtype.fields.values()):
        flat = np.zeros(count, dtype)
        for name in dtype.names:
            if dtype[name].base.kind not in "UbV":
                flat[name] = rng.integers(0, 100, flat[name].shape).astype(dtype[name].base)
    else:
        flat = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype)
    return flat.reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(module_arena, rng, dtype: np.dtype) -> None:
    assert arrays.dtype_of(arrays.code_of(dtype)) == dtype
    for shape in ((), (0,), (5,), (3, 0, 2), (2, 3, 4)):
        check_round_trip(module_arena, filled(dtype, shape, rng))


def check_round_trip(module_arena, original: np.ndarray) -> None:
    with shmcast.attach(module_arena.publish(original), verify=True) as lease:
        seen = lease.array
        assert (seen.dtype, seen.shape) == (original.dtype, original.shape)
        assert seen.tobytes() == original.tobytes()
        assert not seen.flags.writeable
        assert type(seen) is np.ndarray
        private = lease.to_private()
        del seen
    assert private.tobytes() == original.tobytes()
    assert private.flags.writeable


VIEWS = {
    "fortran": lambda a: np.asfortranarray(a),
    "transposed": lambda a: a.T,
    "strided": lambda a: a[::2, ::3],
    "negative strides": lambda a: a[::-1, ::-1],
    "a column": lambda a: a[:, 5:6],
    "broadcast": lambda a: np.broadcast_to(a[:1], (7, a.shape[1])),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "subclass": lambda a: a.view(type("Sub", (np.ndarray,), {})),
}


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS.keys())
def test_any_layout(module_arena, rng, make) -> None:
    for dtype in ("float32", ">i2", "S3", "M8[s]"):
        check_layout(module_arena, make(filled(np.dtype(dtype), (40, 60), rng)))


def check_layout(module_arena, original: np.ndarray) -> None:
    for handle in (module_arena.publish(original), *module_arena.publish_many([original, original[:1]])[:1]):
        lease = shmcast.attach(handle, verify=True)
        assert lease.array.flags.c_contiguous
        assert lease.array.shape == original.shape
        assert lease.array.tobytes() == np.asarray(original).tobytes()
        assert handle.digest == shmcast.digest(original) == shmcast.digest(np.array(original))


def test_a_memory_map_is_an_array(module_arena, tmp_path, rng) -> None:
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(100,))
    mapped[:] = rng.random(100)
    assert (shmcast.attach(module_arena.publish(mapped)).array == mapped).all()


REFUSED = {
    "objects": (np.array([1, "a", None], dtype=object), "Python objects"),
    "a field of objects": (np.zeros(3, [("a", "i4"), ("b", "O")]), "Python objects"),
    "masked": (np.ma.masked_array([1, 2], [0, 1]), "array.mask"),
    "a list": ([1, 2, 3], "numpy.asarray"),
    "a number": (np.float32(1), "numpy.asarray"),
    "None": (None, "numpy.asarray"),
    "bytes": (b"abc", "numpy.asarray"),
    "overlapping fields": (np.zeros(2, {"names": ["a", "b"], "formats": ["u4", "u2"], "offsets": [0, 2]}), "dtype"),
}
if hasattr(np, "dtypes") and hasattr(np.dtypes, "StringDType"):
    REFUSED["variable text"] = (np.array(["a", "bb"], np.dtypes.StringDType()), "Python objects|written down")


@pytest.mark.parametrize(("thing", "advice"), REFUSED.values(), ids=REFUSED.keys())
def test_what_can_not_be_shared_is_refused_with_advice(module_arena, thing, advice: str) -> None:
    used = module_arena.stats()["slots_used"]
    with pytest.raises(UnsupportedArrayError, match=advice):
        module_arena.publish(thing)
    with pytest.raises(UnsupportedArrayError, match=advice):
        module_arena.publish_many([np.zeros(3), thing])
    assert module_arena.stats()["slots_used"] <= used


@pytest.mark.parametrize("code", ["O", "[('a', '|O')]", "f4,f4", "float", "<f4", "nonsense", "[", "[(", "()", "__import__('os')",
                                  "[" * 5000, "[('a', '<f4'), 7]", "{'a': 1}", "", "M8[parsec]", "i", "(2,3)f4"])  # fmt: skip
def test_text_that_is_no_dtype(code: str) -> None:
    with pytest.raises((HandleError, UnsupportedArrayError)):
        arrays.dtype_of(code)


@pytest.mark.parametrize(
    "changes",
    [{"shape": (7,)}, {"shape": (101,)}, {"shape": (1 << 62,)}, {"shape": (1 << 40, 1 << 40)}, {"dtype": "float64"},
     {"dtype": "uint8"}, {"dtype": "O"}, {"dtype": "bfloat16"}],
)  # fmt: skip
def test_a_handle_whose_form_does_not_fit_its_bytes(module_arena, changes) -> None:
    handle = module_arena.publish(np.arange(100, dtype=np.float32))
    lease = shmcast.attach(handle._replace(**changes))
    with pytest.raises((HandleError, UnsupportedArrayError)):
        _ = lease.array
    assert (shmcast.attach(handle).array == np.arange(100, dtype=np.float32)).all()


def test_caches_are_bounded() -> None:
    for length in range(1, 3000):
        assert arrays.dtype_of(arrays.code_of(np.dtype(f"V{length}"))).itemsize == length
    assert len(arrays._codes) <= 1024
    assert len(arrays._dtypes) <= 1024


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, (1 << 19) - 1, (1 << 19) + 8, (1 << 20) + 3])
def test_same_bytes_sees_each_of_them(rng: np.random.Generator, size: int) -> None:
    one = rng.integers(0, 256, size, dtype=np.uint8)
    assert arrays.same_bytes(one, one.copy())
    assert not arrays.same_bytes(one, one[: size - 1]) or not size
    for at in {0, size // 2, size - 9, size - 8, size - 1, (1 << 19) - 1, 1 << 19} & set(range(size)):
        other = one.copy()
        other[at] ^= 1 << int(rng.integers(8))
        assert not arrays.same_bytes(one, other), at
