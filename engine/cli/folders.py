"""Folders that commands write into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from rollflow.errors import RequestError, line, shown


@contextmanager
def writable(out: Path, files: Sequence[str]) -> Iterator[None]:
    """A folder, made where it is not there, to which these files can be written; after an error no empty one is left.

    Raises:
        RequestError: they cannot be written.
    """
    made: list[Path] = []
    try:
        made += [folder for folder in (out, *out.parents) if not folder.exists()]
        _check_writable(out, files)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()
        raise


def _check_writable(out: Path, files: Sequence[str]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):  # find out now, not after the work
            pass
        folders = [file for file in files if (out / file).is_dir()]
    except (OSError, ValueError) as error:  # a ValueError: of a path that is none
        reason = line(str(getattr(error, "strerror", None) or error), 100)
        raise RequestError(
            f"the folder {shown(str(out))} cannot be made or written to ({reason}): choose another --out"
        ) from error
    if folders:
        raise RequestError(f"{shown(str(out / folders[0]))} is a folder: take it away, or choose another --out")
