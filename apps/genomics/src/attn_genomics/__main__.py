import sys

from attn_genomics.cli import main

if __name__ == "__main__":
    sys.exit(main())
