"""`python -m localization_heads`: the finder, as `locheads`."""

import sys

from localization_heads.apps.finder import finder

if __name__ == "__main__":
    sys.exit(finder())
