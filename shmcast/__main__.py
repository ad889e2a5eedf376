"""``python -m shmcast``: the same as the console script."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
