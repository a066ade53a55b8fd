import sys

from attn_recsys.cli import main

if __name__ == "__main__":
    sys.exit(main())
