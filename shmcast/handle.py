"""`Handle`: what names a published block; and, normative, what its bytes look like on the wire.

All integers are little-endian. ::

    4  magic "shmH"            1  version (2)         1  flags: 1 torch, 2 hash present, 4 digest present, 8 hash is SHA-256's
    4  CRC-32 of all the other bytes, in order
    8  host                    8  arena id            8  generation
    8  offset in the segment   8  size of the data    4  slot                 4  segment number
    1  n, length of namespace  2  d, length of dtype  1  dimensions (0..64)
    n  namespace               d  dtype, UTF-8        8  for each dimension: its length
    16 hash, if present        16 digest, if present

Offsets and sizes are bytes. Nothing may follow. Whoever decodes checks every range; that the range lies in the block
that (slot, generation) names is checked by the attach, against the owner's record.

dtype is numpy's name of a native number type ("float32", "bool"), torch's where numpy has none ("bfloat16"), else
numpy's own descriptor ("<M8[ns]", ">f4", "[('x', '<f4'), ('y', '<i4', (3,))]").
"""

import zlib
from struct import Struct
from struct import error as struct_error
from typing import Any, NamedTuple

from . import names
from .content import HashName, array_digest
from .errors import HandleError

MAGIC = b"shmH"
VERSION = 2
_TORCH, _HASHED, _DIGEST, _SHA256 = 1, 2, 4, 8
_FLAGS = _TORCH | _HASHED | _DIGEST | _SHA256
_MAX_DIMENSIONS = 64

_HEAD = Struct("<4sBB")
_CHECK = Struct("<I")
_CHECK_END = _HEAD.size + _CHECK.size
_FIXED = Struct("<QQQQQIIBHB")
_MAX_64 = (1 << 63) - 1


class Handle(NamedTuple):
    """The name of a published block, or of a part of one. A value: it owns nothing and can be attached any number of times."""

    namespace: str
    arena: int
    """Id of the arena, 64 bits."""
    host: int
    """Which boot of which host; see `names.host_id`."""
    kind: str
    """"numpy" or "torch": what was published."""
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    given: int | None
    """The digest that the publisher supplied, if any."""
    slot: int
    generation: int
    segment: int
    offset: int
    """Bytes into the data segment."""
    hash: int | None
    """128 bits of the bytes, if they were hashed: by `hash_name`."""
    hash_name: HashName = "xxh3"
    """See `content.HashName`."""

    @property
    def digest(self) -> int | None:
        """128 bits that name the content: the publisher's own value, or `array_digest`; None where not hashed."""
        if self.given is not None:
            return self.given
        return None if self.hash is None else array_digest(self.dtype, self.shape, self.hash, self.hash_name)

    def to_bytes(self) -> bytes:
        """About 100 bytes; see the module."""
        namespace, dtype = self.namespace.encode(), self.dtype.encode()
        flags = (
            (_TORCH if self.kind == "torch" else 0)
            | (_HASHED if self.hash is not None else 0)
            | (_DIGEST if self.given is not None else 0)
            | (_SHA256 if self.hash is not None and self.hash_name == "sha256" else 0)
        )
        try:
            rest = b"".join(
                (
                    _FIXED.pack(
                        self.host, self.arena, self.generation, self.offset, self.nbytes, self.slot, self.segment,
                        len(namespace), len(dtype), len(self.shape),
                    ),
                    namespace,
                    dtype,
                    *(length.to_bytes(8, "little") for length in self.shape),
                    b"" if self.hash is None else self.hash.to_bytes(16, "little"),
                    b"" if self.given is None else self.given.to_bytes(16, "little"),
                )
            )  # fmt: skip
        except (struct_error, OverflowError) as error:
            raise HandleError(f"encode {self!r}: {error}") from None
        head = _HEAD.pack(MAGIC, VERSION, flags)
        return head + _CHECK.pack(zlib.crc32(rest, zlib.crc32(head))) + rest

    @staticmethod
    def from_bytes(raw: "bytes | bytearray | memoryview") -> "Handle":
        """The handle that `to_bytes` wrote. HandleError for anything else, with the values that are wrong."""
        if not isinstance(raw, bytes):
            raw = bytes(raw)
        size = len(raw)
        fixed_end = _CHECK_END + _FIXED.size
        if size < fixed_end:
            raise HandleError(f"decode handle: {size} bytes, at least {fixed_end} are needed")
        magic, version, flags = _HEAD.unpack_from(raw)
        if magic != MAGIC:
            raise HandleError(f"decode handle: it starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise HandleError(f"decode handle: version {version}, this build reads {VERSION}")
        (check,) = _CHECK.unpack_from(raw, _HEAD.size)
        found = zlib.crc32(raw[_CHECK_END:], zlib.crc32(raw[: _HEAD.size]))
        if found != check:
            raise HandleError(f"decode handle: CRC-32 is {found:#010x}, it says {check:#010x}; it was cut or changed")
        (host, arena, generation, offset, nbytes, slot, segment, namespace_size, dtype_size, dimensions) = (
            _FIXED.unpack_from(raw, _CHECK_END)
        )
        dtype_at = fixed_end + namespace_size
        shape_at = dtype_at + dtype_size
        hash_at = shape_at + 8 * dimensions
        given_at = hash_at + (16 if flags & _HASHED else 0)
        end = given_at + (16 if flags & _DIGEST else 0)
        if end != size:
            raise HandleError(f"decode handle: {size} bytes, its fields need {end}")
        shape = tuple([int.from_bytes(raw[at : at + 8], "little") for at in range(shape_at, hash_at, 8)])
        if (
            flags & ~_FLAGS
            or (flags & _SHA256 and not flags & _HASHED)
            or dimensions > _MAX_DIMENSIONS
            or not generation
            or not segment
            or offset > _MAX_64 - nbytes
            or nbytes > _MAX_64
            or (shape and max(shape) > _MAX_64)
        ):
            raise HandleError(
                f"decode handle: out of range: flags {flags:#x}, {dimensions} dimensions, generation {generation}, "
                f"segment {segment}, offset {offset}, size {nbytes}, shape {shape}"
            )
        try:
            namespace = _namespaces.get(raw[fixed_end:dtype_at]) or _learn_namespace(raw[fixed_end:dtype_at])
            dtype = raw[dtype_at:shape_at].decode()
        except ValueError as error:
            raise HandleError(f"decode handle: {error}") from None
        return _new(
            Handle,
            (
                namespace,
                arena,
                host,
                "torch" if flags & _TORCH else "numpy",
                dtype,
                shape,
                nbytes,
                int.from_bytes(raw[given_at:end], "little") if flags & _DIGEST else None,
                slot,
                generation,
                segment,
                offset,
                int.from_bytes(raw[hash_at:given_at], "little") if flags & _HASHED else None,
                "sha256" if flags & _SHA256 else "xxh3",
            ),
        )

    def part(self, offset: int, nbytes: int, kind: str, dtype: str, shape: tuple[int, ...]) -> "Handle":
        """A handle of ``nbytes`` bytes from ``offset`` of this one's data on, seen as another array.

        Its digest is that of the same bytes in the other form where it covers all of them, else None."""
        whole = offset == 0 and nbytes == self.nbytes
        same = whole and dtype == self.dtype and shape == self.shape
        return self._replace(
            kind=kind,
            dtype=dtype,
            shape=shape,
            nbytes=nbytes,
            given=self.given if same else None,
            offset=self.offset + offset,
            hash=self.hash if whole else None,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle.from_bytes, (self.to_bytes(),)

    def __repr__(self) -> str:
        return (
            f"<Handle {self.kind} {self.dtype} {self.shape}, slot {self.slot}, generation {self.generation}, "
            f"arena {self.namespace}.{self.arena:016x}>"
        )


_new = tuple.__new__
_namespaces: dict[bytes, str] = {}


def _learn_namespace(raw: bytes) -> str:
    # Handles come from outside, and the namespace becomes part of a file name.
    namespace = names.check_namespace(raw.decode())
    if len(_namespaces) < 64:
        _namespaces[raw] = namespace
    return namespace
