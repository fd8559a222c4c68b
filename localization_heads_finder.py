"""Find localization heads and ground expressions with them: see --help."""

import sys

from localization_heads.apps.finder import finder

if __name__ == "__main__":
    sys.exit(finder())
