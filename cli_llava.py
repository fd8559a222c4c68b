"""Talk with a vision-language model about an image: see --help."""

import sys

from localization_heads.apps.commands import chat

if __name__ == "__main__":
    sys.exit(chat())
