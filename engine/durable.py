"""Files that appear whole or not at all, whatever ends the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, content: bytes, durable: bool = True) -> None:
    """Writes a file that appears whole, by a rename; if `durable`, also after a power failure."""
    with appearing(path, durable) as part:
        part.write_bytes(content)


@contextmanager
def appearing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A name to write to, in the same folder; at the end of the block the file gets its own."""
    part = path.with_name(f".{path.name}.part")
    yield part
    if durable:
        sync(part)
    part.replace(path)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file or a folder is on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
