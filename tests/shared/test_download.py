"""download.py against a server on this machine that behaves well, badly, and worse."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from attn_shared import download as module
from attn_shared.download import DownloadError, download, readable

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SUM = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server.behaviour  # type: ignore[attr-defined]
        asked = self.headers.get("Range")
        server.requests.append(asked)
        if server.errors:
            code = server.errors.pop(0)
            if code:
                self.send_error(code)
                return
        start = 0
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts:
            body = body[: server.cuts.pop(0)]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up is part of the tests
    behaviour = SimpleNamespace(content=CONTENT, ranges=True, errors=[], cuts=[], requests=[])
    behaviour.url = f"http://127.0.0.1:{http.server_port}/file.bin"
    http.behaviour = behaviour  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield behaviour
    http.shutdown()
    thread.join()
    http.server_close()


def get(server: SimpleNamespace, target: Path, **options: object) -> Path:
    return download(server.url, target, **{"checksum": SUM, "pause": 0.0, "timeout": 5.0, **options})  # type: ignore[arg-type]


def part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def test_whole_file(server: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = get(server, tmp_path / "deep" / "file.bin", size=len(CONTENT))
    assert target.read_bytes() == CONTENT
    assert not part(target).exists()
    assert "file.bin: 1.0 MB of 1.0 MB (100 %)" in capsys.readouterr().err


@pytest.mark.parametrize("ranges", [True, False])
def test_truncated_transfer_is_completed(server: SimpleNamespace, tmp_path: Path, ranges: bool) -> None:
    server.ranges, server.cuts = ranges, [300_000]
    assert get(server, tmp_path / "file.bin").read_bytes() == CONTENT
    # Asked for the rest; a server without ranges sent the whole again and nothing was joined twice.
    assert server.requests == [None, "bytes=300000-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_later_call_resumes_part(server: SimpleNamespace, tmp_path: Path, ranges: bool) -> None:
    server.ranges, server.cuts = ranges, [400_000]
    with pytest.raises(DownloadError, match="ended after 400,000 of 1,048,576 bytes"):
        get(server, tmp_path / "file.bin", attempts=1)
    assert part(tmp_path / "file.bin").stat().st_size == 400_000
    assert not (tmp_path / "file.bin").exists()
    assert get(server, tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=400000-"]


def test_whole_part_is_checked_and_used_without_connection(server: SimpleNamespace, tmp_path: Path) -> None:
    part(tmp_path / "file.bin").write_bytes(CONTENT)
    assert get(server, tmp_path / "file.bin", size=len(CONTENT)).read_bytes() == CONTENT
    assert server.requests == []


@pytest.mark.parametrize("stale", [b"x" * 1000, CONTENT + b"more"])
def test_stale_part_is_discovered_and_replaced(server: SimpleNamespace, tmp_path: Path, stale: bytes) -> None:
    part(tmp_path / "file.bin").write_bytes(stale)
    assert get(server, tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(stale)}-", None]


def test_without_checksum_no_parts_are_joined(server: SimpleNamespace, tmp_path: Path) -> None:
    part(tmp_path / "file.bin").write_bytes(b"x" * 1000)
    server.cuts = [5000]
    assert get(server, tmp_path / "file.bin", checksum=None).read_bytes() == CONTENT
    assert server.requests == [None, None]


def test_wrong_checksum_leaves_nothing(server: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"SHA-256 {SUM} where 0000.* was expected"):
        get(server, tmp_path / "file.bin", checksum="0" * 64)
    assert list(tmp_path.iterdir()) == []
    assert server.requests == [None], "a wrong file is not asked for again"


def test_wrong_checksum_keeps_old_file(server: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"old")
    with pytest.raises(DownloadError):
        get(server, tmp_path / "file.bin", checksum="0" * 64)
    assert (tmp_path / "file.bin").read_bytes() == b"old"


def test_wrong_size(server: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="1,048,576 bytes where 17 were expected"):
        get(server, tmp_path / "file.bin", checksum=None, size=17)


@pytest.mark.parametrize(("code", "words"), [(404, "does not exist"), (410, "does not exist"), (403, "was refused")])
def test_refusals_are_not_repeated(server: SimpleNamespace, tmp_path: Path, code: int, words: str) -> None:
    server.errors = [code] * 5
    with pytest.raises(DownloadError, match=f"{words}.*{code}"):
        get(server, tmp_path / "file.bin")
    assert len(server.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_busy_server_is_asked_again(server: SimpleNamespace, tmp_path: Path) -> None:
    server.errors = [503, 429]
    assert get(server, tmp_path / "file.bin").read_bytes() == CONTENT
    server.errors = [500] * 9
    server.requests.clear()
    with pytest.raises(DownloadError, match="answered 500"):
        get(server, tmp_path / "other.bin", attempts=3)
    assert len(server.requests) == 3


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="refuses the connection"):
        download("http://127.0.0.1:1/file", tmp_path / "file", pause=0.0, attempts=2)


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="name cannot be resolved; is there a network"):
        download("http://nowhere.invalid/file", tmp_path / "file", pause=0.0, attempts=1)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_only_http(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="only http"):
        download(url, tmp_path / "file")


def test_disk_full_before_transfer(server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match="disk is full"):
        get(server, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


def test_disk_full_in_transfer_keeps_part(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(module._Progress):
        def show(self, have: int) -> None:
            if have >= 200_000:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_Progress", Full)
    monkeypatch.setattr(module, "_CHUNK", 100_000)
    with pytest.raises(DownloadError, match="disk is full"):
        get(server, tmp_path / "file.bin")
    assert 200_000 <= part(tmp_path / "file.bin").stat().st_size < len(CONTENT)
    monkeypatch.undo()
    assert get(server, tmp_path / "file.bin").read_bytes() == CONTENT


def test_one_process_at_a_time(server: SimpleNamespace, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    with module._locked(part(target)) as file:
        file.write(b"half")
        with pytest.raises(DownloadError, match=r"another process is fetching file\.bin"):
            get(server, target)
    assert get(server, target).read_bytes() == CONTENT


def test_unwritable_folder(server: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DownloadError, match="cannot write"):
        get(server, tmp_path / "file" / "file.bin")


def test_readable() -> None:
    assert [readable(n) for n in (0, 999, 1536, 2_589_657, 123_400_000, 5e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.6 MB",
        "123 MB",
        "5000 GB",
    ]
