"""Materialize a multimodal request once, share it with every tensor-parallel rank on the host.

Whoever materializes arrays publishes them into shared memory that is already mapped and warm, sends a handle of about
100 bytes, and every other process maps the same pages read-only. Start with `Arena`, `attach`, `Group` and `Caster`;
`metrics` says what they have done.
"""

from . import _native
from . import metrics as metrics
from .arena import Arena
from .attach import Lease, attach, digest, process_token
from .caster import Caster
from .codec import dumps, loads, share
from .compat import broadcast_pyobj
from .errors import (
    ArenaError,
    ArenaFullError,
    ArenaGoneError,
    BackpressureError,
    GroupError,
    GroupTimeoutError,
    HandleError,
    IntegrityError,
    LayoutMismatchError,
    MaterializeError,
    PeerLostError,
    ShmcastError,
    StaleHandleError,
    UnsupportedArrayError,
)
from .futures import FutureCaster
from .group import Group
from .handle import Handle
from .keys import key_of
from .outcome import Outcome
from .reservation import Reservation
from .stages import point_to_point_pyobj
from .sweep import SweepReport, sweep

hash128 = _native.hash128

__version__ = "0.1.0"

__all__ = [
    "Arena",
    "Handle",
    "Lease",
    "Reservation",
    "attach",
    "dumps",
    "loads",
    "share",
    "hash128",
    "digest",
    "process_token",
    "sweep",
    "SweepReport",
    "Group",
    "Caster",
    "Outcome",
    "FutureCaster",
    "key_of",
    "broadcast_pyobj",
    "point_to_point_pyobj",
    "ShmcastError",
    "ArenaError",
    "ArenaFullError",
    "ArenaGoneError",
    "LayoutMismatchError",
    "HandleError",
    "StaleHandleError",
    "IntegrityError",
    "UnsupportedArrayError",
    "GroupError",
    "PeerLostError",
    "GroupTimeoutError",
    "MaterializeError",
    "BackpressureError",
    "__version__",
]
