"""`python -m attn_medseg`: the command `medseg`."""

import sys

from attn_medseg.cli import main

sys.exit(main())
