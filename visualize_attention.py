"""Draw attention maps and their components: see --help."""

import sys

from localization_heads.apps.visualize import main

if __name__ == "__main__":
    sys.exit(main())
