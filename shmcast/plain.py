"""A reader of pickles that can make plain things alone: for bytes from processes that are not trusted with ours.

It knows the opcodes that Python's pickler writes for None, bool, int, float, complex, str, bytes, bytearray, list, tuple,
dict, set and frozenset, and five names: `complex`, and those by which numpy pickles arrays and scalars. A name is a token
here; what is done where one is called stands in this file. Nothing is imported, no attribute is looked up, and numpy is
given numbers that were checked, never a state to restore. Everything else is refused by its name or opcode, so all that a
hostile pickle can do is to be refused, or to take memory and time in proportion to its length.

For that, what costs more than the bytes that ask for it is counted. Bytes of arrays and scalars are copied as often as
there are bytes. Arrays have elements of at least one byte. What it takes to hash keys, and to compare those of the same
hash, is known before it is done (`_Reader.charge`) and may be so much for every byte. And as the place of a number, or of a
tuple of numbers, in the table of a dict or set can be chosen, so that every look for one goes past all others, a dict or set
has at most 16,384 keys that are neither text nor bytes.
"""

from collections.abc import Callable
from struct import Struct
from typing import Any

from . import arrays
from .errors import HandleError

_MARK = object()
_FLOAT = Struct(">d")
_LONGEST = 1 << 16  # bytes of an int: more take quadratic time to print, and nobody sends them
_KEY_PARTS = 1000  # hashing and comparing go down into keys, on the C stack
_KEYS_CHOSEN = 1 << 14  # in one dict or set: who chooses numbers chooses their hashes, those of text nobody does
_WORK = 32  # parts of keys that are hashed or compared, for every byte of the pickle
_PART_BYTES = 4096  # of text, bytes or an int in a key that count as one part
_DIMENSIONS = 64


class _Name:
    """A function that a pickle may call."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class _Dtype:
    """What stands for a dtype until an array is made of it."""

    __slots__ = ("made",)

    def __init__(self, made: Any) -> None:
        self.made = made


class _Unmade:
    """An array that was announced and whose state is still to come."""

    __slots__ = ("made",)

    def __init__(self) -> None:
        self.made: Any = None


class _Given(tuple[Any, ...]):
    """Arguments or a state: a tuple that has one of these in it, and no value itself."""

    __slots__ = ()


class _Table:
    """What has been put into a dict or set, as far as its hashes can be chosen."""

    __slots__ = ("alike", "chosen", "container")

    def __init__(self, container: Any) -> None:
        self.container = container  # kept, or another one would have its id
        self.chosen = 0
        self.alike: dict[int, tuple[int, int]] = {}
        """How many keys have a hash, and how many parts in all."""


_NUMPY = {f"numpy.{core}.{name}": name.rpartition(".")[2] for core in ("_core", "core") for name in
          ("numeric._frombuffer", "multiarray.scalar", "multiarray._reconstruct")}  # fmt: skip
_KNOWN = {"builtins.complex": "complex", "numpy.dtype": "dtype", "numpy.ndarray": "ndarray", **_NUMPY}
_TOKENS = (_Name, _Dtype, _Unmade, _Given)


def load(raw: "bytes | memoryview", block: str, array: Callable[[Any], Any]) -> Any:
    """The tree that a pickle of plain things describes.

    ``block``: module and name of the function that stands for an array outside of the pickle; ``array``: gives it for the
    number that the pickle calls it with. HandleError for everything that is not plain, and for damaged bytes."""
    reader = _Reader(raw, block, array)
    try:
        return reader.read()
    except HandleError:
        raise
    except MemoryError:
        raise HandleError(
            f"decode tree: there is no memory for what its pickle of {len(reader.raw)} bytes asks for near byte {reader.at}"
        ) from None
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, SystemError, RecursionError) as error:
        raise HandleError(f"decode tree: its pickle is damaged near byte {reader.at}: {error}") from None


class _Reader:
    def __init__(self, raw: "bytes | memoryview", block: str, array: Callable[[Any], Any]) -> None:
        self.raw = memoryview(raw).cast("B")
        self.at = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        self.names = {**_KNOWN, block: "block"}
        self.array = array
        self.left = len(self.raw)
        """Bytes that may still be copied out of it; the pickler writes those of every array and scalar anew."""
        self.work = _WORK * len(self.raw)
        """Parts of keys that may still be hashed or compared."""
        self.tables: dict[int, _Table] = {}
        """By the id of their dict or set."""
        self.parts: dict[int, int] = {}
        """Of each frozenset, by its id; whatever has that id later writes its own before anybody reads it."""

    def read(self) -> Any:
        while True:
            code = self.raw[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                (tree,) = self.stack
                return _plain((tree,))[0]
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise HandleError(
                    f"decode tree: opcode {code:#04x} in its pickle makes something that is neither an array nor a plain "
                    "container, which allow_pickle=False refuses"
                )
            operation(self)

    def take(self, nbytes: int) -> memoryview:
        part = self.raw[self.at : self.at + nbytes]
        if len(part) != nbytes:
            raise ValueError(f"{nbytes} bytes are to follow, {len(part)} do")
        self.at += nbytes
        return part

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def items(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        last = len(self.stack) - 1
        while self.stack[last] is not _MARK:
            last -= 1
            if last < 0:
                raise ValueError("there is no mark")
        items = self.stack[last + 1 :]
        del self.stack[last:]
        return items

    def spend(self, buffer: Any) -> Any:
        self.left -= len(buffer)
        if self.left < 0:
            raise ValueError("the same bytes are copied again and again")
        return buffer

    # ---- operations

    def text(self, width: int) -> None:
        self.stack.append(str(self.take(self.number(width)), "utf-8", "surrogatepass"))

    def octets(self, width: int, kind: Callable[[memoryview], Any]) -> None:
        self.stack.append(kind(self.take(self.number(width))))

    def signed(self, nbytes: int) -> None:
        if nbytes > _LONGEST:
            raise ValueError(f"an int of {nbytes} bytes")
        self.stack.append(int.from_bytes(self.take(nbytes), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        items = self.stack[-count:]
        if len(items) != count or any(item is _MARK for item in items):
            raise ValueError("a tuple of what is not there")
        del self.stack[-count:]
        self.push_tuple(items)

    def push_tuple(self, items: list[Any]) -> None:
        self.stack.append(_Given(items) if any(type(item) in _TOKENS for item in items) else tuple(items))

    def append(self, items: list[Any]) -> None:
        _exact(self.stack[-1], list).extend(_plain(items))

    def set_items(self, items: list[Any]) -> None:
        target, keys = _exact(self.stack[-1], dict), _plain(items)[::2]
        self.charge(keys, target)
        target.update(zip(keys, items[1::2], strict=True))

    def add(self, items: list[Any]) -> None:
        target = _exact(self.stack[-1], set)
        self.charge(_plain(items), target)
        target.update(items)

    def freeze(self, items: list[Any]) -> None:
        parts = 1 + self.charge(_plain(items), None)
        made = frozenset(items)
        self.parts[id(made)] = parts
        self.stack.append(made)

    def charge(self, keys: list[Any], container: Any) -> int:
        """Pay for putting keys into a container, None for a new one, before it is done: each is hashed, and compared with
        all that have the same hash. Returns the price, which is also the most that a look for all of them can cost."""
        table = self.tables.get(id(container)) if container is not None else _Table(None)
        price = 0
        for key in keys:
            parts = more = self.parts_of(key)
            if not isinstance(key, (str, bytes)):
                if parts > _KEY_PARTS:
                    raise ValueError(f"a key of more than {_KEY_PARTS} parts")
                if table is None:
                    table = self.tables[id(container)] = _Table(container)
                table.chosen += 1
                value = hash(key)
                count, parts_alike = table.alike.get(value, (0, 0))
                table.alike[value] = count + 1, parts_alike + parts
                more += 2 * (count * parts + parts_alike)
            price += more
            self.work -= more
            if self.work < 0:
                raise ValueError("keys are compared again and again")
        if table is not None and table.chosen > _KEYS_CHOSEN:
            raise ValueError(f"a dict or set has more than {_KEYS_CHOSEN} keys that are neither text nor bytes")
        return price

    def parts_of(self, key: Any) -> int:
        """How many single things there are to hash in a key, or to compare: those of a frozenset each with all alike."""
        parts, left = 0, [key]
        for part in left:
            kind = type(part)
            if kind is tuple:
                parts += 1
                left += part
            elif kind is frozenset:
                parts += self.parts.get(id(part), 1)
            elif isinstance(part, (str, bytes)):
                parts += 1 + len(part) // _PART_BYTES
            else:
                parts += 1 + (part.bit_length() // 8 // _PART_BYTES if kind is int else 0)
            if len(left) > _KEY_PARTS:
                return len(left)
        return parts

    def put(self, number: int) -> None:
        if number > len(self.memo):
            raise ValueError(f"number {number} is remembered after {len(self.memo)}")
        self.memo[number : number + 1] = [self.stack[-1]]

    def get(self, number: int) -> None:
        known = self.memo[number]
        self.stack.append(known.made if type(known) is _Unmade and known.made is not None else known)

    def name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        text = f"{_exact(module, str)}.{_exact(name, str)}"
        known = self.names.get(text)
        if known is None:
            raise HandleError(
                f"decode tree: it holds {text[:200]!r}, which is neither an array nor a plain container; allow_pickle=False "
                "refuses it, loads() without that makes it, from processes that you trust"
            )
        self.stack.append(_Name(known))

    def call(self) -> None:
        given, function = self.stack.pop(), self.stack.pop()
        if type(given) is not _Given:
            _exact(given, tuple)
        self.stack.append(self.called(_exact(function, _Name).text, *given))

    def called(self, function: str, *given: Any) -> Any:
        if function == "block":
            (number,) = given
            return self.array(number)
        if function == "complex":
            real, imaginary = given
            return complex(_exact(real, float), _exact(imaginary, float))
        if function == "dtype":
            return _Dtype(arrays.plain_dtype(_exact(given[0], str)))
        if function == "scalar":
            dtype, raw = given
            return arrays.scalar(self.spend(_exact(raw, bytes)), _exact(dtype, _Dtype).made)
        if function == "_frombuffer":
            buffer, dtype, shape, order = given
            return _made_array(buffer, dtype, shape, _exact(order, str))
        if function == "_reconstruct":
            return _Unmade()
        raise ValueError(f"{function} is called")

    def build(self) -> None:
        state, thing = self.stack.pop(), self.stack[-1]
        if type(thing) is _Unmade:
            _, shape, dtype, fortran, buffer = _exact(state, _Given)
            array = _made_array(buffer, dtype, shape, "F" if _exact(fortran, bool) else "C")
            self.spend(buffer)
            thing.made = array.copy("K")
            self.stack[-1] = thing.made
        else:
            dtype = _exact(thing, _Dtype)
            dtype.made = _restored(dtype.made, _exact(state, tuple))


def _plain(items: Any) -> Any:
    if any(type(item) in _TOKENS or item is _MARK for item in items):
        raise ValueError("a dtype or a function stands where a value is expected")
    return items


def _exact(thing: Any, kind: Any) -> Any:
    if type(thing) is not kind:
        raise ValueError(f"a {type(thing).__name__} where a {kind.__name__} is expected")
    return thing


def _made_array(buffer: Any, dtype: Any, shape: Any, order: str) -> Any:
    if type(buffer) not in (bytes, bytearray):
        raise ValueError(f"a {type(buffer).__name__} for the bytes of an array; objects are refused")
    if len(_exact(shape, tuple)) > _DIMENSIONS:
        raise ValueError(f"an array of {len(shape)} dimensions")
    if not all(0 <= _exact(length, int) < 1 << 63 for length in shape):
        raise ValueError("an array with a length that is none")  # numpy would take -1 for whatever fits
    made = _exact(dtype, _Dtype).made
    if made.itemsize == 0:
        raise ValueError("an array whose elements have no bytes, so that there may be any number of them")
    return arrays.over_pickled(buffer, made, shape, order)


def _restored(dtype: Any, state: tuple[Any, ...]) -> Any:
    """A dtype with the byte order, and for times the unit, that its state says; the rest of the state follows from these."""
    _, order, subdtype, names, fields, *rest = state
    if (subdtype, names, fields) != (None, None, None):
        raise HandleError("decode tree: a small array has a dtype with fields, which allow_pickle=False refuses")
    if len(rest) == 4 and dtype.kind in "mM":
        _, (unit, count, divisor, event) = rest[3]
        if (divisor, event) != (1, 1):
            raise ValueError("a unit of time that is divided")
        if _exact(unit, bytes) != b"generic":
            if not 0 < _exact(count, int) < 1 << 30:
                raise ValueError("a unit of time that is none")
            dtype = arrays.plain_dtype(f"{dtype.kind}8[{count}{unit.decode()}]")
    return arrays.in_order(dtype, _exact(order, str))


def _constant(value: Any) -> Callable[[_Reader], None]:
    return lambda reader: reader.stack.append(value)


def _drop_to_mark(reader: _Reader) -> None:
    reader.items()


_OPERATIONS: dict[int, Callable[[_Reader], Any]] = {
    0x80: lambda r: r.take(1),  # PROTO
    0x95: lambda r: r.take(8),  # FRAME: where it ends says nothing
    ord("("): _constant(_MARK),
    ord("0"): lambda r: r.stack.pop(),
    ord("1"): _drop_to_mark,
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("J"): lambda r: r.signed(4),
    ord("K"): lambda r: r.stack.append(r.number(1)),
    ord("M"): lambda r: r.stack.append(r.number(2)),
    0x8A: lambda r: r.signed(r.number(1)),
    0x8B: lambda r: r.signed(r.number(4)),
    ord("G"): lambda r: r.stack.append(_FLOAT.unpack(r.take(8))[0]),
    0x8C: lambda r: r.text(1),
    ord("X"): lambda r: r.text(4),
    0x8D: lambda r: r.text(8),
    ord("C"): lambda r: r.octets(1, bytes),
    ord("B"): lambda r: r.octets(4, bytes),
    0x8E: lambda r: r.octets(8, bytes),
    0x96: lambda r: r.octets(8, bytearray),
    ord("]"): lambda r: r.stack.append([]),
    ord("a"): lambda r: r.append([r.stack.pop()]),
    ord("e"): lambda r: r.append(r.items()),
    ord(")"): _constant(()),
    0x85: lambda r: r.tuple_of(1),
    0x86: lambda r: r.tuple_of(2),
    0x87: lambda r: r.tuple_of(3),
    ord("t"): lambda r: r.push_tuple(r.items()),
    ord("}"): lambda r: r.stack.append({}),
    ord("s"): lambda r: r.set_items([r.stack.pop(-2), r.stack.pop()]),
    ord("u"): lambda r: r.set_items(r.items()),
    0x8F: lambda r: r.stack.append(set()),
    0x90: lambda r: r.add(r.items()),
    0x91: lambda r: r.freeze(r.items()),
    0x94: lambda r: r.memo.append(r.stack[-1]),
    ord("q"): lambda r: r.put(r.number(1)),
    ord("r"): lambda r: r.put(r.number(4)),
    ord("h"): lambda r: r.get(r.number(1)),
    ord("j"): lambda r: r.get(r.number(4)),
    0x93: lambda r: r.name(),
    ord("R"): lambda r: r.call(),
    ord("b"): lambda r: r.build(),
}
