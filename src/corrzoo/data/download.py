"""Download the official archives of the benchmarks and unpack them into the layout that the readers expect.

Work happens in `<root>/<folder>.download`. A rename at the end creates the dataset's folder, which is thus complete.
"""

import hashlib
import json
import shutil
import stat
import tarfile
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from corrzoo.errors import ZooError, one_line
from corrzoo.files import locked, sha256
from corrzoo.registry import suggestion

ATTEMPTS = 5
"""our choice: connections per call. The next call resumes where the last one stopped."""
TIMEOUT = 30.0
"""our choice: seconds without a byte until a connection counts as cut."""
LIMIT = 8 << 30
"""our choice: bytes that an archive may unpack to, well above any of these datasets."""
MAX_FILES = 1_000_000
"""our choice: files that an archive may contain, well above any of these datasets."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One published file of a dataset."""

    url: str
    file: str  # its name on disk; a list (.csv) is copied into the dataset's folder
    prefix: str = ""  # leading folder of the names in the archive, which is removed
    inner: str = ""  # for an archive in an archive: the name of the inner one, which is unpacked
    checksum: str = ""  # algorithm:hex, if published; download.json has the sha256 in any case


_SPAIR = "https://cvlab.postech.ac.kr/research/SPair-71k/data/SPair-71k.tar.gz"
_FLOW = "https://www.di.ens.fr/willow/research/proposalflow/dataset"
_LISTS = "https://www.di.ens.fr/willow/research/cnngeometric/other_resources"
_TRN = "https://drive.usercontent.google.com/download?export=download&confirm=t&id=111tpXshLiJ4qudBHoGK3HbMSNr9vVRq9"
# Caltech-101's first address is gone: this one and its md5 are those of torchvision's Caltech101.
_CALTECH = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
_CALTECH_LIST = "https://www.di.ens.fr/willow/research/weakalign/other_resources/test_pairs_caltech_with_category.csv"
_CALTECH_INNER, _CALTECH_MD5 = "caltech-101/101_ObjectCategories.tar.gz", "md5:3138e1922a9193bfa496528edbbc45d0"
# VOC 2012's address and md5 are those of torchvision's VOCSegmentation.
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
"""For each dataset its folder under `root` and its published files."""
IMAGES_ONLY = frozenset({"spair71k_u"})
"""Datasets whose annotations are not downloaded. SPair-U's images are SPair-71k's."""
SOURCES["spair71k_u"] = SOURCES["spair71k"]

TERMS = {"cub": "non-commercial research and education only; the photographers hold the rights to the images"}
"""Terms of use of a dataset, which are printed before it is downloaded."""


def download(name: str, root: str | Path) -> Path:
    """Download a dataset's official files into its folder in `root`, unless that exists, and return the folder.

    The next call resumes a download that was cut. If two processes download the same dataset, the second waits. Files
    fetched by other means are used, if they are where the error message says.

    Raises:
        ZooError: if the name is unknown, the network or server fails, a checksum is wrong, or an archive is damaged or
            would write outside its folder.
    """
    if name not in SOURCES:
        raise ZooError(f"no download is known for dataset {name!r}{suggestion(name, SOURCES)}")
    folder, parts = Path(root).expanduser() / SOURCES[name][0], SOURCES[name][1]
    if folder.exists():
        return folder
    work = folder.with_name(folder.name + ".download")
    try:
        with locked(work / "lock"):
            if folder.exists():  # another process was faster
                return folder
            if name in TERMS:
                print(f"{folder.name}: {TERMS[name]}")
            notes = _fetch_parts(name, folder, work, parts)
            stage = work / "unpacked"
            shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
            stage.mkdir()
            for part in parts:
                path = work / part.file
                if part.inner:
                    extract(path, work / "outer")
                    path = work / "outer" / part.inner
                if path.suffix == ".csv":
                    shutil.copy(path, stage)
                else:
                    extract(path, stage, part.prefix)
            (stage / "download.json").write_text(json.dumps(notes, indent=1) + "\n")
            stage.rename(folder)
            shutil.rmtree(work)
    except OSError as error:
        raise ZooError(f"cannot write to {work} ({error}): make room, or choose another --data.root") from error
    return folder


def _fetch_parts(name: str, folder: Path, work: Path, parts: list[Part]) -> list[dict[str, str | int]]:
    """Download all parts that are not in `work`, check them, and return their entries in `download.json`."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
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
    return [_verified(work / part.file, part) for part in parts]


def _fetch(url: str, path: Path, progress: Progress) -> None:
    """Download to `path` through `path.part`, and resume after a cut connection."""
    partial = path.with_name(path.name + ".part")
    task = progress.add_task(path.name, total=None)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if _fetch_rest(url, partial, progress, task):
                break
        except HTTPError as error:
            if error.code != 416:  # "range not satisfiable": `partial` is not a beginning of the server's file
                raise
            partial.unlink()
        except (OSError, HTTPException):
            if attempt == ATTEMPTS or not partial.exists():
                raise
    else:
        raise ConnectionError(f"the connection was cut {ATTEMPTS} times")
    partial.rename(path)


def _fetch_rest(url: str, partial: Path, progress: Progress, task: TaskID) -> bool:
    """Append the response of one request to `partial`. Returns whether the file is complete."""
    have = partial.stat().st_size if partial.exists() else 0
    request = Request(url, headers={"User-Agent": "corrzoo", **({"Range": f"bytes={have}-"} if have else {})})
    with urlopen(request, timeout=TIMEOUT) as response:
        if response.headers.get_content_type() == "text/html":  # a log-in, quota or error page with status 200
            raise ConnectionError(f"{url} returned a web page instead of the file")
        if response.status != 206:  # the server does not support ranges
            have = 0
        length = response.headers["Content-Length"]
        total = have + int(length) if length else None
        progress.update(task, completed=have, total=total)
        with open(partial, "ab" if have else "wb") as out:
            while chunk := response.read(CHUNK):
                out.write(chunk)
                progress.advance(task, len(chunk))
    return total is None or partial.stat().st_size == total


def _verified(path: Path, part: Part) -> dict[str, str | int]:
    """Check a downloaded file, and return its entry in `download.json`."""
    if part.checksum:
        algorithm, expected = part.checksum.split(":")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if found != expected:
            aside = path.replace(path.with_name(path.name + ".wrong"))
            told = f"{path.name} from {part.url} has {algorithm} {found}, expected {expected}"
            raise ZooError(f"{told}: it was moved to {aside}, run this again for another download")
    return {"file": path.name, "url": part.url, "bytes": path.stat().st_size, "sha256": sha256(path)}


def extract(archive: Path, folder: Path, prefix: str = "", limit: int = LIMIT) -> None:
    """Unpack an untrusted zip archive or a tar archive of any compression. `prefix` is removed from its names.

    The declared file sizes may add up to `limit` bytes. No file unpacks to more than it declares.

    Raises:
        ZooError: if a name is absolute or climbs, a member is a link or device, there are too many bytes or files, or
            the archive is damaged. Files that were unpacked before remain in `folder`.
    """
    files = size = 0

    def target(name: str, declared: int, plain: bool) -> str | None:
        """The name to unpack a member to; None to leave it out."""
        nonlocal files, size
        path = PurePosixPath(name)
        if "__MACOSX" in path.parts or path.name == ".DS_Store":
            return None
        wrong = "it is not the official file, remove it"
        if path.is_absolute() or ".." in path.parts:
            raise ZooError(f"{archive} would write {name!r} outside its folder: {wrong}")
        if not plain:
            raise ZooError(f"{archive} contains a link or device {name!r}: {wrong}")
        files, size = files + 1, size + declared
        if size > limit or files > MAX_FILES:
            raise ZooError(f"{archive} unpacks to more than {limit} bytes or {MAX_FILES} files: {wrong}")
        return str(path).removeprefix(prefix)  # as a path, "./Top/a" is "Top/a"

    def keep(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        if member.isdir() or (name := target(member.name, member.size, member.isreg())) is None:
            return None
        renamed = member.replace(name=name, mtime=None, deep=False)  # type: ignore[arg-type]  # None: now
        return tarfile.data_filter(renamed, folder)

    try:
        if not zipfile.is_zipfile(archive):
            with tarfile.open(archive) as tarred:
                tarred.extractall(folder, filter=keep)
            return
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 in archives of systems without Unix modes
                plain = kind in (0, stat.S_IFREG)
                if not entry.is_dir() and (name := target(entry.filename, entry.file_size, plain)):
                    entry.filename = name
                    zipped.extract(entry, folder)
    except ZooError:
        raise
    except Exception as error:  # a damaged or encrypted archive, an impossible name, a full disk
        told = f"cannot unpack {archive} ({one_line(error)})"
        raise ZooError(f"{told}: make room, or remove it and run this again") from error
