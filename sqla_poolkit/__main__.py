"""``python -m sqla_poolkit``: the ``poolkit`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
