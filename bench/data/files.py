"""Where a data set's files come from (the user's folder, our cache, a download), and the check that they are right."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from platformdirs import user_cache_dir

from gradiometer.bench.data.download import DownloadError, download
from gradiometer.bench.data.entry import Entry, File, Source
from gradiometer.bench.data.registry import candidates
from gradiometer.bench.errors import RequestError

VARIABLE = "GRADIOMETER_DATA"
CACHE = "the cache"


@dataclass(frozen=True)
class Located:
    """A file, where it lies, and where it came from: ``GRADIOMETER_DATA``, ``the cache``, a package's name or a URL."""

    file: File
    path: Path
    origin: str

    def __str__(self) -> str:
        return f"{self.file.path}: {self.path} (from {self.origin})"


@dataclass(frozen=True)
class Holding:
    """A data set that is at hand: which one, by which of its sources, in which files."""

    entry: Entry
    source: Source
    files: tuple[Located, ...]


def data_folder() -> Path | None:
    """The user's own folder of data sets, which is only ever read; None where `GRADIOMETER_DATA` is unset or empty."""
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    if not os.path.isdir(given):
        raise RequestError(f"the environment variable {VARIABLE} names {given}, which is not a folder")
    return Path(given)


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path(user_cache_dir("gradiometer")) / "data"


def fetch(name: str, progress: bool = True) -> tuple[Located, ...]:
    """Find or download the files of a data set, verify every one, and say where each came from.

    Args:
        name: a data set, one of `NAMES`.
        progress: report downloads on standard error (bars on a terminal, plain lines otherwise).

    Raises:
        RequestError: the name is unknown; a file is neither at hand nor to be had; or a file is not what it must be.

    Example:
        >>> [located.origin for located in fetch("digits")]
        ['sklearn']
    """
    holding = locate(name, progress)
    for located in holding.files:
        read(located)
    return holding.files


def locate(name: str, progress: bool = True) -> Holding:
    """Choose the first source that lies ready, or else download the first that can be; verifying is left to `read`.

    What is at hand goes before what would have to be downloaded, so that a local folder never waits for a network.
    """
    options = [(entry, source) for entry in candidates(name) for source in entry.sources]
    for entry, source in options:
        found = [located for file in source.files if (located := _find(file))]
        if len(found) == len(source.files):
            return Holding(entry, source, tuple(found))
    for entry, source in options:
        if all(file.urls or _find(file) for file in source.files):
            try:
                return Holding(entry, source, tuple(_find(file) or _fetch(file, progress) for file in source.files))
            except DownloadError as error:
                raise RequestError(_missing(name, options, f"the download failed ({error})")) from None
    raise RequestError(_missing(name, options, "there is no address to download from"))


def read(located: Located) -> bytes:
    """The verified content of a file, decompressed where the digest is that of the decompressed content.

    Raises:
        RequestError: the file cannot be read, or is not what it must be; it is left as it is.
    """
    kind, _, expected = located.file.digest.partition(":")
    try:
        content = located.path.read_bytes()
    except OSError as error:
        raise RequestError(f"{located.path} cannot be read: {error.strerror}") from error
    if located.file.unpacked:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise RequestError(
                f"{located.path} is damaged: expected {kind} {expected} of the decompressed content, found a file "
                f"({kind} {digest(kind, content)}) that does not decompress; {_remedy(located)}"
            ) from error
    found = digest(kind, content)
    if found != expected:
        of = " of the decompressed content" if located.file.unpacked else ""
        raise RequestError(
            f"{located.path} is damaged or another file: expected {kind} {expected}{of}, found {found}; "
            f"{_remedy(located)}"
        )
    return content


def digest(kind: str, content: bytes) -> str:
    """The digest of a content in hexadecimal; `kind` is ``sha256`` or ``git-blob``."""
    if kind == "git-blob":
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return hashlib.sha256(content).hexdigest()


def _find(file: File) -> Located | None:
    for origin, folder in _places(file).items():
        if os.path.isfile(folder / file.path):
            return Located(file, folder / file.path, origin)
    return None


def _places(file: File) -> dict[str, Path]:
    """The folders in which a file is looked for, by what they are called."""
    if file.package:
        package = find_spec(file.package)  # finds it without importing it: scikit-learn takes 1.7 s
        return {file.package: Path(package.origin).parent} if package and package.origin else {}
    folder = data_folder()
    return ({VARIABLE: folder} if folder else {}) | {CACHE: cache_folder()}


def _fetch(file: File, progress: bool) -> Located:
    kind, _, expected = file.digest.partition(":")

    def mismatch(content: bytes) -> str:
        found = digest(kind, content)
        return "" if found == expected else f"sent another file: expected {kind} {expected}, found {found}"

    path = cache_folder() / file.path
    return Located(file, path, download(file.path, file.urls, path, mismatch, progress))


def _remedy(located: Located) -> str:
    """What to do about a file that is not what it must be; the user's own files are theirs to mend."""
    if located.origin == VARIABLE:
        source = f" (such as {located.file.urls[0]})" if located.file.urls else ""
        return (
            f"replace it with a good copy{source}, or remove it from your {VARIABLE} folder to have it found elsewhere"
        )
    if located.origin == CACHE:
        return "delete it to download it again"
    return f"reinstall {located.file.package}"


def _missing(name: str, options: list[tuple[Entry, Source]], download: str) -> str:
    """One sentence: which files are missing, where they were looked for, and what to do."""
    first = options[0][1].files[0]
    if first.package:
        return f"data set {name} is read from the package {first.package}, which has no {first.path} here: install it"
    sets = [" and ".join(file.path for file in source.files if not _find(file)) for _, source in options]
    places = _places(first)
    where = " or ".join(f"{folder} ({origin})" for origin, folder in places.items())
    unset = "" if VARIABLE in places else f" ({VARIABLE} is not set)"
    return (
        f"data set {name}: no {', or '.join(sets)} in {where}{unset}, and {download}; "
        f"put what is missing into a folder under that path and set the environment variable {VARIABLE} to the folder"
    )
