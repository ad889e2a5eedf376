"""The tree of errors: what callers who do not know us catch, and that values survive the way."""

import errno
import pickle

import pytest

from shmcast import errors

BUILT_INS = {
    errors.ArenaError: OSError,
    errors.ArenaFullError: OSError,
    errors.HandleError: ValueError,
    errors.StaleHandleError: ValueError,
    errors.IntegrityError: ValueError,
    errors.UnsupportedArrayError: TypeError,
    errors.GroupError: RuntimeError,
    errors.PeerLostError: RuntimeError,
    errors.GroupTimeoutError: TimeoutError,
    errors.MaterializeError: RuntimeError,
    errors.BackpressureError: RuntimeError,
}


@pytest.mark.parametrize("kind", BUILT_INS, ids=lambda kind: kind.__name__)
def test_caught_by_the_built_in_and_by_ours(kind: type[Exception]) -> None:
    for catcher in (BUILT_INS[kind], errors.ShmcastError):
        with pytest.raises(catcher, match="what happened"):
            raise kind("what happened")


def test_errno_is_kept() -> None:
    error = errors.ArenaFullError(errno.ENOSPC, "publish 1 byte: full")
    assert error.errno == errno.ENOSPC
    assert "publish 1 byte: full" in str(error)


@pytest.mark.parametrize("kind", BUILT_INS, ids=lambda kind: kind.__name__)
def test_survives_pickling(kind: type[Exception]) -> None:
    again = pickle.loads(pickle.dumps(kind("what happened")))
    assert type(again) is kind
    assert str(again) == "what happened"


def test_a_materialize_error_takes_its_parts_along() -> None:
    error = errors.MaterializeError.of(("a", 1), "OSError", "broken data stream", "Traceback ...")
    assert str(error) == "materialize request ('a', 1): OSError: broken data stream"
    again = pickle.loads(pickle.dumps(error))
    assert (again.rid, again.kind, again.text, again.traceback) == (
        ("a", 1),
        "OSError",
        "broken data stream",
        "Traceback ...",
    )
    assert str(again) == str(error)
