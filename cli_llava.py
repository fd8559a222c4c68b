"""Talk with a vision-language model about an image: see --help."""

import sys

from localization_heads.apps.chat import main

if __name__ == "__main__":
    sys.exit(main())
