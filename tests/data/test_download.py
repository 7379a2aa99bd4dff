"""Downloads from a local server that cuts connections, lies, and serves malicious archives."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from fixtures import write_cub

from corrzoo.data import create_dataset
from corrzoo.data import download as module
from corrzoo.data.download import SOURCES, TERMS, Part, download, extract
from corrzoo.types import ZooError


class Server(ThreadingHTTPServer):
    """Serves `files` with byte ranges. `cut` has the lengths at which the next responses break off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: list[int] = []
        self.ranges = True
        self.kind = "application/octet-stream"
        self.asked: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", self.server.kind)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + self.server.cut.pop(0) if self.server.cut else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


IMAGE = bytes(range(256)) * 40


@pytest.fixture
def toy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A dataset `toy` of an archive and a list."""
    server.files = {"/toy.tar.gz": tar({"Toy/JPEGImages/a.jpg": IMAGE}), "/pairs?id=1": b"a,a\n"}
    parts = [Part(f"{server.url}/toy.tar.gz", "toy.tar.gz", prefix="Toy/"), Part(f"{server.url}/pairs?id=1", "trn.csv")]
    monkeypatch.setitem(SOURCES, "toy", ("TOY", parts))
    return server


def test_a_dataset_appears_whole(toy: Server, tmp_path: Path) -> None:
    folder = download("toy", tmp_path / "root")
    assert folder == tmp_path / "root" / "TOY"
    assert (folder / "JPEGImages" / "a.jpg").read_bytes() == IMAGE
    assert (folder / "trn.csv").read_bytes() == b"a,a\n"
    notes = json.loads((folder / "download.json").read_text())
    assert [note["file"] for note in notes] == ["toy.tar.gz", "trn.csv"]
    assert notes[1]["sha256"] == hashlib.sha256(b"a,a\n").hexdigest() and notes[1]["bytes"] == 4
    assert [path.name for path in folder.parent.iterdir()] == ["TOY"]


def test_a_root_in_the_home_folder_is_where_readers_look(
    toy: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download("toy", "~/data") == tmp_path / "data" / "TOY"
    assert (tmp_path / "data" / "TOY" / "trn.csv").is_file()


def test_terms_of_use_are_printed_before_the_download(
    toy: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(TERMS, "toy", "for tests only")
    toy.kind = "text/html"
    with pytest.raises(ZooError):
        download("toy", tmp_path)
    assert capsys.readouterr().out.startswith("TOY: for tests only\n")
    toy.kind = "application/octet-stream"
    download("toy", tmp_path)
    capsys.readouterr()
    download("toy", tmp_path)  # is there already
    assert capsys.readouterr().out == ""
    assert TERMS["cub"].startswith("non-commercial research and education") and set(TERMS) <= {*SOURCES}


def test_the_archive_of_cub_unpacks_to_its_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = write_cub(tmp_path / "made")
    files = {f"CUB_200_2011/{path.relative_to(home)}": path.read_bytes() for path in home.rglob("*") if path.is_file()}
    content = server.files["/CUB_200_2011.tgz"] = tar({"attributes.txt": b"1 has_bill_shape::curved"} | files)
    folder, (official,) = SOURCES["cub"]
    assert official.checksum.startswith("md5:") and official.url.endswith("/CUB_200_2011.tgz")
    checksum = f"md5:{hashlib.md5(content).hexdigest()}"
    part = dataclasses.replace(official, url=f"{server.url}/CUB_200_2011.tgz", checksum=checksum)
    monkeypatch.setitem(SOURCES, "cub", (folder, [part]))
    download("cub", tmp_path / "root")
    made, found = (create_dataset("cub", tmp_path / name, "val", length=5) for name in ("made", "root"))
    assert found.fingerprint() == made.fingerprint() and found.title == "cub (7 species)"


def test_an_existing_dataset_is_not_fetched_again(toy: Server, tmp_path: Path) -> None:
    download("toy", tmp_path)
    asked = len(toy.asked)
    download("toy", tmp_path)
    assert len(toy.asked) == asked


def test_a_cut_connection_is_resumed(toy: Server, tmp_path: Path) -> None:
    toy.cut = [100, 50]
    folder = download("toy", tmp_path)
    assert toy.asked == [None, "bytes=100-", "bytes=150-", None]
    assert (folder / "JPEGImages" / "a.jpg").read_bytes() == IMAGE


def test_the_next_call_resumes_where_the_last_stopped(toy: Server, tmp_path: Path) -> None:
    toy.cut = [20] * module.ATTEMPTS
    with pytest.raises(ZooError, match="connection was cut"):
        download("toy", tmp_path)
    assert not (tmp_path / "TOY").exists()
    toy.asked.clear()
    download("toy", tmp_path)
    assert toy.asked[0] == f"bytes={20 * module.ATTEMPTS}-"


def test_a_server_without_ranges_starts_anew(toy: Server, tmp_path: Path) -> None:
    toy.cut, toy.ranges = [100], False
    assert (download("toy", tmp_path) / "JPEGImages" / "a.jpg").read_bytes() == IMAGE


def test_a_part_longer_than_the_file_is_discarded(toy: Server, tmp_path: Path) -> None:
    work = tmp_path / "TOY.download"
    work.mkdir()
    (work / "toy.tar.gz.part").write_bytes(b"x" * 100_000)
    assert (download("toy", tmp_path) / "JPEGImages" / "a.jpg").read_bytes() == IMAGE


def test_two_processes_download_once(toy: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:  # flock is of an open file, so that threads exclude each other as processes do
        folders = [*pool.map(lambda _: download("toy", tmp_path), range(4))]
    assert folders == [tmp_path / "TOY"] * 4 and toy.asked == [None, None]
    assert (tmp_path / "TOY" / "JPEGImages" / "a.jpg").read_bytes() == IMAGE
    assert [path.name for path in tmp_path.iterdir()] == ["TOY"]


def test_a_folder_that_cannot_be_written_is_one_error(toy: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=r"cannot write to .*file/TOY\.download \(.*Not a directory.*\): .*--data\.root"):
        download("toy", tmp_path / "file")


def test_a_wrong_checksum_leaves_no_dataset(toy: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(f"{toy.url}/toy.tar.gz", "toy.tar.gz", checksum=f"sha256:{'0' * 64}")
    monkeypatch.setitem(SOURCES, "toy", ("TOY", [part]))
    with pytest.raises(ZooError, match=f"sha256 {hashlib.sha256(toy.files['/toy.tar.gz']).hexdigest()}, expected 0000"):
        download("toy", tmp_path)
    assert not (tmp_path / "TOY").exists()
    right = hashlib.md5(toy.files["/toy.tar.gz"]).hexdigest()
    monkeypatch.setitem(SOURCES, "toy", ("TOY", [Part(part.url, part.file, checksum=f"md5:{right}")]))
    assert download("toy", tmp_path).is_dir()


def test_a_missing_file_is_one_error_that_says_what_to_put_where(toy: Server, tmp_path: Path) -> None:
    del toy.files["/pairs?id=1"]
    with pytest.raises(ZooError) as caught:
        download("toy", tmp_path)
    work = tmp_path / "TOY.download"
    text = str(caught.value)
    assert "404" in text and "\n" not in text
    assert f"{toy.url}/pairs?id=1 to {work / 'trn.csv'}" in text
    assert "toy.tar.gz to" not in text  # that one has come
    assert str(tmp_path / "TOY;") in text and "zoo_configs/demo.yaml" in text
    (work / "trn.csv").write_bytes(b"by hand\n")
    assert (download("toy", tmp_path) / "trn.csv").read_bytes() == b"by hand\n"


def test_no_network_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/toy.tar.gz"
        monkeypatch.setitem(SOURCES, "toy", ("TOY", [Part(url, "toy.tar.gz")]))
        with pytest.raises(ZooError, match=rf"fetch {url} to .*TOY.download/toy.tar.gz, then run this again"):
            download("toy", tmp_path)


def test_a_web_page_is_not_taken_for_the_file(toy: Server, tmp_path: Path) -> None:
    toy.kind = "text/html; charset=utf-8"
    with pytest.raises(ZooError, match="web page"):
        download("toy", tmp_path)
    assert not (tmp_path / "TOY").exists()


def test_an_archive_in_an_archive(toy: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.files["/outer.zip"] = zipped({"outer/inner.tar.gz": tar({"Images/a.jpg": IMAGE}), "outer/other": b""})
    part = Part(f"{toy.url}/outer.zip", "outer.zip", inner="outer/inner.tar.gz")
    monkeypatch.setitem(SOURCES, "toy", ("TOY", [part]))
    folder = download("toy", tmp_path)
    assert (folder / "Images" / "a.jpg").read_bytes() == IMAGE
    assert sorted(path.name for path in folder.iterdir()) == ["Images", "download.json"]


def test_unknown_name_is_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="did you mean 'pfwillow'"):
        download("pfwilow", tmp_path)


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "a/../evil"])
def test_names_that_leave_the_folder(pack: type, name: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(pack({"good": b"1", name: b"2"}))
    with pytest.raises(ZooError, match="outside its folder"):
        extract(tmp_path / "bad", tmp_path / "in" / "folder")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(kind: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ZooError, match="link or device 'link'"):
        extract(tmp_path / "bad.tar", tmp_path / "folder")
    assert not (tmp_path / "folder" / "link").exists()


def test_links_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ZooError, match="link or device"):
        extract(tmp_path / "bad.zip", tmp_path / "folder")


@pytest.mark.parametrize("pack", [tar, zipped])
def test_a_bomb_stops_at_the_limit(pack: type, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(pack({"a": bytes(600), "b": bytes(600)}))
    with pytest.raises(ZooError, match="more than 1000 bytes"):
        extract(tmp_path / "bomb", tmp_path / "folder", limit=1000)
    extract(tmp_path / "bomb", tmp_path / "enough", limit=1200)
    assert (tmp_path / "enough" / "b").stat().st_size == 600


@pytest.mark.parametrize("pack", [tar, zipped])
def test_too_many_files_are_refused(pack: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 3)
    (tmp_path / "archive").write_bytes(pack({name: b"" for name in "abc"}))
    extract(tmp_path / "archive", tmp_path / "folder")
    (tmp_path / "archive").write_bytes(pack({name: b"" for name in "abcd"}))
    with pytest.raises(ZooError, match="or 3 files: it is not the official file"):
        extract(tmp_path / "archive", tmp_path / "other")


def test_a_zip_that_declares_less_than_it_contains_writes_no_more_than_it_declares(tmp_path: Path) -> None:
    archive = bytearray(zipped({"a": bytes(100_000)}))
    directory = archive.index(b"PK\x01\x02")
    for at in (22, directory + 24):  # the size, in the local header and in the directory
        archive[at : at + 4] = (10).to_bytes(4, "little")
    (tmp_path / "bad.zip").write_bytes(archive)
    with pytest.raises(ZooError, match=r"cannot unpack .*bad\.zip"):
        extract(tmp_path / "bad.zip", tmp_path / "folder", limit=50)
    assert (tmp_path / "folder" / "a").stat().st_size <= 10


def test_unpacked_files_are_ordinary(tmp_path: Path) -> None:
    """Whatever modes, owners and times an archive has."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("a")
        info.mode, info.uid, info.mtime, info.size = 0o6777, 12345, 1e30, 2
        archive.addfile(info, io.BytesIO(b"xy"))
    extract(tmp_path / "a.tar", tmp_path / "folder")
    found = (tmp_path / "folder" / "a").stat()
    assert not found.st_mode & 0o6022 and found.st_uid == os.getuid()
    assert (tmp_path / "folder" / "a").read_bytes() == b"xy"


def test_random_damage_is_one_line_and_stays_inside(tmp_path: Path) -> None:
    rng, refused = np.random.default_rng(0), 0
    for k in range(300):
        content = bytearray((tar, zipped)[k % 2]({"Top/a.jpg": IMAGE, "Top/x/b": b"1" * 99, "c": b""}))
        if k % 4 == 2:
            content = bytearray(gzip.decompress(content))  # damage reaches the headers
        for at in rng.integers(0, len(content), rng.integers(1, 9)):
            content[at] = rng.integers(256)
        (tmp_path / "archive").write_bytes(content)
        try:
            extract(tmp_path / "archive", tmp_path / "in" / str(k), "Top/", limit=100_000)
        except ZooError as error:
            assert "\n" not in str(error)
            refused += 1
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "in"} and refused > 50
    assert {path.name for path in (tmp_path / "in").iterdir()} <= {str(k) for k in range(300)}


@pytest.mark.parametrize(
    "content",
    [b"no archive", tar({"a": IMAGE})[:60], gzip.compress(b"not a tar"), b""],
    ids=["text", "cut", "no tar in it", "empty"],  # the bytes hold the time: two processes would not agree on a name
)
def test_damaged_archives(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.tar.gz").write_bytes(content)
    with pytest.raises(ZooError, match="cannot unpack") as error:
        extract(tmp_path / "bad.tar.gz", tmp_path / "folder")
    assert "\n" not in str(error.value)


def encrypted() -> bytes:
    archive = bytearray(zipped({"a": IMAGE}))
    archive[archive.index(b"PK\x01\x02") + 8] |= 1  # says so
    return bytes(archive)


@pytest.mark.parametrize(
    "content",
    [
        encrypted(),
        zipped({"x" * 300: IMAGE}),
        zipped({"a": IMAGE, "a/b": IMAGE}),
    ],
    ids=["encrypted", "a name too long", "a file that is a folder"],
)
def test_archives_that_cannot_be_unpacked_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(content)
    with pytest.raises(ZooError, match=r"cannot unpack .*bad\.zip"):
        extract(tmp_path / "bad.zip", tmp_path / "folder")


def test_a_damaged_download_leaves_no_dataset(toy: Server, tmp_path: Path) -> None:
    toy.files["/toy.tar.gz"] = toy.files["/toy.tar.gz"][:80]
    with pytest.raises(ZooError, match=r"cannot unpack .*toy.tar.gz"):
        download("toy", tmp_path)
    assert not (tmp_path / "TOY").exists()


def test_junk_is_left_out_and_the_prefix_dropped(tmp_path: Path) -> None:
    members = {"Top/x/a": b"1", "__MACOSX/Top/x/._a": b"2", "Top/.DS_Store": b"3", "other/b": b"4", "./Top/c": b"5"}
    (tmp_path / "a.zip").write_bytes(zipped(members))
    extract(tmp_path / "a.zip", tmp_path / "folder", prefix="Top/")
    found = {
        path.relative_to(tmp_path / "folder").as_posix() for path in (tmp_path / "folder").rglob("*") if path.is_file()
    }
    assert found == {"x/a", "other/b", "c"}


def test_every_source_is_complete() -> None:
    for folder, parts in SOURCES.values():
        assert folder and len({part.file for part in parts}) == len(parts)
        for part in parts:
            assert part.url.startswith("https://")
            assert part.file.endswith((".csv", ".zip", ".tar", ".tar.gz", ".tgz"))
