"""FASTA files: streamed in pieces, whole records, and genomes whose places can be asked for.

Reading is strict, so that a file that is no DNA is told as such with its line: HTSlib itself skips what stands before
the first record and takes any letter. HTSlib (pysam) unpacks blocks of bgzip and serves indexed files.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from attn_genomics.tokens import N, encode
from attn_shared.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 20
_READ = 1 << 20
_LONGEST_HEADER = 1_000_000
_IN_MEMORY = 256 << 20  # bytes of a file from which an index is used instead
NUCLEOTIDES = b"ACGTUNRYSWKMBDHVXacgtunryswkmbdhvx"
AMINO_ACIDS = b"EFILPQZJOefilpqzjo"
_GAPS = b"-.*~"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a record.

    Attributes:
        name: of the record: the first word behind ">".
        start: place in the record of the first base.
        codes: uint8, see `attn_genomics.tokens`; empty only in an empty record.
        last: whether the record ends with it.
        line: of the file on which the record begins.
    """

    name: str
    start: int
    codes: np.ndarray
    last: bool
    line: int


def is_gzip(path: Path) -> bool:
    """Whether a file begins as gzip does; bgzip does, too."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def is_bgzip(path: Path) -> bool:
    """Whether a file is written in the blocks of bgzip, which can be indexed."""
    with path.open("rb") as file:
        head = file.read(18)
    return head[:4] == b"\x1f\x8b\x08\x04" and head[12:14] == b"BC"


def open_bytes(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked where it is gzip or bgzip, whatever its name says.

    Raises:
        UserError: no such file, or it cannot be opened.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file")
        return gzip.open(path, "rb") if is_gzip(path) else path.open("rb")  # type: ignore[return-value]
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def read_blocks(path: Path) -> Iterator[bytes]:
    """A file's text in blocks, line ends made "\\n".

    Raises:
        UserError: it cannot be read, or is damaged gzip.
    """
    with open_bytes(path) as file:
        held = b""  # a "\r" at the end of a block may be half of a line end
        while True:
            try:
                block = file.read(_READ)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path.name} is damaged or cut off: it cannot be unpacked ({error})") from None
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
            if not block:
                if held:
                    yield b"\n"
                return
            block, held = held + block, b""
            if b"\r" in block:
                if block.endswith(b"\r"):
                    block, held = block[:-1], b"\r"
                block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            yield block


def stream(path: Path, *, piece: int = PIECE, distinct: bool = True) -> Iterator[Piece]:
    """A FASTA file's records in pieces, in one pass: memory does not grow with the file.

    Args:
        path: plain, gzip or bgzip.
        piece: bases of a piece at most; every piece of a record but its last has as many.
        distinct: refuse two records of one name.

    Raises:
        UserError: no FASTA file of nucleotides, with the line.
    """
    path = Path(path)
    return _Reader(path, piece, distinct).pieces()


class _Reader:
    def __init__(self, path: Path, piece: int, distinct: bool) -> None:
        self.path, self.piece = path, piece
        self.seen: dict[str, int] | None = {} if distinct else None
        self.name, self.began = "", 0
        self.start = 0
        self.held: list[np.ndarray] = []
        self.count = 0
        self.line = 1

    def pieces(self) -> Iterator[Piece]:
        rest, first, inside = b"", True, False  # inside = the text so far ends within a line of sequence
        for block in read_blocks(self.path):
            if first:
                block = block.removeprefix(b"\xef\xbb\xbf")
                self._check_start(block)
                first = False
            text = rest + block
            cut = text.rfind(b"\n") + 1
            header = text.startswith(b">", cut) and (cut > 0 or not inside)  # which may go on in the next block
            end = cut if header else len(text)
            rest = text[end:]
            if len(rest) > _LONGEST_HEADER:
                raise UserError(f"{self.path.name}:{self.line}: a header of more than a million letters")
            yield from self._take(text[:end], inside)
            if end:
                inside = text[end - 1] != 10
        if first:
            raise UserError(f"{self.path.name} is empty")
        yield from self._take(rest, inside)
        if not self.name:
            raise UserError(f"{self.path.name} is empty but for white space")
        yield self._rest()

    def _check_start(self, block: bytes) -> None:
        where = f"{self.path.name}:1"
        head = block.lstrip()[:1]
        if head in (b">", b""):
            return
        if head == b"@":
            raise UserError(f"{where}: begins with '@' as FASTQ does; FASTA begins with '>'")
        if b"\0" in block[:4096]:
            raise UserError(f"{self.path.name} is binary, not FASTA")
        raise UserError(f"{where}: no FASTA, which begins with '>' and a name")

    def _take(self, text: bytes, inside: bool) -> Iterator[Piece]:
        """Text that begins with a line, or `inside` a line of sequence; headers in it are whole."""
        at = 0
        while at < len(text):
            if text[at] == 62 and (at > 0 or not inside):  # ">"
                end = text.find(b"\n", at)
                end = len(text) if end < 0 else end
                yield from self._header(text[at + 1 : end])
            else:
                end = text.find(b"\n>", at) + 1 or len(text)
                yield from self._sequence(text[at:end])
            at = end

    def _header(self, text: bytes) -> Iterator[Piece]:
        if self.name:
            yield self._rest()
        words = text.split(None, 1)
        if not words or text[:1].isspace():
            raise UserError(f"{self.path.name}:{self.line}: a record without a name behind '>'")
        self.name = words[0].decode("utf-8", "replace")
        if self.seen is not None:
            if self.name in self.seen:
                raise UserError(
                    f"{self.path.name}:{self.line}: a second record {self.name!r}, as on line {self.seen[self.name]}; "
                    "give each its own name"
                )
            self.seen[self.name] = self.line
        self.began, self.start, self.count, self.held = self.line, 0, 0, []

    def _sequence(self, text: bytes) -> Iterator[Piece]:
        letters = text.translate(None, b"\n\t \x0b\x0c")
        if letters:
            strange = letters.translate(None, NUCLEOTIDES)
            if strange:
                raise self._refusal(text, strange[:1])
            if not self.name:
                raise UserError(f"{self.path.name}:{self.line}: a sequence before the first '>'")
            self.held.append(encode(letters))
            self.count += len(letters)
            if self.count > self.piece:
                yield from self._full()
        self.line += text.count(b"\n")

    def _full(self) -> Iterator[Piece]:
        codes = np.concatenate(self.held)
        at = 0
        while len(codes) - at > self.piece:  # what may be the last stays
            yield Piece(
                name=self.name, start=self.start, codes=codes[at : at + self.piece], last=False, line=self.began
            )
            at += self.piece
            self.start += self.piece
        self.held, self.count = [codes[at:]], len(codes) - at

    def _rest(self) -> Piece:
        codes = np.concatenate(self.held) if self.held else np.empty(0, np.uint8)
        return Piece(name=self.name, start=self.start, codes=codes, last=True, line=self.began)

    def _refusal(self, text: bytes, letter: bytes) -> UserError:
        line = self.line + text[: text.index(letter)].count(b"\n")
        where, shown = f"{self.path.name}:{line}", letter.decode("latin-1")
        if letter in AMINO_ACIDS:
            return UserError(f"{where}: {shown!r} is an amino acid's letter; the file holds protein, not DNA")
        if letter in _GAPS:
            return UserError(f"{where}: {shown!r} is no nucleotide; take gaps and stops out of the sequences first")
        if letter == b">":
            return UserError(f"{where}: '>' inside a line; a record begins on a line of its own")
        if letter == b";":
            return UserError(f"{where}: ';' comments are not read; take them out")
        if letter == b"\0":
            return UserError(f"{where}: a zero byte; the file is binary or damaged, not FASTA")
        return UserError(f"{where}: {shown!r} is no nucleotide")


def records(path: Path, *, distinct: bool = True) -> Iterator[tuple[str, np.ndarray]]:
    """A FASTA file's records whole: name and uint8 codes.

    Raises:
        UserError: as `stream`.
    """
    held: list[np.ndarray] = []
    for piece in stream(path, distinct=distinct):
        held.append(piece.codes)
        if piece.last:
            yield piece.name, held[0] if len(held) == 1 else np.concatenate(held)
            held = []


class Genome:
    """A FASTA file whose places can be asked for.

    A file of up to 256 MB is checked and kept in memory, one byte a base. A larger one is served by HTSlib through its
    index (.fai, for bgzip also .gzi), which is made where it is missing and the folder can be written; where that does
    not work, as with plain gzip, it is kept in memory all the same.

    Attributes:
        path: of the file.
        names: of the records, in order.
        lengths: name -> bases.
        empty: names of records without bases.
    """

    def __init__(self, path: Path, *, in_memory: bool | None = None) -> None:
        self.path = Path(path)
        self._codes: dict[str, np.ndarray] = {}
        self._file: Any = None
        if not self.path.is_file():
            with open_bytes(self.path):  # the same sentence as everywhere
                pass
        if in_memory is None:
            in_memory = self.path.stat().st_size <= _IN_MEMORY
        if not in_memory:
            self._file = _indexed(self.path)
        if self._file is None:
            self._codes = dict(records(self.path))
            self.names = list(self._codes)
            self.lengths = {name: len(codes) for name, codes in self._codes.items()}
        else:
            self.names = list(self._file.references)
            self.lengths = dict(zip(self.names, self._file.lengths))
        self.empty = [name for name in self.names if not self.lengths[name]]
        if len(self.empty) == len(self.names):
            raise UserError(f"{self.path.name} holds records but no bases")

    def __len__(self) -> int:
        """Bases of all records."""
        return sum(self.lengths.values())

    @property
    def indexed(self) -> bool:
        """Whether HTSlib serves the file; otherwise it is in memory."""
        return self._file is not None

    def fetch(self, name: str, start: int = 0, end: int | None = None) -> np.ndarray:
        """uint8 codes of the places `start` to `end` (excluded) of a record, counted from 0.

        Raises:
            KeyError: no such record.
            ValueError: places that the record does not have.
        """
        length = self.lengths[name]
        end = length if end is None else end
        if not 0 <= start <= end <= length:
            raise ValueError(f"{name}:{start}-{end} is not within its {length} bases")
        if self._file is None:
            return self._codes[name][start:end]
        return encode(self._file.fetch(name, start, end)) if end > start else np.empty(0, np.uint8)

    def match(self, name: str) -> str | None:
        """The record that a name of another file means: the same, or with or without "chr" (chr1 and 1, chrM and MT).

        None where there is none.
        """
        return match_name(name, self.lengths)


_MITOCHONDRIA = ("M", "MT", "Mito", "Mt")


def match_name(name: str, known: Any) -> str | None:
    """See `Genome.match`."""
    if name in known:
        return name
    bare = name[3:] if name[:3].lower() == "chr" else name
    ways = [bare, *(f"{prefix}{bare}" for prefix in ("chr", "Chr", "CHR"))]
    if bare in _MITOCHONDRIA:
        ways += [f"{prefix}{one}" for one in _MITOCHONDRIA for prefix in ("", "chr")]
    return next((way for way in ways if way and way in known), None)


def _indexed(path: Path) -> Any:
    """HTSlib's file with its index, or None where it cannot be indexed."""
    import pysam

    if is_gzip(path) and not is_bgzip(path):
        return None
    index = path.with_name(path.name + ".fai")
    quiet = pysam.set_verbosity(0)
    try:
        if not index.is_file() or index.stat().st_mtime < path.stat().st_mtime:
            pysam.faidx(str(path))
        return pysam.FastaFile(str(path))
    except (OSError, ValueError, pysam.SamtoolsError):
        return None  # a folder that cannot be written, or lines of different lengths
    finally:
        pysam.set_verbosity(quiet)


class Sequences:
    """Sequences of any lengths, one behind the other.

    Args:
        codes: uint8 arrays.

    Attributes:
        flat: uint8, all bases.
        start: (N + 1,) where each begins.
    """

    def __init__(self, codes: Sequence[np.ndarray]) -> None:
        self.flat = np.concatenate(codes) if len(codes) else np.empty(0, np.uint8)
        self.start = np.concatenate([[0], np.cumsum([len(one) for one in codes], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.start[row] : self.start[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(N,) bases of each."""
        return np.diff(self.start)

    def take(self, rows: np.ndarray) -> Sequences:
        """Some of them, in the order of `rows`."""
        return Sequences([self[row] for row in rows])

    def gather(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B, L) int64 codes of some of them, filled with N behind shorter ones, and (B,) lengths."""
        import torch

        rows = np.asarray(rows, np.int64)
        first = self.start[rows]
        lengths = self.start[rows + 1] - first
        place = np.arange(int(lengths.max()) if len(rows) else 0)
        real = place < lengths[:, None]
        codes = np.full(real.shape, N, np.int64)
        codes[real] = self.flat[(first[:, None] + place)[real]]
        return torch.from_numpy(codes), torch.from_numpy(lengths)


def turned(codes: np.ndarray) -> np.ndarray:
    """The other strand of uint8 codes, read in its own direction."""
    return np.where(codes < N, 3 - codes, codes)[::-1].astype(np.uint8)
