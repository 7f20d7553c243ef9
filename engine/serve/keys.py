"""Who may ask: API keys out of a file, compared in constant time, and signatures of addresses of images."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from pathlib import Path

from rollflow.errors import RequestError, said, shown

SHORTEST = 16  # characters of a key
LOCAL = ("localhost", "127.0.0.1", "::1")


class Keys:
    """The keys of a file: one a line, as KEY or NAME KEY; empty lines and those that begin with # are left out.

    A key is of ASCII: HTTP's headers have no other characters for sure.

    Args:
        path: the file; None: there are no keys, and everybody is the owner "".

    Raises:
        RequestError: the file cannot be read, holds no key, one that is short or not of ASCII, or a name twice.
    """

    def __init__(self, path: str | Path | None = None):
        self._keys = {} if path is None else _read(Path(path))

    def __bool__(self) -> bool:
        return bool(self._keys)

    def owner(self, authorization: str | None) -> str | None:
        """Whose the key of a header `Authorization: Bearer KEY` is; None: nobody's.

        All keys are compared, each in constant time: how long it takes says nothing of any.
        """
        if not self._keys:
            return ""
        scheme, _, given = (authorization or "").partition(" ")
        found = None
        for owner, key in self._keys.items():
            if hmac.compare_digest(key, given.strip().encode()) and scheme.lower() == "bearer":
                found = owner
        return found

    def signature(self, owner: str, what: str) -> str:
        """A word that only the owner of a key could make, for an address that is to be opened without one."""
        return hmac.new(self._keys[owner], what.encode(), hashlib.sha256).hexdigest() if owner in self._keys else ""

    def signed(self, owner: str, what: str, signature: str) -> bool:
        """Whether a signature is the owner's."""
        right = self.signature(owner, what)
        return bool(right) and hmac.compare_digest(right.encode(), signature.encode())


def check_host(host: str, keys: bool) -> None:
    """Raises `RequestError` where a server without keys would be open to other machines."""
    if keys or local(host):
        return
    raise RequestError(
        f"host={shown(host)}: without API keys a server listens on localhost only; give --api-key-file FILE"
    )


def local(host: str) -> bool:
    """Whether a name or an address is this machine's own, to itself alone."""
    if host.lower() in LOCAL:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read(path: Path) -> dict[str, bytes]:
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as error:
        raise RequestError(f"the key file {shown(str(path))} cannot be read ({said(error)})") from error
    found = dict[str, bytes]()
    for number, words in enumerate(lines, 1):
        if not words or words[0].startswith("#"):
            continue
        key = words[-1].encode()
        if len(words) > 2 or len(key) < SHORTEST or not (key.isascii() and words[-1].isprintable()):
            raise RequestError(
                f"the key file {shown(str(path))}: line {number} must be KEY or NAME KEY, a key of at least {SHORTEST} "
                "letters, digits or signs of ASCII"
            )
        owner = words[0] if len(words) == 2 else f"key-{hashlib.sha256(key).hexdigest()[:12]}"
        if owner in found or key in found.values():
            raise RequestError(f"the key file {shown(str(path))} has the key or the name of {owner} twice: remove one")
        found[owner] = key
    if not found:
        raise RequestError(f"the key file {shown(str(path))} holds no key: write one a line")
    return found
