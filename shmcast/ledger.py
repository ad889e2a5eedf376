"""`Ledger`: which requests are pending, in one order on every rank, and whether the ranks agree on that.

Has no lock of its own: its caster's guards it.
"""

from collections import deque
from collections.abc import Hashable

from . import lockstep
from .lockstep import Head

CALLS = {lockstep.STEP: "step", lockstep.CAST: "cast"}


class Ledger:
    """Requests by their serial numbers and ids, from `enter` to `leave`."""

    def __init__(self, decides: bool) -> None:
        """``decides``: whether this is the entry rank, so that what messages say is its own."""
        self._decides = decides
        self.pending: dict[Hashable, int] = {}
        """Serial numbers by id, in the order in which they came."""
        self.rids: dict[int, Hashable] = {}
        """Ids by serial number."""
        self.submitted = 0
        """How many have ever come."""
        self.names = 0
        """Of all that have ever come, see `lockstep.chain`."""
        # Of the last message and after: (submitted, names), to compare with what the next one says.
        self._marks: deque[tuple[int, int]] = deque([(0, 0)])

    def enter(self, rid: Hashable) -> int:
        """The serial number of one more request. Raises what the id's own parts raise; then nothing has happened."""
        chained = lockstep.chain(self.names, rid)
        serial = self.submitted
        self.submitted += 1
        self.names = chained
        if not self._decides:
            self._marks.append((self.submitted, self.names))
        self.pending[rid] = serial
        self.rids[serial] = rid
        return serial

    def leave(self, serial: int) -> Hashable:
        """The id of a request that has ended."""
        rid = self.rids.pop(serial)
        del self.pending[rid]
        return rid

    def clear(self) -> None:
        """Forget what is pending."""
        self.pending.clear()
        self.rids.clear()

    def disagreement(self, said: Head, call: int, exact: bool) -> str:
        """What is not the same here as on the entry rank; "" if all is. ``exact``: this rank makes the call that the entry
        rank has made the message in, so both were given the same."""
        if said.call != call:
            return f"the entry rank is in {CALLS[said.call]}(), this rank in {CALLS[call]}()"
        if not self._decides:
            if said.submitted > self.submitted or (exact and said.submitted != self.submitted):
                return (
                    f"{self.submitted} requests were submitted here so far, {said.submitted} on the entry rank: all ranks "
                    "submit the same between the same two steps"
                )
            while self._marks[0][0] < said.submitted:
                self._marks.popleft()
            if self._marks[0] != (said.submitted, said.names):
                return (
                    f"of the first {said.submitted} requests the ids are not the same here as on the entry rank, or in another "
                    "order"
                )
        unknown = [record.serial for record in said.records if record.serial not in self.rids]
        if unknown:
            return f"outcomes of requests {unknown} came (counted from 0), which are not pending here"
        return ""
