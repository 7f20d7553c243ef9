"""Whether what a benchmark measures can be written where it was asked to: known before the work, not after it."""

from __future__ import annotations

from pathlib import Path

from rollflow.errors import RequestError, line, shown

PICTURES = (".png", ".svg", ".pdf")


def check_file(file: Path | None, option: str = "--json") -> None:
    """Makes sure that a file can be written; an existing one keeps its content.

    Raises:
        RequestError: it is a folder, its folder is not there, or it cannot be written to.
    """
    if file is None:
        return
    try:
        with file.open("ab"):
            pass
    except (OSError, ValueError) as error:
        raise RequestError(
            f"the file {shown(str(file))} cannot be written ({reason(error)}): choose another {option}"
        ) from error


def check_picture(file: Path | None, option: str = "--plot") -> None:
    """As `check_file`, and the name must end as that of a picture."""
    if file is not None and file.suffix.lower() not in PICTURES:
        raise RequestError(f"the picture {shown(str(file))}: its name must end in {', '.join(PICTURES)}")
    check_file(file, option)


def check_folder(folder: Path, option: str = "--out") -> None:
    """Makes a folder, where it is not there.

    Raises:
        RequestError: it is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"the folder {shown(str(folder))} cannot be written to ({reason(error)}): choose another {option}"
        ) from error


def reason(error: BaseException) -> str:
    """Why a file cannot be read or written, in a few words."""
    return line(str(getattr(error, "strerror", None) or error) or type(error).__name__, 100)
