"""Files that are written whole: a reader sees all of one or nothing, whenever the writer is killed and whoever else writes it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from uuid import uuid4


def write(path: Path, content: bytes) -> None:
    """Write beside the path, and move it there.

    Raises:
        OSError: it cannot be written; nothing is left behind.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write(folder / "a.txt", b"whole")
    >>> [found.name for found in folder.iterdir()]
    ['a.txt']
    """
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
