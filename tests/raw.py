"""An arena made by hand from `_native` alone, for tests of the core."""

import os
import secrets

from shmcast import _native, names

MIB = 1 << 20
PAYLOAD = bytes(range(256)) * 256  # 64 KiB: has its pages to itself
FOR_EVER = 0


class Raw:
    """An arena made by hand, as Arena does it, with one data segment."""

    def __init__(self, namespace, slots=64, segment_bytes=MIB):
        self.namespace, self.id = namespace, secrets.randbits(64)
        lock_fd = names.create(self.name(0))
        map_fd = self.open(0)
        assert _native.take_owner_byte(lock_fd)
        self.member = _native.Member.create(map_fd, lock_fd, self.open, self.id, names.host_id(), 1 << 30, slots)
        os.close(lock_fd)
        os.close(map_fd)
        self.owner = _native.Owner(self.member)
        self.segments = 0
        self.add_segment(segment_bytes)

    def name(self, number):
        return names.segment_name(self.namespace, self.id, number)

    def open(self, number):
        return self.opened(number)

    def opened(self, number):
        return names.open_readable(self.name(number)) if number else names.open_writable(self.name(0))

    def add_segment(self, size_bytes):
        self.segments += 1
        fd = names.create(self.name(self.segments))
        try:
            self.owner.add_segment(self.segments, fd, size_bytes)
        finally:
            os.close(fd)

    def publish(self, data=PAYLOAD, count=0, tokens=(), keep=False, timeout_ns=FOR_EVER):
        published = self.owner.publish(data, count, tokens, keep, timeout_ns, True)
        return None if published is None else (*published[:4], len(data))

    def attach(self, block):
        return self.member.attach(_native.Lease, *block)

    def used(self, revoke=False):
        self.owner.reclaim(revoke)
        return self.owner.stats()["slots_used"]

    def close(self):
        self.owner.end()
        for number in (*range(1, self.segments + 1), 0):
            names.unlink(self.name(number))


def joined(namespace, arena):
    """The membership of this process in an arena that another one has made."""

    def opener(number):
        name = names.segment_name(namespace, arena, number)
        return names.open_readable(name) if number else names.open_writable(name)

    map_fd, lock_fd = opener(0), opener(0)
    try:
        return _native.Member.join(map_fd, lock_fd, opener, arena)
    finally:
        os.close(map_fd)
        os.close(lock_fd)
