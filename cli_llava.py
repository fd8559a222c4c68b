"""Talk with a vision-language model about a picture: see --help."""

import sys

from localization_heads.apps.chat import main

if __name__ == "__main__":
    sys.exit(main())
