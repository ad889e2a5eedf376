"""`key_of`: what names the content of a raw request, so that equal requests can be answered alike.

SHA-256 (FIPS 180-4) of a canonical form in which every value has its type before it and its length before its bytes::

    value:      tag, 8 length, content      of what is small and has no parts
                "#", 32 SHA-256 of a node   of all else, so that what occurs twice is read once, and nothing runs on for ever
    node:       tag, what it consists of, each of it a value
    unordered:  the SHA-256 of each item, in the order of these

So equal keys mean equal content, as far as nobody can make two contents with one SHA-256. That also holds against strangers
who choose the content; what is unequal here though it means the same costs another materialization and nothing else.
"""

import hashlib
import io
import sys
from array import array as packed
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone
from enum import Enum
from functools import lru_cache
from pathlib import PurePath
from struct import Struct
from types import MemberDescriptorType
from typing import Any, NamedTuple

from . import arrays, tensors

_PREFIX = b"shmcast key 1\0"
_HEAD = Struct("<cQ")
_FLOAT = Struct("<d")
_COMPLEX = Struct("<dd")
_LARGE_BYTES = 4096
"""Longer ones are nodes, which are read once however often they occur."""
_MANY = 16
"""From so many numbers on a list of nothing else is packed: it may be a list of tokens."""
_MAX_DEPTH = 150
"""Of nodes in nodes: well within what Python calls can be nested."""
_POINTER_BYTES = 8
_HEAP_TYPE = 1 << 9
"""In ``type.__flags__``: a class that was made while the program ran."""
_IMAGE_STATE = frozenset(
    {"_im", "im", "_mode", "mode", "_size", "palette", "info", "readonly", "_readonly", "pyaccess", "_exif"}
)
"""Attributes of a plain PIL image. One that has others is not known well enough."""

_DIGEST = hashlib.sha256


def key_of(raw: Any) -> bytes:
    """32 bytes that name the content of a raw request, the same in every process; one pass over it.

    Of None, bool, int, float, complex, str, bytes, bytearray, memoryview, tuple, list, dict, set, frozenset, dates and times,
    members of enumerations, paths (their text, not what they name); ndarrays, numpy's scalars, CPU tensors of values alone
    (their dtype, shape and values, not their strides) and plain PIL images; and of objects of classes that can be found
    under their name in a module, dataclasses and named tuples for example, whose state is their ``__dict__`` and
    ``__slots__`` and nothing else. Type counts everywhere: 1, 1.0 and True are three keys. The order of a dict or a set does
    not. -0.0 is not 0.0, and a NaN is equal to one of the same bits.

    TypeError for all else, and what holds any such thing: functions, generators, files, GPU tensors, objects with state
    that can not be seen, what contains itself."""
    try:
        return _Walk().key(raw)
    except RecursionError:
        raise TypeError("key_of: it is nested too deeply") from None


class _Walk:
    """One raw request being read."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[bytes, Any]] = {}  # by id; the thing is kept so that no other gets its id
        self._inside: set[int] = set()

    def key(self, raw: Any) -> bytes:
        into = _DIGEST(_PREFIX)
        self._value(into, raw)
        return into.digest()

    def _value(self, into: Any, thing: Any) -> None:
        leaf = _LEAVES.get(type(thing))
        if leaf is not None:
            tag, content = leaf(thing)
            if len(content) <= _LARGE_BYTES:
                into.update(_HEAD.pack(tag, len(content)))
                into.update(content)
                return
        into.update(b"#")
        into.update(self._node(thing, leaf))

    def _node(self, thing: Any, leaf: "Callable[[Any], tuple[bytes, Any]] | None") -> bytes:
        known = self._known.get(id(thing))
        if known is not None:
            return known[0]
        if id(thing) in self._inside:
            raise _refused(thing, "contains itself")
        if len(self._inside) >= _MAX_DEPTH:
            raise TypeError(f"key_of: it is nested more than {_MAX_DEPTH} deep")
        self._inside.add(id(thing))
        try:
            into = _DIGEST()
            if leaf is not None:
                tag, content = leaf(thing)
                into.update(_HEAD.pack(tag, len(content)))
                into.update(content)
            else:
                self._parts(into, thing)
            digest = into.digest()
        finally:
            self._inside.discard(id(thing))
        self._known[id(thing)] = digest, thing
        return digest

    def _parts(self, into: Any, thing: Any) -> None:
        kind: Any = type(thing)
        if kind in (list, tuple):
            self._sequence(into, b"l" if kind is list else b"t", thing)
        elif kind is dict:
            self._unordered(into, b"d", thing.items(), len(thing))
        elif kind in (set, frozenset):
            self._unordered(into, b"S" if kind is set else b"Z", ((item,) for item in thing), len(thing))
        elif kind is OrderedDict:
            self._sequence(into, b"D", tuple(thing.items()))
        elif kind is memoryview:
            self._values(into, b"m", thing.format, thing.shape, thing.tobytes())
        elif kind is arrays.NDARRAY:
            if thing.dtype.metadata:
                raise _refused(thing, "has a dtype with metadata")
            self._array(into, b"a", arrays.describe(thing))
        elif isinstance(thing, arrays.SCALAR) and kind is thing.dtype.type:
            self._values(into, b"g", arrays.code_of(thing.dtype), thing.tobytes())
        elif kind is tensors.tensor_type():
            if not tensors.is_values_alone(thing):
                raise _refused(thing, "is more than values in this host's memory: copy it with tensor.detach().cpu()")
            self._array(into, b"T", tensors.describe(thing))
        elif isinstance(thing, Enum):
            self._values(into, b"E", _name_of(kind), thing._name_, thing._value_)
        elif isinstance(thing, PurePath) and kind.__module__.partition(".")[0] == "pathlib":
            self._values(into, b"p", kind.__name__, str(thing))
        elif kind in _TIMES:
            if getattr(thing, "tzinfo", None) is not None and type(thing.tzinfo) is not timezone:
                raise _refused(thing, f"has a {type(thing.tzinfo).__name__}, of which only the name is known")
            self._values(into, b"w", kind.__name__, repr(thing))
        elif kind is _image_type():
            self._image(into, thing)
        elif isinstance(thing, tuple):
            plan = _plan(kind)
            self._values(into, b"n", plan.name, tuple(thing))
            self._state(into, thing, plan)
        else:
            if isinstance(thing, io.IOBase):
                raise _refused(thing, "is a file")
            plan = _plan(kind)
            self._values(into, b"o", plan.name)
            self._state(into, thing, plan)

    def _values(self, into: Any, tag: bytes, *values: Any) -> None:
        into.update(_HEAD.pack(tag, len(values)))
        for value in values:
            self._value(into, value)

    def _sequence(self, into: Any, tag: bytes, items: Any) -> None:
        into.update(_HEAD.pack(tag, len(items)))
        numbers = _packed(items) if len(items) >= _MANY else None
        if numbers is not None:
            into.update(_HEAD.pack(numbers.typecode.encode(), len(numbers)))
            into.update(numbers)
            return
        for item in items:
            self._value(into, item)

    def _unordered(self, into: Any, tag: bytes, items: "Iterable[tuple[Any, ...]]", count: int) -> None:
        digests = []
        for item in items:
            each = _DIGEST()
            for value in item:
                self._value(each, value)
            digests.append(each.digest())
        into.update(_HEAD.pack(tag, count))
        into.update(b"".join(sorted(digests)))

    def _array(self, into: Any, tag: bytes, form: arrays.Form) -> None:
        self._values(into, tag, form.dtype, form.shape, form.nbytes)
        into.update(arrays.contiguous(form))

    def _image(self, into: Any, image: Any) -> None:
        state = vars(image)
        if not state.keys() <= _IMAGE_STATE or state.get("_exif") is not None:
            raise _refused(image, f"has attributes {sorted(state.keys() - _IMAGE_STATE) or ['_exif']}")
        palette = None
        if image.palette is not None:
            palette = (
                image.palette.mode,
                image.palette.rawmode,
                bytes(image.palette.palette),
                image.getpalette("RGBA"),
            )
        self._values(into, b"I", image.mode, image.size, palette, image.info, image.tobytes())

    def _state(self, into: Any, thing: Any, plan: "_Plan") -> None:
        """What an object has of its own, which is all of it; see `_plan`."""
        self._value(into, object.__getattribute__(thing, "__dict__") if plan.has_dict else None)
        for slot in plan.slots:
            try:
                value = slot.__get__(thing, type(thing))
            except AttributeError:
                into.update(b"u")  # it has none: no value begins like that
                continue
            self._value(into, value)


# ---- what has no parts


def _int(thing: int) -> tuple[bytes, bytes]:
    return b"i", thing.to_bytes(thing.bit_length() // 8 + 1, "little", signed=True)


_LEAVES: "dict[type, Callable[[Any], tuple[bytes, Any]]]" = {
    type(None): lambda thing: (b"N", b""),
    type(...): lambda thing: (b".", b""),
    bool: lambda thing: (b"B", b"\1" if thing else b"\0"),
    int: _int,
    float: lambda thing: (b"f", _FLOAT.pack(thing)),
    complex: lambda thing: (b"c", _COMPLEX.pack(thing.real, thing.imag)),
    str: lambda thing: (b"s", thing.encode("utf-8", "surrogatepass")),
    bytes: lambda thing: (b"b", thing),
    bytearray: lambda thing: (b"y", thing),
}
_TIMES = (date, datetime, time, timedelta, timezone)
_CODES: dict[type, str] = {int: "q", float: "d"}


def _packed(items: Any) -> "packed[Any] | None":
    """Numbers of one type as their bytes, where all of them are such and fit."""
    kinds = set(map(type, items))
    code = _CODES.get(kinds.pop()) if len(kinds) == 1 else None
    if code is None:
        return None
    try:
        return packed(code, items)
    except OverflowError:
        return None


def _image_type() -> Any:
    """The class of plain PIL images; nothing can be one where it has not been imported."""
    return getattr(sys.modules.get("PIL.Image"), "Image", tensors)


# ---- objects


class _Plan(NamedTuple):
    """What the instances of a class consist of."""

    name: str
    has_dict: bool
    slots: "tuple[MemberDescriptorType, ...]"


@lru_cache(maxsize=256)
def _plan(kind: type) -> _Plan:
    """TypeError where instances have, or may have, state of another kind: what C keeps in them."""
    slots: list[MemberDescriptorType] = []
    for base in kind.__mro__:
        if base is not object and base is not tuple and not base.__flags__ & _HEAP_TYPE:
            raise TypeError(f"key_of: a {kind.__qualname__} is a {base.__qualname__}, whose state can not be seen")
        if "n_unnamed_fields" in vars(base):
            raise TypeError(f"key_of: a {kind.__qualname__} may have fields that have no name")
        for name in _slot_names(base):
            slot = vars(base).get(name)
            if not isinstance(slot, MemberDescriptorType):
                raise TypeError(f"key_of: a {kind.__qualname__} has a slot {name!r} that can not be read")
            slots.append(slot)
    base_type: type = tuple if issubclass(kind, tuple) else object
    # From Python 3.11 on most objects have their dict, and their weak references, in front of them: negative offsets.
    own_dict = kind.__dictoffset__ != 0 if base_type is tuple else kind.__dictoffset__ > 0
    pointers = len(slots) + own_dict + (kind.__weakrefoffset__ > 0)
    known_bytes = base_type.__basicsize__ + _POINTER_BYTES * pointers
    if kind is object or kind.__basicsize__ > known_bytes or kind.__itemsize__ != base_type.__itemsize__:
        raise TypeError(f"key_of: an object of class {kind.__qualname__}, whose state can not be seen")
    return _Plan(_name_of(kind), kind.__dictoffset__ != 0, tuple(slots))


def _slot_names(base: type) -> list[str]:
    """Names of the slots that a class itself has, as it stores them."""
    declared: Any = vars(base).get("__slots__", ())
    private = f"_{base.__name__.lstrip('_')}"
    names = [declared] if isinstance(declared, str) else list(declared)
    return [
        f"{private}{name}" if name.startswith("__") and not name.endswith("__") and private != "_" else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    ]


def _name_of(kind: type) -> str:
    """A class by its name, under which it must be found: another one that is called the same is another one."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is not kind:
        raise TypeError(f"key_of: class {kind.__qualname__} is not to be found in module {kind.__module__}")
    return f"{kind.__module__}:{kind.__qualname__}"


def _refused(thing: Any, why: str) -> TypeError:
    return TypeError(f"key_of: a {type(thing).__qualname__} that {why}")
