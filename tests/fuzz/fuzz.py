"""What decodes bytes of other processes, driven by bytes that nobody has written: ``fuzz.py TARGET SECONDS [SEED]``; with 0 seconds
the corpus alone.

A target takes bytes and returns; an exception that is not one of ours is a find, and so is what takes longer than
INPUT_S_MAX, or more memory than INPUT_BYTES_MAX of it warrant. With the package ``atheris`` (coverage-guided) where it is
installed, else with changed inputs of the corpus, seeded. What ends a run is left in ``build/fuzz/crash-TARGET``; put it
into ``corpus/TARGET`` with the mend. A pickle that is allowed to is not looked at: it may run any code, as `shmcast.loads`
says; ``plain`` is the reader of those that are not.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

try:
    import atheris
except ImportError:
    atheris = None

CHILD_VARIABLE = "SHMCAST_FUZZ_CHILD"
os.environ.setdefault("SHMCAST_NAMESPACE", f"fuzz{os.getpid()}")
HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
CRASHES = HERE.parent.parent / "build" / "fuzz"
INPUT_S_MAX = 10
INPUT_BYTES_MAX = 512
# What decoding may allocate: a constant for what Python does once, an error and its traceback; and for every byte, of which
# the most expensive one is that which makes an empty set, of 216 bytes.
MEMORY_BYTES, MEMORY_FACTOR = 1 << 20, 1000
# Beyond what is mapped at the start: for what Python does not count, as torch's memory.
ADDRESSES_BYTES = 2 << 30


def _import() -> None:
    # under instrumentation where there is any, so not at the top
    global shmcast, codec, lockstep, meeting, message, tensors, Handle, MAGIC, VERSION, hash128
    import shmcast
    from shmcast import codec, hash128, lockstep, meeting, message, tensors
    from shmcast.handle import MAGIC, VERSION, Handle


if atheris is None:
    _import()
else:
    with atheris.instrument_imports(include=["shmcast"]):
        _import()

_LOW = (1 << 64) - 1


# ---- targets: the check sums are made right, or nothing behind them would ever be reached


def handle(data: bytes) -> None:
    """`Handle.from_bytes`; what it takes, it writes again."""
    for raw in (data, _right_handle(data)):
        try:
            made = Handle.from_bytes(raw)
        except shmcast.HandleError:
            continue
        assert Handle.from_bytes(made.to_bytes()) == made


def tree(data: bytes) -> None:
    """What `loads` does before it unpickles: the frame, then each of the handles and arrays in it, with the pickle of a tree
    that is nothing else. Tensors, too, where torch is installed."""
    try:
        entries, at = codec._parse(_framed(data))
    except shmcast.HandleError:
        return
    with contextlib.suppress(*_of_ours()):
        codec.loads(_framed(data[: at - codec._HEAD.size] + _PLAIN_TREE))
    for tag, start, end in entries[:16]:
        entry = data[start - codec._HEAD.size : end - codec._HEAD.size]
        entry = _right_handle(entry) if tag == codec._HANDLE_TAG else entry
        raw = _framed(codec._COUNT.pack(1) + codec._ENTRY.pack(tag, len(entry)) + entry + _TREE_OF_ONE)
        for allow_pickle in (False, True):
            with contextlib.suppress(*_of_ours()), _in_proportion(raw):
                _is_plain(shmcast.loads(raw, allow_pickle=allow_pickle), len(entry))


def plain(data: bytes) -> None:
    """`loads` of a pickle that is not trusted, beside one array: a plain thing, or an error of ours."""
    raw = _framed(_ONE_ARRAY + data)
    with contextlib.suppress(*_of_ours()), _in_proportion(raw):
        _is_plain(shmcast.loads(raw, allow_pickle=False), len(raw))


def _framed(body: bytes) -> bytes:
    """With the head of a tree, whose hash is right."""
    return codec._HEAD.pack(codec.MAGIC, codec.VERSION, hash128(body) & _LOW) + body


_PLAIN_TREE = b"\x80\x05N."
_TREE_OF_ONE = b"\x80\x05\x8c\x0dshmcast.codec\x8c\x06_block\x93K\x00\x85R."
_ONE_ARRAY = struct.pack("<IBQBHB5sQ", 1, 1, 21, 0, 5, 1, b"uint8", 4) + b"abcd"


def _of_ours() -> tuple[type[Exception], ...]:
    """What may come out of `loads` whatever its bytes say."""
    return shmcast.HandleError, shmcast.StaleHandleError, shmcast.ArenaGoneError, shmcast.UnsupportedArrayError


@contextlib.contextmanager
def _in_proportion(raw: bytes) -> Iterator[None]:
    """AssertionError where more memory is taken than that many bytes may ask for, whatever becomes of it."""
    tracemalloc.start()
    try:
        yield
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        if peak > MEMORY_BYTES + MEMORY_FACTOR * len(raw):
            raise AssertionError(f"{len(raw)} bytes have taken {peak} of memory")


_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, np.ndarray)


def _is_plain(made: Any, nbytes: int) -> None:
    """AssertionError where there is anything in it that is not, or an array of more elements than came as bytes."""
    left, seen = [made], set()
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            assert thing.nbytes <= nbytes, f"an array of {thing.nbytes} bytes from {nbytes}"
            assert thing.size <= nbytes, f"an array of {thing.size} elements from {nbytes} bytes"
            thing.tobytes()
        elif tensors.is_tensor(thing):
            assert thing.numel() * thing.element_size() <= nbytes, f"a tensor of {thing.shape} from {nbytes} bytes"
            thing.clone()
        else:
            assert type(thing) in _PLAIN or isinstance(thing, np.generic), type(thing)
        if isinstance(thing, dict):
            left += [*thing, *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset)):
            left += thing


def group_message(data: bytes) -> None:
    """A group's message, the head that a caster puts in it, and the first message of all."""
    fixed, rest = data[:20].ljust(20, b"\0"), data[20:]
    start = message.MAGIC + bytes([message.VERSION]) + fixed[1:4] + fixed[4:]
    start = start.ljust(message._FIXED.size, b"\0")[: message._FIXED.size]
    raw = start + message._CHECK.pack(message._check(start, rest)) + rest
    try:
        made = message.unpack(raw)
        assert made.error is None or all(isinstance(text, str) for text in made.error.values())
        lockstep.read(made.head, len(made.parts))
    except shmcast.HandleError:
        pass
    for head in (data, lockstep.MAGIC + bytes([lockstep.VERSION]) + data):
        try:
            lockstep.read(head, len(data) % 3)
        except shmcast.HandleError:
            pass
    try:
        hello = meeting._read_hello(data)
        meeting._judge(hello, [data, b"\1" + data], 0)
    except shmcast.GroupError:
        pass


def attach(data: bytes) -> None:
    """`attach` of a handle that names what it likes in an arena that is alive, and a look at what it gives."""
    real = _published()
    fields = list(struct.unpack("<BQIIQQBQ", data[:42].ljust(42, b"\0")))
    which, generation, slot, segment, offset, nbytes, dimensions, length = fields
    made = real._replace(
        generation=generation if which & 1 else real.generation,
        slot=slot if which & 2 else real.slot,
        segment=segment if which & 4 else real.segment,
        offset=offset if which & 8 else real.offset,
        nbytes=nbytes if which & 16 else real.nbytes,
        shape=tuple([length % (1 << 63)] * (dimensions % 5)) if which & 32 else real.shape,
        dtype=data[42:].decode(errors="replace") if which & 64 else real.dtype,
        arena=real.arena ^ (which >> 7),
    )
    try:
        with shmcast.attach(Handle.from_bytes(made.to_bytes())) as lease:
            lease.array.tobytes()
    except (shmcast.HandleError, shmcast.ArenaGoneError, shmcast.UnsupportedArrayError):
        pass


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (handle, tree, plain, group_message, attach)
}


def _right_handle(data: bytes) -> bytes:
    """The same bytes with magic, version and CRC-32 of a handle."""
    head, rest = MAGIC + bytes([VERSION]) + data[5:6].ljust(1, b"\0"), data[10:]
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest


_kept: list[Handle] = []


def _published() -> Handle:
    if not _kept:
        arena = shmcast.Arena.create("1MiB", segment_bytes="64KiB", max_blocks=64)
        atexit.register(arena.close)
        arena.publish(np.zeros(5000, "uint8"), keep=True)
        _kept.append(arena.publish(np.arange(6000, dtype="float32").reshape(60, 100), keep=True))
    return _kept[0]


# ---- drivers


def corpus(target: str) -> list[bytes]:
    """The inputs that are kept."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def _try(target: str, data: bytes) -> None:
    try:
        TARGETS[target](data)
    except BaseException:
        CRASHES.mkdir(parents=True, exist_ok=True)
        (CRASHES / f"crash-{target}").write_bytes(data)
        raise


def _import_torch() -> None:
    """Where it is installed: once, and not while an input is looked at, which it would take too long for."""
    with contextlib.suppress(shmcast.UnsupportedArrayError):
        tensors.import_torch("fuzz").empty(0)


def _bound_addresses() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES_BYTES, resource.RLIM_INFINITY))


def _hangs(*_: object) -> None:
    raise TimeoutError(f"an input took longer than {INPUT_S_MAX} s")


def _change(rng: random.Random, inputs: list[bytes]) -> bytes:
    data = bytearray(rng.choice(inputs))
    for _ in range(rng.randint(1, 6)):
        at, size = rng.randint(0, len(data)), rng.randint(1, 16)
        match rng.randrange(5):
            case 0:
                other = rng.choice(inputs)
                start = rng.randint(0, len(other))
                data[at:at] = other[start : start + size]
            case 1:
                del data[at : at + size]
            case 2:
                edge = rng.choice((0, 1, 63, 64, 1 << 31, (1 << 32) - 1, 1 << 63, _LOW))
                data[at : at + 8] = edge.to_bytes(8, "little")
            case _:
                data[at : at + 1] = rng.randbytes(1)
    return bytes(data[:INPUT_BYTES_MAX])


def mutate(target: str, seconds: float, seed: int) -> int:
    """The corpus, then changed inputs of it; how many."""
    signal.signal(signal.SIGALRM, _hangs)
    rng, inputs, count = random.Random(seed), corpus(target), 0
    if target == "tree":
        _import_torch()
    _bound_addresses()
    for data in inputs:
        signal.alarm(INPUT_S_MAX)
        _try(target, data)
        signal.alarm(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        signal.alarm(INPUT_S_MAX)
        for _ in range(100):
            _try(target, _change(rng, inputs))
        signal.alarm(0)
        count += 100
    return count


def guided(target: str, seconds: float, seed: int) -> None:
    """By atheris, which ends the process. What it finds worth keeping goes to ``build/fuzz/corpus-TARGET``."""
    found = CRASHES / f"corpus-{target}"
    found.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={int(seconds)}",
        f"-seed={seed or 1}",
        f"-timeout={INPUT_S_MAX}",
        "-print_final_stats=1",
    ]
    options += [f"-max_len={INPUT_BYTES_MAX}", f"-artifact_prefix={CRASHES}/crash-{target}-"]
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / target)], TARGETS[target])
    atheris.Fuzz()


def in_child(arguments: list[str]) -> int:
    """Atheris sees only modules that lie on the path, not those of an editable install; and it leaves without ceremony."""
    sys.path.insert(0, str(HERE.parent))
    import variant

    environment = {**os.environ, **variant.build("plain"), CHILD_VARIABLE: "1"}
    try:
        return subprocess.run([sys.executable, __file__, *arguments], env=environment, check=False).returncode
    finally:
        shmcast.sweep()


def main() -> int:
    target, seconds = sys.argv[1], float(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.SystemRandom().getrandbits(31)
    if atheris is None or seconds == 0:
        print(f"fuzz {target}: {seconds:g} s, seed {seed}, without atheris: changed inputs of the corpus", flush=True)
        print(
            f"fuzz {target}: ok, {mutate(target, seconds, seed)} inputs{' with torch' if 'torch' in sys.modules else ''}"
        )
    elif CHILD_VARIABLE in os.environ:
        guided(target, seconds, seed)
    else:
        print(f"fuzz {target}: {seconds:g} s, seed {seed}, atheris", flush=True)
        return in_child([target, str(seconds), str(seed)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
