import sys

from attn_eeg.cli import main

if __name__ == "__main__":
    sys.exit(main())
