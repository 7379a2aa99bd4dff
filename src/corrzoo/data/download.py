"""The official archives of the benchmarks, fetched and unpacked into the layout that the readers expect.

`download(name, root)` is called by who wants it, never by an import. Everything happens in `<root>/<folder>.download`,
and one rename at the end makes the dataset appear: what has the dataset's name is whole.
"""

import hashlib
import json
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from corrzoo.registry import nearest
from corrzoo.types import ZooError

ATTEMPTS = 5
"""our choice: how often one call goes on after a cut connection; the next call goes on from there as well."""
TIMEOUT = 30.0
"""our choice: seconds without a byte after which a connection counts as cut."""
LIMIT = 8 << 30
"""our choice: bytes that an archive may unpack to, well above any of these datasets."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One published file of a dataset."""

    url: str
    file: str
    """Its name on disk; a list (.csv) goes into the dataset's folder as it is."""
    prefix: str = ""
    """A leading folder inside the archive that is dropped."""
    inner: str = ""
    """The archive inside the archive that is the one to unpack."""
    checksum: str = ""
    """`algorithm:hex`, where somebody published one; the sha256 found is written to `download.json` in any case."""


_SPAIR = "https://cvlab.postech.ac.kr/research/SPair-71k/data/SPair-71k.tar.gz"
_FLOW = "https://www.di.ens.fr/willow/research/proposalflow/dataset"
_LISTS = "https://www.di.ens.fr/willow/research/cnngeometric/other_resources"
_TRN = "https://drive.usercontent.google.com/download?export=download&confirm=t&id=111tpXshLiJ4qudBHoGK3HbMSNr9vVRq9"
# Caltech-101's first address is gone: this one and its md5 are those of torchvision's Caltech101.
_CALTECH = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
_CALTECH_LIST = "https://www.di.ens.fr/willow/research/weakalign/other_resources/test_pairs_caltech_with_category.csv"
_CALTECH_INNER, _CALTECH_MD5 = "caltech-101/101_ObjectCategories.tar.gz", "md5:3138e1922a9193bfa496528edbbc45d0"
# Of VOC 2012 address and md5 are those of torchvision's VOCSegmentation.
_VOC = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
_VOC_MD5 = "md5:6cd6e144f989b92b3379bac3b3de84fd"
# The file of CaltechDATA's record 65de6-vp158, 1.1 GB; md5 as public loaders of the dataset check it.
_CUB = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
_CUB_MD5 = "md5:97eceeb196236b17998738112f37df78"

SOURCES: dict[str, tuple[str, list[Part]]] = {
    "spair71k": ("SPair-71k", [Part(_SPAIR, "SPair-71k.tar.gz", prefix="SPair-71k/")]),
    "pfpascal": (
        "PF-PASCAL",
        [
            Part(f"{_FLOW}/PF-dataset-PASCAL.zip", "PF-dataset-PASCAL.zip", prefix="PF-dataset-PASCAL/"),
            Part(_TRN, "trn_pairs.csv"),
            Part(f"{_LISTS}/val_pairs_pf_pascal.csv", "val_pairs.csv"),
            Part(f"{_LISTS}/test_pairs_pf_pascal.csv", "test_pairs.csv"),
        ],
    ),
    "pfwillow": (
        "PF-WILLOW",
        [
            Part(f"{_FLOW}/PF-dataset.zip", "PF-dataset.zip", prefix="PF-dataset/"),
            Part(f"{_LISTS}/test_pairs_pf.csv", "test_pairs.csv"),
        ],
    ),
    "caltech101": (
        "Caltech-101",
        [
            Part(_CALTECH, "caltech-101.zip", inner=_CALTECH_INNER, checksum=_CALTECH_MD5),
            Part(_CALTECH_LIST, "test_pairs_caltech_with_category.csv"),
        ],
    ),
    "cub": ("CUB_200_2011", [Part(_CUB, "CUB_200_2011.tgz", prefix="CUB_200_2011/", checksum=_CUB_MD5)]),
    "voc_warps": ("VOC2012", [Part(_VOC, _VOC.rpartition("/")[2], prefix="VOCdevkit/VOC2012/", checksum=_VOC_MD5)]),
}
"""Dataset -> its folder under `root`, and the files that make it up."""
SOURCES["spair71k_u"] = SOURCES["spair71k"]  # its images; the annotations' archive is not one that we have seen

TERMS = {"cub": "non-commercial research and education only; the photographers hold the rights to the images"}
"""Dataset -> terms of use, printed before it is downloaded."""


def download(name: str, root: str | Path) -> Path:
    """Fetch a dataset's official files into `root`, unless its folder is there already.

    A cut download is gone on with by the next call. Files that were fetched by other means and put where the error says
    are taken as they are.

    Args:
        name: One of `SOURCES`.
        root: The folder that holds, or will hold, the dataset's folder.

    Returns:
        The dataset's folder.

    Raises:
        ZooError: for an unknown name, no network, a refused request, a wrong checksum, or an archive that is damaged or
            would write outside its folder.
    """
    if name not in SOURCES:
        hint = nearest(name, SOURCES) or f": choose one of {', '.join(SOURCES)}"
        raise ZooError(f"no download is known for dataset {name!r}{hint}")
    folder, parts = Path(root) / SOURCES[name][0], SOURCES[name][1]
    if folder.exists():
        return folder
    work = folder.with_name(folder.name + ".download")
    if name in TERMS:
        print(f"{folder.name}: {TERMS[name]}")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        work.mkdir(parents=True, exist_ok=True)
        with Progress(*columns) as progress:
            for part in parts:
                if not (work / part.file).exists():
                    _fetch(part.url, work / part.file, progress)
    except (OSError, HTTPException) as error:
        todo = " and ".join(f"{p.url} to {work / p.file}" for p in parts if not (work / p.file).exists())
        raise ZooError(
            f"cannot download {name!r} ({error}): where there is a network, fetch {todo}, then run this again; "
            f"or put the unpacked dataset at {folder}; or run without data by adding --config zoo_configs/demo.yaml"
        ) from error
    notes = [_verified(work / part.file, part) for part in parts]
    stage = work / "unpacked"
    shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
    stage.mkdir()
    for part in parts:
        _place(work / part.file, part, stage)
    (stage / "download.json").write_text(json.dumps(notes, indent=1) + "\n")
    stage.rename(folder)
    shutil.rmtree(work)
    return folder


def _fetch(url: str, path: Path, progress: Progress) -> None:
    """Download to `path` by way of `path.part`, going on where a connection was cut."""
    partial = path.with_name(path.name + ".part")
    task = progress.add_task(path.name, total=None)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if _go_on(url, partial, progress, task):
                break
        except HTTPError as error:
            if error.code != 416:  # 'range not satisfiable': what is there is no beginning of what the server has
                raise
            partial.unlink()
        except (OSError, HTTPException):
            if attempt == ATTEMPTS or not partial.exists():
                raise
    else:
        raise ConnectionError(f"the connection was cut {ATTEMPTS} times")
    partial.rename(path)


def _go_on(url: str, partial: Path, progress: Progress, task: TaskID) -> bool:
    """Add to `partial` what one request brings, and tell whether the file is whole."""
    have = partial.stat().st_size if partial.exists() else 0
    request = Request(url, headers={"User-Agent": "corrzoo", **({"Range": f"bytes={have}-"} if have else {})})
    with urlopen(request, timeout=TIMEOUT) as answer:
        if answer.headers.get_content_type() == "text/html":  # a log-in, quota or error page that calls itself 200
            raise ConnectionError(f"{url} answers with a web page, not with the file")
        if answer.status != 206:  # the server knows no ranges: from the start
            have = 0
        length = answer.headers["Content-Length"]
        total = have + int(length) if length else None
        progress.update(task, completed=have, total=total)
        with open(partial, "ab" if have else "wb") as out:
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                progress.advance(task, len(chunk))
    return total is None or partial.stat().st_size == total


def _verified(path: Path, part: Part) -> dict[str, str | int]:
    """What is to be remembered of a downloaded file: address, size, sha256."""

    algorithm, _, expected = part.checksum.partition(":")
    if expected and (found := _digest(path, algorithm)) != expected:
        aside = path.replace(path.with_name(path.name + ".wrong"))
        raise ZooError(
            f"{path.name} from {part.url} has {algorithm} {found}, expected {expected}: "
            f"it was moved to {aside}, run this again to fetch it anew"
        )
    return {"file": path.name, "url": part.url, "bytes": path.stat().st_size, "sha256": _digest(path, "sha256")}


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _place(path: Path, part: Part, stage: Path) -> None:
    """Unpack one downloaded archive, or copy a list, into the staged dataset."""
    if path.suffix == ".csv":
        shutil.copyfile(path, stage / path.name)
        return
    if part.inner:
        extract(path, outer := stage.with_name("outer"))
        path = outer / part.inner
    extract(path, stage, part.prefix)


def extract(archive: Path, folder: Path, prefix: str = "", limit: int = LIMIT) -> None:
    """Unpack a tar (of any compression) or zip archive, trusting nothing in it.

    Args:
        archive: The file.
        folder: Where to; made when missing.
        prefix: Leading part of the members' names that is dropped.
        limit: Most bytes to write, counted as they are written, whatever the archive declares.

    Raises:
        ZooError: for an absolute or climbing name, a link or device, too many bytes, or a damaged archive. What was
            unpacked before stays in `folder`.
    """
    left = limit
    try:
        for name, content in _members(archive):
            path = PurePosixPath(str(PurePosixPath(name)).removeprefix(prefix))  # "./Top/a" is "Top/a"
            if "__MACOSX" in path.parts or path.name == ".DS_Store":
                continue
            target = folder / path
            if ".." in path.parts or not target.resolve().is_relative_to(folder.resolve()):
                raise ZooError(
                    f"{archive} would write {name!r} outside its folder: it is not the official file, remove it"
                )
            if content is None:
                raise ZooError(f"{archive} holds a link or device {name!r}: it is not the official file, remove it")
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, open(target, "wb") as out:
                while chunk := content.read(CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise ZooError(f"{archive} unpacks to more than {limit} bytes: it is not the official file")
                    out.write(chunk)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())  # of an encrypted member, a name that no file can have, a full disk
        raise ZooError(f"cannot unpack {archive} ({reason}): make room, or remove it and run this again") from error


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """(name, content) of all but the folders; no content for what is not a plain file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                # Archives from systems without Unix modes have 0 here.
                plain = stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG)
                if not entry.is_dir():
                    yield entry.filename, zipped.open(entry) if plain else None
    else:
        with tarfile.open(archive) as tarred:
            for member in tarred:
                if not member.isdir():
                    yield member.name, tarred.extractfile(member) if member.isreg() else None
