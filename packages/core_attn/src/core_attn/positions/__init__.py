"""Where tokens stand, as seen by queries and keys."""

from core_attn.positions.rotary import rotary

__all__ = ["rotary"]
