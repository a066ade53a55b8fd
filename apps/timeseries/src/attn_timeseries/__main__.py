import sys

from attn_timeseries.cli import main

if __name__ == "__main__":
    sys.exit(main())
