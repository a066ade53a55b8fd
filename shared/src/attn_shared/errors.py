"""What users get wrong, told in one sentence."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The command line prints the message alone and exits with status 2."""

    def __init__(self, message: str = "") -> None:
        # A loader's worker process hands an error on inside of its traceback; the sentence is the last line.
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:
            message = message.rstrip().rpartition("\n")[2].partition(": ")[2]
        super().__init__(message)


class CheckpointError(UserError):
    """A checkpoint that is damaged, unsafe, too new or not this application's."""
