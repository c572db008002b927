"""Download one file from the first of several addresses that serves it right, or leave nothing behind."""

from __future__ import annotations

import http.client
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from gradiometer.bench import atomic
from gradiometer.bench.errors import RequestError

TIMEOUT = 20.0  # seconds without an answer before the next address is tried
_CHUNK = 1 << 18


class DownloadError(Exception):
    """No address served the file; the message lists every address with its reason."""


def download(
    label: str, urls: Sequence[str], path: Path, mismatch: Callable[[bytes], str], progress: bool = True
) -> str:
    """Download to `path` and return the address that served the file.

    Args:
        label: what the file is called in reports of progress.
        urls: the addresses, tried in order.
        path: where the file shall lie; it appears there whole and checked, or not at all.
        mismatch: what is wrong with a content, in words; empty where it is right.
        progress: report on standard error (a bar on a terminal, plain lines otherwise).

    Raises:
        DownloadError: no address served the file.
        RequestError: the file cannot be written.
    """
    reasons = []
    for url in urls:
        try:
            content = _get(label, url, progress)
        # ValueError: urllib's complaint about an address that it does not understand
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = _words(error)
        else:
            reason = mismatch(content)
            if not reason:
                _publish(path, content)
                return url
        reasons.append(f"{url}: {reason}")
        if progress:
            print(f"{label}: {reasons[-1]}", file=sys.stderr)
    raise DownloadError("; ".join(reasons))


def _get(label: str, url: str, progress: bool) -> bytes:
    chunks = []
    with urlopen(Request(url, headers={"User-Agent": "gradiometer"}), timeout=TIMEOUT) as answer:
        length = answer.headers.get("Content-Length")
        total = int(length) if length else None
        with _progress(label, url, total, progress) as advance:
            while chunk := answer.read(_CHUNK):
                chunks.append(chunk)
                advance(len(chunk))
    content = b"".join(chunks)
    if total is not None and len(content) != total:
        raise OSError(f"the connection closed after {len(content):,} of {total:,} bytes")
    return content


def _words(error: Exception) -> str:
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        return str(error.reason)  # its own words are "<urlopen error ...>"
    return str(error) or type(error).__name__


def _publish(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, content)
    except OSError as error:
        raise RequestError(f"the download {path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _progress(label: str, url: str, total: int | None, wanted: bool) -> Iterator[Callable[[int], object]]:
    """Report a download on standard error; yields what is to be called with the size of every piece."""
    if not wanted:
        yield lambda size: None
    elif not sys.stderr.isatty():
        print(f"{label}: downloading{f' {total:,} bytes' if total else ''} from {url}", file=sys.stderr)
        yield lambda size: None
    else:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(label, total=total)
            yield lambda size: bars.advance(task, size)
