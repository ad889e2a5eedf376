"""`broadcast_pyobj`: the function of that name that serving engines broadcast requests with, over shared memory.

The first call for a process group and a source makes a `Group`, which is collective, as the call itself is; it is used
until its process group is destroyed or `close_groups` is called. Where the ranks do not share memory, or a process group
moves no host memory, everything is pickled, as the engines do.
"""

from typing import Any

from .group import Group
from .own_arena import configured_max_bytes
from .parts import TakeIn

_groups: dict[tuple[int, int], tuple[Any, Group]] = {}
"""By id of the process group and source. The process group is kept along, so that no other one gets its id."""


def broadcast_pyobj(
    data: list[Any] | None,
    rank: int,
    group: Any = None,
    src: int = 0,
    force_cpu_device: bool = True,
    *,
    dist_group: Any = None,
) -> list[Any]:
    """Broadcast a list of picklable objects from one rank of a process group to its others. Collective.

    ``data``: on the source; elsewhere it is ignored and may be None. ``rank``: this process's rank in the default group.
    ``group``: the cpu group, also as ``dist_group``; None: the default group. ``src``: the source's rank in the default
    group, also where ``group`` is a part of it. ``force_cpu_device=False``: by torch alone, over the group's own device.

    Returns ``data`` itself on the source, [] for None; on the other ranks what was sent, with large arrays as views: ndarrays
    are read-only, tensors copy what they write. Raises as `Group.broadcast` and `Group` do; ValueError where ``rank`` or
    ``src`` do not fit the group."""
    return broadcast_list(data, rank, dist_group if group is None else group, src, force_cpu_device)[0]


def broadcast_list(
    data: list[Any] | None,
    rank: int,
    group: Any,
    src: int,
    force_cpu_device: bool = True,
    *,
    max_bytes: int | str | None = None,
    take_in: TakeIn | None = None,
) -> tuple[list[Any], int]:
    """`broadcast_pyobj`, and what some rank could not take in of the list; see `Group.broadcast`. ``take_in`` is not called for an
    empty list, nor for what goes by torch alone. ``max_bytes``: of the source's arena, where one is made for it."""
    from .channels import group as torch_groups

    process_group = torch_groups.resolve(group)
    is_source = rank == src
    _, known = _groups.get((id(process_group), src), (None, None))
    entry = torch_groups.rank_in(process_group, src) if known is None else known.entry
    own = torch_groups.rank_of(process_group) if known is None else known.rank
    if is_source != (own == entry):
        raise ValueError(
            f"broadcast_pyobj: rank {rank} and src {src} are ranks in the default group, where this process has rank "
            f"{torch_groups.global_rank()}"
        )
    if is_source and data is None:
        data = []
    failures = 0
    if not force_cpu_device or (known is None and not torch_groups.has_cpu(process_group)):
        received = torch_groups.broadcast_object(data if is_source else None, process_group, src)
    else:
        ours = known or group_for(process_group, src, entry, max_bytes)
        received = ours.broadcast(data, local=True, nothing=not data, take_in=take_in) or []
        failures = ours.failures
    result: list[Any] = data if is_source and data is not None else received
    return result, failures


def close_groups() -> None:
    """Close all groups that were made here, with their arenas. Views stay valid. Not collective; a later call makes new
    groups, so all ranks of a process group do it between the same two calls."""
    while _groups:
        _, (_, group) = _groups.popitem()
        group.close()


def group_for(process_group: Any, src: int, entry: int, max_bytes: int | str | None = None) -> Group:
    """The group behind a process group and a source, made by the first call, which is collective. ``max_bytes``: of its
    arena, where it is made; None: as it is configured."""
    key = (id(process_group), src)
    found = _groups.get(key)
    if found is not None:
        return found[1]
    _close_destroyed()
    group = Group(
        process_group, entry, max_bytes=max_bytes or configured_max_bytes(), fallback="object", channel="auto"
    )
    _groups[key] = process_group, group
    return group


def _close_destroyed() -> None:
    from .channels.group import is_alive

    for key, (process_group, group) in list(_groups.items()):
        if not is_alive(process_group):
            del _groups[key]
            group.close()
