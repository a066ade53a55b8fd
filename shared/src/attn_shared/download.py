"""Fetching one file over HTTP: resumed where it stopped, checked by SHA-256, put in place whole or not at all.

Imports no torch: `data fetch` starts at once.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import shutil
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from attn_shared.errors import UserError

_CHUNK = 1 << 20


class DownloadError(UserError):
    """A file that could not be fetched. `part` bytes may lie beside the target and are used by the next attempt."""


class _Retry(Exception):
    """A failure that another attempt may cure."""


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(
    url: str,
    target: Path,
    *,
    checksum: str | None = None,
    size: int | None = None,
    attempts: int = 4,
    pause: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """Fetch `url` into `target`.

    What has arrived lies in `<target>.part`, and the next attempt or the next call goes on from there. Parts are
    joined only where a checksum can prove the whole; without one, every attempt starts anew.

    Args:
        checksum: SHA-256 the file must have.
        size: bytes the file must have.
        attempts: tries before giving up, for failures that may pass (connection, time-out, busy server).
        pause: seconds before the second try, doubled each time.
        timeout: seconds without a byte before a connection counts as lost.

    Raises:
        DownloadError: not to be had, not what it should be, or no room for it; `target` is then untouched.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"cannot fetch {url}: only http and https addresses are fetched")
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as file:
            if checksum is None:
                file.truncate(0)
            _fetch_all(url, file, target, checksum, size, attempts, pause, timeout)
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"the disk is full: cannot write {target.name} into {target.parent}; make room and fetch again, "
                "the part that has arrived is kept"
            ) from None
        raise DownloadError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def _fetch_all(
    url: str,
    file: BinaryIO,
    target: Path,
    checksum: str | None,
    size: int | None,
    attempts: int,
    pause: float,
    timeout: float,
) -> None:
    """Fill `file` with the whole, checked content."""
    fresh = file.seek(0, os.SEEK_END) == 0
    failures = 0
    while True:
        try:
            # A part that is whole already (stopped between the last byte and the renaming) needs no connection.
            if not (size is not None and checksum is not None and file.seek(0, os.SEEK_END) == size):
                _fetch_rest(url, file, target, timeout)
            problem = _wrong(file, checksum, size)
            if problem is None:
                return
            file.truncate(0)
            if fresh:
                raise DownloadError(
                    f"{url} did not give the expected file ({problem}): it was changed at its source or on the way; "
                    "nothing was kept"
                )
            fresh = True  # a stale part spoilt it: once more, from the start
        except _Retry as failure:
            failures += 1
            if failures >= attempts:
                raise DownloadError(f"cannot fetch {url}: {failure}") from None
            print(f"{target.name}: {failure}; trying again", file=sys.stderr)
            time.sleep(pause * 2 ** (failures - 1))
            if checksum is None:
                file.truncate(0)


def _fetch_rest(url: str, file: BinaryIO, target: Path, timeout: float) -> None:
    """One connection: append what is missing.

    Raises:
        _Retry: the connection failed or ended early.
        DownloadError: the server will not give the file.
    """
    have = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "attention-atlas", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
            if have and not (
                answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            ):
                file.truncate(0)  # the server sends the whole
                have = file.seek(0)
            length = answer.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() else None
            _room(target, total, have)
            _copy(answer, file, target.name, have, total)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing after `have`: the part is whole or too long, the check decides
            return
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Retry(f"the server answered {error.code} {error.reason}") from None
        if error.code in (404, 410):
            raise DownloadError(f"{url} does not exist (any more): the server answered {error.code}") from None
        raise DownloadError(f"{url} was refused: the server answered {error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _Retry(_reason(error)) from None


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, name: str, have: int, total: int | None) -> None:
    progress = _Progress(name, have, total)
    try:
        while chunk := answer.read1(_CHUNK):
            file.write(chunk)
            have += len(chunk)
            progress.show(have)
    finally:
        file.flush()
        progress.end(have)
    if total is not None and have < total:
        raise _Retry(f"the connection ended after {have:,} of {total:,} bytes")


def _wrong(file: BinaryIO, checksum: str | None, size: int | None) -> str | None:
    """What is wrong with the content, or None."""
    have = file.seek(0, os.SEEK_END)
    if size is not None and have != size:
        return f"{have:,} bytes where {size:,} were expected"
    if checksum is not None:
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if found != checksum.lower():
            return f"SHA-256 {found} where {checksum.lower()} was expected"
    return None


def _room(target: Path, total: int | None, have: int) -> None:
    if total is not None and shutil.disk_usage(target.parent).free < total - have:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, socket.gaierror):
        return "the server's name cannot be resolved; is there a network?"
    if isinstance(reason, TimeoutError):
        return "the server does not answer in time"
    if isinstance(reason, ConnectionRefusedError):
        return "the server refuses the connection"
    if isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return "the server cannot be reached; is there a network?"
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return f"the connection failed ({text})"


class _locked:
    """The part file, open for reading and writing and held by this process alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> BinaryIO:
        self.file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        with suppress(ImportError):  # no such locks on Windows
            import fcntl

            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The other process may have put its file in place between our opening and our locking.
                mine = os.path.exists(self.path) and os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
            except BlockingIOError:
                mine = False
            if not mine:
                self.file.close()
                raise DownloadError(
                    f"another process is fetching {self.path.name.removesuffix('.part')} into {self.path.parent}; "
                    "wait for it to end"
                ) from None
        return self.file

    def __exit__(self, *_: object) -> None:
        empty = self.file.seek(0, os.SEEK_END) == 0
        self.file.close()
        if empty:
            with suppress(OSError):
                self.path.unlink()


class _Progress:
    """One line on stderr, redrawn in a terminal; elsewhere only its last state."""

    def __init__(self, name: str, start: int, total: int | None) -> None:
        self.name, self.start, self.total = name, start, total
        self.began = self.drawn = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def _line(self, have: int) -> str:
        rate = (have - self.start) / max(time.monotonic() - self.began, 1e-3)
        whole = f" of {readable(self.total)} ({100 * have // max(self.total, 1)} %)" if self.total is not None else ""
        return f"{self.name}: {readable(have)}{whole}, {readable(rate)}/s"

    def show(self, have: int) -> None:
        if self.terminal and time.monotonic() - self.drawn > 0.2:
            self.drawn = time.monotonic()
            print(f"\r\x1b[K{self._line(have)}", end="", file=sys.stderr, flush=True)

    def end(self, have: int) -> None:
        print(f"{chr(13) + chr(27) + '[K' if self.terminal else ''}{self._line(have)}", file=sys.stderr)


def readable(count: float) -> str:
    """Bytes for people: 1,536 -> '1.5 kB'; decimal units, as download pages use them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
