"""Draw attention maps and their components: see --help."""

import sys

from localization_heads.apps.commands import visualize

if __name__ == "__main__":
    sys.exit(visualize())
