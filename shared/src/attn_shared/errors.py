"""What users get wrong, told in one sentence."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The command line prints the message alone and exits with status 2."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, unsafe, too new or not this application's."""
