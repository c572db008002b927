"""What is to be known of a data set before it is read: its files, where they come from, and what they must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Binarization = Literal["dynamic", "static", "none"]


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes:
        path: where it lies in a data folder, in the cache, or in the package that ships it.
        digest: ``"sha256:<hex>"``, or ``"git-blob:<hex>"`` where only git's name for the content is published.
        urls: where it can be downloaded, the preferred address first.
        unpacked: the digest is that of the decompressed content, so that any gzip of it is accepted.
        package: the installed package whose folder it lies in.
    """

    path: str
    digest: str
    urls: tuple[str, ...] = ()
    unpacked: bool = False
    package: str = ""


@dataclass(frozen=True)
class Source:
    """One complete set of files to read a data set from; `reader` names the function of `loaders` that does."""

    reader: str
    files: tuple[File, ...]
    same_as: tuple[str, ...] = ()  # digests of other files that hold the same bits: equal data, equal checksum

    @property
    def identity(self) -> tuple[str, ...]:
        """The digests that stand for the content."""
        return self.same_as or tuple(file.digest for file in self.files)


@dataclass(frozen=True)
class Entry:
    """A data set: what it is, and the sources it can be read from, the preferred first."""

    name: str
    summary: str
    shape: tuple[int, int]
    sizes: tuple[int, int, int]  # train, valid, test
    modes: tuple[Binarization, ...]  # the default first
    sources: tuple[Source, ...]
    licence: str
    citation: str
    preparation: int = 1  # raised when the split or the preprocessing changes: enters the checksum
