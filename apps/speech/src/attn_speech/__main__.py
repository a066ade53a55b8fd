import sys

from attn_speech.cli import main

if __name__ == "__main__":
    sys.exit(main())
