"""What decodes bytes of other processes, driven by bytes that nobody has written: ``fuzz.py TARGET SECONDS [SEED]``; with 0 seconds
the corpus alone.

A target takes bytes and returns; an exception that is not one of ours, or a hang, is a find. With the package ``atheris``
(coverage-guided) where it is installed, else with changed inputs of the corpus, seeded. What ends a run is left in
``build/fuzz/crash-TARGET``; put it into ``corpus/TARGET`` with the mend. What a tree's pickle does is not looked at: it
may run any code, as `shmcast.loads` says.
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

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


def _import() -> None:
    # under instrumentation where there is any, so not at the top
    global shmcast, codec, lockstep, meeting, message, Handle, hash128
    import shmcast
    from shmcast import codec, hash128, lockstep, meeting, message
    from shmcast.handle import Handle


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
    """What `loads` does before it unpickles: the frame, the handles and the arrays in it."""
    raw = codec._HEAD.pack(codec.MAGIC, codec.VERSION, hash128(data) & _LOW) + data
    try:
        entries, _ = codec._parse(raw)
    except shmcast.HandleError:
        return
    for tag, start, end in entries[:16]:
        try:
            if tag == codec._HANDLE_TAG:
                codec._attached(_right_handle(raw[start:end]))
            else:
                codec._inlined(raw, start, end)
        except (shmcast.HandleError, shmcast.ArenaError, shmcast.UnsupportedArrayError):
            pass


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
    target.__name__: target for target in (handle, tree, group_message, attach)
}


def _right_handle(data: bytes) -> bytes:
    """The same bytes with magic, version and CRC-32 of a handle."""
    head, rest = b"shmH\1" + data[5:6].ljust(1, b"\0"), data[10:]
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
    for data in inputs:
        _try(target, data)
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
        print(f"fuzz {target}: ok, {mutate(target, seconds, seed)} inputs")
    elif CHILD_VARIABLE in os.environ:
        guided(target, seconds, seed)
    else:
        print(f"fuzz {target}: {seconds:g} s, seed {seed}, atheris", flush=True)
        return in_child([target, str(seconds), str(seed)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
