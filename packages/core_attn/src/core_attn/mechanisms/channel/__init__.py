"""Attention that weighs features instead of reading between tokens."""
