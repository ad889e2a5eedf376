"""How shmcast-gc ends."""

DONE = 0
"""Nothing is left that should be gone."""
LEFT = 1
"""Something should be gone and could not be removed."""
NOT_BEGUN = 2
"""Nothing was done; argparse's own code."""
WOULD_REMOVE = 3
"""A dry run that found something."""


class NotBegunError(Exception):
    """Nothing was done; the text says why and what to do."""
