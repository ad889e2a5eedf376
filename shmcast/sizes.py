"""Amounts of memory as people write them: ``"2GiB"``, ``"64 MB"``, ``4096``."""

import re
from fractions import Fraction

MAX_BYTES_VARIABLE = "SHMCAST_MAX_BYTES"
"""Environment variable: size of arenas that are made without anybody asking for one; "2GiB" where it is not set."""

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}ib": 1 << 10 * power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(size: int | str, name: str) -> int:
    """Bytes in ``size``, a count or a text such as "1.5GiB" or "64 MB"; ``name`` is what the error calls it."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"{name}: a number of bytes or a text such as '2GiB', not {size!r}")
    if isinstance(size, int):
        amount = size
    else:
        found = _SIZE.fullmatch(size)
        unit = _UNITS.get(found[2].lower()) if found else None
        if found is None or unit is None:
            raise ValueError(f"{name}: {size!r} is not a size; write it as 67108864, '64MiB' or '2GB'")
        amount = int(Fraction(found[1]) * unit)
    if not 0 < amount < 1 << 63:
        raise ValueError(f"{name}: {size!r} is outside of 1 byte .. 2**63 - 1 bytes")
    return amount


def format_bytes(amount: int) -> str:
    """``"10485760 bytes (10.0 MiB)"``: exact and readable."""
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if amount >= 1 << 10 * power:
            return f"{amount} bytes ({amount / (1 << 10 * power):.1f} {prefix}iB)"
    return f"{amount} bytes"
