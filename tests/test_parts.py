"""What a rank says of the parts of a message that it could not take in."""

from __future__ import annotations

from typing import Any

import pytest

from shmcast.parts import ALL_BITS, LAST_BIT, Parts, rebuild


def refuse(*numbers: int, error: type[BaseException] = ValueError) -> Any:
    def loads(raw: memoryview) -> int:
        number = int(bytes(raw))
        if number in numbers:
            raise error(f"part {number}")
        return number

    return loads


def parts_of(count: int, loads: Any, take_in: Any = None) -> Parts:
    return rebuild([memoryview(b"%d" % number) for number in range(count)], loads, None, take_in)


def test_each_part_has_a_bit_and_the_last_one_stands_for_the_rest() -> None:
    parts = parts_of(LAST_BIT + 3, refuse(1, LAST_BIT, LAST_BIT + 2))
    assert parts.failures == 1 << 1 | 1 << LAST_BIT
    assert parts.values[:3] == [0, None, 2]
    assert sorted(parts.causes) == [1, LAST_BIT, LAST_BIT + 2]
    assert parts.interrupt is None


def test_an_interrupt_loses_all_of_them() -> None:
    # It is raised in place of them all, so no other rank may have any.
    parts = parts_of(3, refuse(1, error=KeyboardInterrupt))
    assert isinstance(parts.interrupt, KeyboardInterrupt)
    assert parts.failures == ALL_BITS


def test_what_was_not_taken_in_stands_behind_the_tree() -> None:
    assert parts_of(1, refuse(), lambda value: 0b101).failures == 0b1010
    assert parts_of(1, refuse(), lambda value: (1 << 63) - 1).failures == ALL_BITS - 1


@pytest.mark.parametrize("answer", [-1, 1 << 63, "none", None])
def test_an_answer_that_is_none_fails_the_tree(answer: Any) -> None:
    parts = parts_of(1, refuse(), lambda value: answer)
    assert parts.failures == 1
    assert isinstance(parts.causes[0], (ValueError, TypeError))
