"""Find the files of a data set, check them against their digests, and download them.

npdrt looks in the folder that you give, then in that of the environment variable NPDRT_DATA, then
in the user's cache. Each data set has a folder of its own inside, such as `mnist`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npdrt import atomic
from npdrt.data import folder as images
from npdrt.data import sample_images
from npdrt.data.archive import unpack
from npdrt.data.bounded import digest
from npdrt.data.catalogue import File, Form, Source, find, package_file, sources
from npdrt.data.decode import refused
from npdrt.errors import DiskError, FileRefused, Unavailable

Folder = str | Path | None

_DAY = 24 * 3600.0
_PARTIAL = ".fetch-"  # downloads live in such a folder until they are whole and checked
_LAY_OUT = {  # how to get a folder of images that npdrt cannot download
    "imagenet": "Put ILSVRC 2012 there, as train/<class>/*.JPEG and val/<class>/*.JPEG: unpack "
    "the archive of each class into a folder of its own, and sort the validation images into "
    "folders of the same names",
    "imagenette": "Unpack imagenette2.tgz of fast.ai, and put its folders train and val there",
    sample_images.NAME: f"To draw it (24 MB): npdrt data fetch {sample_images.NAME}",
}


@dataclass(frozen=True)
class Check:
    """The result of `verify` for one file.

    status: "ok", "missing", "wrong", or "unpacked": the file without its .gz, which the reader
    takes too, but which has no published digest. expected, found: `algorithm:digest`.
    """

    file: str
    status: str
    path: Path | None
    expected: str
    found: str | None


@dataclass(frozen=True)
class Entry:
    """One line of `npdrt data list`.

    where: the folder with the data set, or None. part: "" if it is whole, else how many of its
    files are there.
    """

    name: str
    what: str
    bytes: int
    licence: str
    where: Path | None
    bundled: bool
    part: str = ""


# Where it is


def user_cache() -> Path | None:
    """The folder for npdrt's data in the user's cache, as usual on the platform.

    None if neither the environment nor the system names one: a user may have no home.
    """
    named = {"win32": "LOCALAPPDATA", "darwin": ""}.get(sys.platform, "XDG_CACHE_HOME")
    cache = Path(os.environ.get(named, ""))  # the XDG standard: ignored unless absolute
    if cache.is_absolute():
        return cache / "npdrt"
    usual = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    try:
        return Path.home() / usual / "npdrt"
    except RuntimeError:
        return None


def folders(name: str, data_dir: Folder = None) -> list[Path]:
    """The folders that may hold the data set `name`, in the order of the search."""
    roots = (data_dir, os.environ.get("NPDRT_DATA"), user_cache())
    return [Path(root) / name for root in roots if root]


def find_file(folder: Path, file: File) -> Path | None:
    """The path of `file` in `folder`, else of the same file without .gz, else None."""
    return first_file(folder, *file.names)


def first_file(folder: Path, *names: str) -> Path | None:
    """The first of the files `names` that is in `folder`, else None."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def locate(name: str, data_dir: Folder = None, *, catalogue: Path | None = None) -> Path:
    """The first folder that holds the files of the data set `name`.

    Looks in data_dir, then $NPDRT_DATA, then the user's cache, each time in the folder `name`
    inside. A folder with all files comes before one with some of them: if a training set is
    published in several files, one is enough. `verify` checks the files. catalogue: another
    sources.toml. Raises Error for an unknown name, Unavailable if no folder has them.
    """
    return locate_form(find(name, catalogue), data_dir)[0]


def locate_form(source: Source, data_dir: Folder = None) -> tuple[Path, Form]:
    """The folder of a data set, and the form that its files have there; see `locate`."""
    found = _found(source, data_dir)
    if found is None:
        size = f"{source.bytes / 1e6:.0f} MB"
        remedy = f"To download it ({size}): npdrt data fetch {source.name}"
        raise _absent(source.name, data_dir, remedy)
    return found


def locate_local(name: str, data_dir: Folder, files: Sequence[str], remedy: str) -> Path:
    """The first folder of a data set without a download that has one of `files`.

    Raises Unavailable, with the remedy, if there is none.
    """
    for folder in folders(name, data_dir):
        if first_file(folder, *files):
            return folder
    raise _absent(name, data_dir, remedy)


def locate_images(name: str, data_dir: Folder = None) -> Path:
    """The folder of a set of images (`npdrt.data.folder`): its PATH, or the first folder of a set
    with a name that has a folder train. Raises Unavailable, with what to do, if none has."""
    parsed = images.parse(name)
    if parsed.path is not None:
        return parsed.path
    found = _with_train(parsed.set, data_dir)
    if found is None:
        raise _absent(parsed.set, data_dir, _LAY_OUT[parsed.set])
    return found


def _with_train(name: str, data_dir: Folder) -> Path | None:
    return next((root for root in folders(name, data_dir) if (root / "train").is_dir()), None)


def _absent(name: str, data_dir: Folder, remedy: str) -> Unavailable:
    places = ", ".join(map(str, folders(name, data_dir))) or "no folder: none is set"
    return Unavailable(f"data set {name!r} is not on this machine; looked in {places}. {remedy}")


def files_in(folder: Path, form: Form) -> list[File]:
    """The files of `form` that are in `folder`."""
    return [file for file in form.files if find_file(folder, file)]


def _candidates(source: Source, data_dir: Folder) -> list[tuple[Path, Form]]:
    """Where the data set may be, and in which form, in the order of the search."""
    if source.bundled:
        return [(_package_folder(), source.forms[0])]
    roots = folders(source.name, data_dir)
    return [(root / form.folder, form) for root in roots for form in source.forms]


def _found(source: Source, data_dir: Folder) -> tuple[Path, Form] | None:
    """The first folder with all files, else the first with enough of them, else None."""
    counted = [(path, form, files_in(path, form)) for path, form in _candidates(source, data_dir)]
    whole = [(path, form) for path, form, files in counted if len(files) == len(form.files)]
    part = [(path, form) for path, form, files in counted if form.enough(files)]
    return next(iter(whole + part), None)


def _package_folder() -> Path:
    return Path(str(package_file("sources.toml"))).parent


# Whether it is right


def verify(name: str, data_dir: Folder = None, *, catalogue: Path | None = None) -> list[Check]:
    """Compare each file of the data set `name` with its published digest.

    The files are those in the folder that `locate` finds, or else in the first folder that has any
    of them. Every image of a folder is decoded: there is one check for each image that cannot
    be decoded, and one for each set. Every file is read once. Raises Error for an unknown name,
    FileRefused for an unreadable file.
    """
    if images.named(name):
        return _check_images(name, locate_images(name, data_dir))
    source = find(name, catalogue, paths=False)
    places = _candidates(source, data_dir)
    some = ((path, form) for path, form in places if files_in(path, form))
    anywhere = next(some, None) or next(iter(places), None)
    folder, form = _found(source, data_dir) or anywhere or locate_form(source, data_dir)
    return [_check(folder, file) for file in form.files]


def _check_images(name: str, root: Path) -> list[Check]:
    """One check for each image that is refused, then one for the whole set."""
    expected, checks = "a whole JPEG or PNG image", []
    for part, found in images.read(name, root).items():
        wrong = [(Path(path), why) for path, why in refused(found.paths)]
        checks += [Check(path.name, "wrong", path, expected, why) for path, why in wrong]
        said = f"{len(found.paths) - len(wrong)} of {len(found.paths)} images"
        checks.append(Check(part, "ok" if not wrong else "wrong", found.root, expected, said))
    return checks


def _check(folder: Path, file: File) -> Check:
    path = find_file(folder, file)
    if path is None:
        return Check(file.name, "missing", None, file.hash, None)
    algorithm = file.hash.partition(":")[0]
    found = f"{algorithm}:{digest(path, algorithm)}"
    status = "ok" if found == file.hash else "wrong"
    return Check(
        file.name, status if path.name == file.name else "unpacked", path, file.hash, found
    )


def listing(data_dir: Folder = None, *, catalogue: Path | None = None) -> list[Entry]:
    """Every data set npdrt knows, with the folder it was found in."""
    return [_entry(source, data_dir) for source in sources(catalogue).values()]


def _entry(source: Source, data_dir: Folder) -> Entry:
    where, form = _found(source, data_dir) or (None, source.forms[0])
    count = len(files_in(where, form)) if where else 0
    part = f"{count} of {len(form.files)} files" if 0 < count < len(form.files) else ""
    about = (source.name, source.what, source.bytes, source.licence)
    return Entry(*about, where, source.bundled, part)


# Downloading


def fetch(
    name: str,
    data_dir: Folder = None,
    *,
    progress: bool | None = None,
    catalogue: Path | None = None,
) -> Path:
    """Download the data set `name` unless it is there, and return its folder.

    data_dir: the folder for it; by default $NPDRT_DATA or else the user's cache, unless one of
    them has it. Sound files are kept, others replaced. A file gets its name only when it is whole
    and its digest is right, so that an interrupted download leaves nothing that looks like data; a
    second download completes it. Mirrors are tried in order. Only the data set's own files are
    taken out of an archive (`npdrt.data.archive`).

    "sample-imagenet" is drawn, not downloaded; for "imagenet" and "imagenette" the message says how
    to lay their folders out.

    progress: show a line on stderr; by default if that is a terminal. catalogue: another
    sources.toml. Raises Error for an unknown name; DiskError if the folder cannot be written;
    Unavailable if there is no folder, pooch is missing or no mirror answers; FileRefused if they
    send wrong files.
    """
    if name in images.CLASSES:
        return _fetch_images(name, data_dir)
    source = find(name, catalogue, paths=False)
    if source.bundled:
        return _package_folder()
    roots = _targets(name, data_dir)
    for root in roots:
        for form in source.forms:
            if all(_check(root / form.folder, file).status == "ok" for file in form.files):
                return root / form.folder
    with _writing(name, roots[0]):
        _complete(source, roots[0], sys.stderr.isatty() if progress is None else progress)
    return roots[0] / source.forms[0].folder


def _targets(name: str, data_dir: Folder) -> list[Path]:
    """Where a data set may be put, the best place first."""
    roots = [Path(data_dir) / name] if data_dir else folders(name)
    if not roots:
        raise Unavailable(
            f"no folder for the data set {name!r}: there is no home directory; set NPDRT_DATA or "
            "give --data-dir"
        )
    return roots


@contextmanager
def _writing(name: str, root: Path) -> Iterator[None]:
    """Turn an `OSError` into a `DiskError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"cannot write the data set {name!r} to {root}: {error}; "
            "set NPDRT_DATA to a folder with room that you can write"
        ) from error


def _fetch_images(name: str, data_dir: Folder) -> Path:
    """The folder of a set of images; the made-up one is drawn if it is missing."""
    if name != sample_images.NAME:
        return locate_images(name, data_dir)
    roots = _targets(name, data_dir)
    if found := _with_train(name, data_dir):
        return found
    with _writing(name, roots[0]):
        sample_images.make(roots[0])
    return roots[0]


def _complete(source: Source, root: Path, progress: bool) -> None:
    """Download the files that are missing or wrong."""
    pooch, form = _pooch(), source.forms[0]
    folder = root / form.folder
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_PARTIAL}*"):  # by a killed process; young ones may be in use
        if left.stat().st_mtime < time.time() - _DAY:
            shutil.rmtree(left, ignore_errors=True)
    wrong = [file for file in form.files if _check(folder, file).status != "ok"]
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder) as work:
        for file in [form.archive] if form.archive else wrong:
            urls = [mirror + file.name for mirror in source.mirrors]
            whole = _download(pooch, urls, file, folder, Path(work), progress)
            if form.archive is None:
                atomic.move(whole, folder / file.name)
        if form.archive:
            _unpack(whole, form, wrong, folder)


def _unpack(archive: Path, form: Form, wrong: list[File], folder: Path) -> None:
    """Replace the files that are wrong in `folder` by those of an archive, once all are checked."""
    into = archive.parent / "unpacked"
    into.mkdir()
    unpack(archive, form, into)
    for check in (_check(into, file) for file in form.files):
        if check.status != "ok":
            raise FileRefused(f"{check.file}: expected {check.expected}; found {check.found}")
    for file in wrong:
        atomic.move(into / file.name, folder / file.name)


def _pooch() -> Any:
    try:
        import pooch
    except ImportError as error:
        raise Unavailable(
            'downloading data needs the extra "data": pip install "npdrt[data]"; '
            "or put the files into a folder and set NPDRT_DATA"
        ) from error
    return pooch


def _download(
    pooch: Any, urls: list[str], file: File, folder: Path, work: Path, progress: bool
) -> Path:
    """Download one file to `work`, from the first URL that sends it whole and right."""
    from requests import RequestException  # which pooch brings

    causes: list[Exception] = []
    for url in urls:
        try:
            return _retrieve(pooch, url, file, work, progress)
        except (RequestException, ValueError) as error:  # no answer or a broken one; wrong bytes
            causes.append(error)
    reasons = "".join(f"\n  {url}: {cause}" for url, cause in zip(urls, causes, strict=True))
    answered = not any(isinstance(cause, RequestException) for cause in causes)
    kind = FileRefused if answered else Unavailable
    raise kind(f"could not download {file.name} into {folder}:{reasons}")


def _retrieve(pooch: Any, url: str, file: File, folder: Path, progress: bool) -> Path:
    """Download `file` from `url` and force it to the disk; pooch checks its digest."""

    def download(url: str, path: str, _: Any) -> None:
        with Path(path).open("wb") as out:
            for chunk in _chunks(url, file, progress):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())

    log = pooch.get_logger()
    level = log.level
    log.setLevel("ERROR")  # pooch reports each download on stderr
    try:
        name = {"fname": file.name, "path": folder}
        return Path(pooch.retrieve(url, known_hash=file.hash, downloader=download, **name))
    finally:
        log.setLevel(level)
        if progress:
            print(file=sys.stderr)


def _chunks(url: str, file: File, progress: bool) -> Iterator[bytes]:
    """The bytes that `url` sends, at most the published size of `file`; shows the progress line.

    pooch's own downloader has no such bound, and leaves the connection open if it breaks off.
    """
    import requests

    headers = {"Accept-Encoding": "identity"}  # else a server may unpack the .gz on the way
    done = 0
    with requests.get(url, stream=True, timeout=30, headers=headers) as response:
        response.raise_for_status()
        for chunk in response.iter_content(1 << 16):
            done += len(chunk)
            if done > file.bytes:
                raise ValueError(f"expected {file.bytes} bytes; the server sends more")
            if progress:
                share = f"{done / 1e6:.1f} of {file.bytes / 1e6:.1f} MB"
                print(f"\r{file.name}: {share}", end="", file=sys.stderr, flush=True)
            yield chunk
