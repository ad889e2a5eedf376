"""`Sender`: how the entry rank encodes what goes to the other ranks, by the way that a request goes."""

from typing import Any

from .codec import Encoded
from .group import Group
from .in_place import InPlace
from .modes import Way
from .request import Request
from .tally import Tally


class Sender:
    """Encodes values for all ranks."""

    def __init__(self, group: Group, tally: Tally, inline_bytes: int = 0) -> None:
        """``inline_bytes``: arrays of one value that are fewer bytes together travel in the message."""
        self._group = group
        self._tally = tally
        self._inline_bytes = inline_bytes

    def prepare(self, request: Request, value: Any, in_place: InPlace | None = None) -> Encoded:
        """``in_place``: where it was made, if it was. Errors as for `Group.prepare`."""
        inline = request.route.way is not Way.SHM
        part = self._group.prepare(value, in_place, inline=inline, inline_below=self._inline_bytes)
        self._tally.add("inline_results", part.inlined)
        return part
