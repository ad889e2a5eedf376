"""Handles on the wire: every field comes back, and nothing that is not a handle is taken for one."""

import pickle
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcast import names
from shmcast.errors import HandleError
from shmcast.handle import Handle

U64, U32, I63 = (1 << 64) - 1, (1 << 32) - 1, (1 << 63) - 1


def handle(**changes: object) -> Handle:
    made = Handle(
        namespace="1000",
        arena=0x1122334455667788,
        host=names.host_id(),
        kind="numpy",
        dtype="float32",
        shape=(4, 1176),
        nbytes=18816,
        given=None,
        slot=7,
        generation=99,
        segment=1,
        offset=4096,
        hash=0x0123456789ABCDEF0123456789ABCDEF,
    )
    return made._replace(**changes)  # type: ignore[arg-type]


handles = st.builds(
    Handle,
    namespace=st.from_regex(r"[A-Za-z0-9_-]{1,32}", fullmatch=True),
    arena=st.integers(0, U64),
    host=st.integers(0, U64),
    kind=st.sampled_from(["numpy", "torch"]),
    dtype=st.text(max_size=40).filter(lambda text: text.isprintable()),
    shape=st.lists(st.integers(0, I63), max_size=64).map(tuple),
    nbytes=st.integers(0, I63 // 2),
    given=st.none() | st.integers(0, (1 << 128) - 1),
    slot=st.integers(0, U32),
    generation=st.integers(1, U64),
    segment=st.integers(1, U32),
    offset=st.integers(0, I63 // 2),
    hash=st.none() | st.integers(0, (1 << 128) - 1),
    hash_name=st.sampled_from(["xxh3", "sha256"]),
).map(lambda made: made if made.hash is not None else made._replace(hash_name="xxh3"))


@given(handles)
def test_every_field_comes_back(original: Handle) -> None:
    raw = original.to_bytes()
    for again in (Handle.from_bytes(raw), Handle.from_bytes(memoryview(raw)), pickle.loads(pickle.dumps(original))):
        assert type(again) is Handle
        assert again == original
        assert hash(again) == hash(original)


def test_it_is_small() -> None:
    assert len(handle().to_bytes()) <= 120


@given(st.binary(max_size=300))
def test_garbage_is_refused(raw: bytes) -> None:
    with pytest.raises(HandleError, match="decode handle"):
        Handle.from_bytes(raw)


@given(handles, st.data())
def test_a_cut_handle_is_refused(original: Handle, data: st.DataObject) -> None:
    raw = original.to_bytes()
    with pytest.raises(HandleError):
        Handle.from_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])


def test_a_changed_bit_is_noticed_everywhere(seed: int) -> None:
    raw = bytearray(handle(given=5).to_bytes())
    bits = range(8 * len(raw))
    for bit in random.Random(seed).sample(bits, len(bits)):
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(HandleError):
            Handle.from_bytes(raw)
        raw[bit // 8] ^= 1 << bit % 8
    assert Handle.from_bytes(raw) == handle(given=5)


def resealed(raw: bytes) -> bytes:
    """With a right CRC, as somebody would send who means it."""
    return raw[:6] + zlib.crc32(raw[:6] + raw[10:]).to_bytes(4, "little") + raw[10:]


def test_a_kind_of_hash_without_a_hash_is_refused() -> None:
    raw = bytearray(handle(hash=None).to_bytes())
    raw[5] |= 8
    with pytest.raises(HandleError, match="flags 0x8"):
        Handle.from_bytes(resealed(bytes(raw)))


@pytest.mark.parametrize("extra", [b"\0", b"x" * 16])
def test_nothing_may_follow(extra: bytes) -> None:
    raw = handle().to_bytes()
    with pytest.raises(HandleError, match=f"{len(raw) + len(extra)} bytes, its fields need {len(raw)}"):
        Handle.from_bytes(resealed(raw + extra))


def test_another_version_is_named() -> None:
    raw = handle().to_bytes()
    with pytest.raises(HandleError, match="version 9, this build reads 2"):
        Handle.from_bytes(raw[:4] + b"\x09" + raw[5:])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"namespace": "a/../b"}, "namespace 'a/../b'"),
        ({"namespace": ""}, "namespace ''"),
        ({"generation": 0}, "generation 0"),
        ({"segment": 0}, "segment 0"),
        ({"offset": I63, "nbytes": 1}, "offset"),
        ({"offset": U64}, "offset"),
        ({"nbytes": U64}, "size"),
        ({"shape": (1 << 63,)}, "shape"),
        ({"shape": (1,) * 65}, "65 dimensions"),
    ],
)
def test_every_range_is_checked(changes: dict[str, object], what: str) -> None:
    raw = handle(**changes).to_bytes()
    with pytest.raises(HandleError, match=what):
        Handle.from_bytes(raw)


@pytest.mark.parametrize("changes", [{"arena": -1}, {"slot": 1 << 32}, {"shape": (-1,)}, {"hash": 1 << 128}])
def test_what_does_not_fit_is_not_encoded(changes: dict[str, object]) -> None:
    with pytest.raises(HandleError, match="encode"):
        handle(**changes).to_bytes()


def test_digest_of_the_publisher_wins() -> None:
    assert handle(given=77).digest == 77
    assert handle(hash=None).digest is None
    assert handle(hash=None, given=77).digest == 77


def test_part_keeps_what_is_still_true() -> None:
    whole = handle(given=5)
    part = whole.part(64, 128, "numpy", "uint8", (128,))
    assert (part.offset, part.nbytes, part.hash, part.given) == (whole.offset + 64, 128, None, None)
    reshaped = whole.part(0, whole.nbytes, "numpy", "float32", (4704,))
    assert (reshaped.hash, reshaped.given) == (whole.hash, None)
    assert whole.part(0, whole.nbytes, "torch", "float32", (4, 1176))._replace(kind="numpy") == whole
