"""`python -m core_attn` is the `core-attn` command."""

from core_attn.cli import main

raise SystemExit(main())
