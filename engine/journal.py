"""What was promised, on disk: accepted requests, the scores of their evaluations, and their results.

SQLite in WAL mode with `synchronous=FULL`: what a commit has returned from is there after kill -9 and after a power
failure. One thread writes; what comes while it commits is the next commit's, so that a hundred writers cost what one
does.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rollflow.entries import Entry, Replay, read, written
from rollflow.errors import EngineClosed, RequestError, RollflowError, said, shown

Status = Literal["accepted", "done", "failed", "cancelled"]
FILE, VERSION = "journal.sqlite", 1
PAUSE = 0.02  # seconds that scores wait for more of them: they are written behind
LOG = logging.getLogger("rollflow")
_TABLES = """
CREATE TABLE IF NOT EXISTS searches (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, key TEXT, request TEXT NOT NULL,
    status TEXT NOT NULL, created REAL NOT NULL, ended REAL, result TEXT, error TEXT, fetched INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX IF NOT EXISTS keys ON searches (owner, key) WHERE key IS NOT NULL;
CREATE INDEX IF NOT EXISTS states ON searches (status);
CREATE TABLE IF NOT EXISTS scores (
    id TEXT NOT NULL, start INTEGER NOT NULL, count INTEGER NOT NULL, replay TEXT NOT NULL, PRIMARY KEY (id, start)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (id TEXT PRIMARY KEY, bytes BLOB NOT NULL);
"""
_COLUMNS = ("id", "key", "owner", "request", "status", "created", "ended", "result", "error", "fetched")
Work = Callable[[sqlite3.Connection], None]


class KeyTaken(RollflowError):
    """A request with this idempotency key was accepted before; `id` is its search's."""

    def __init__(self, message: str, id: str = ""):
        super().__init__(message, id)
        self.id = id

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Kept:
    """A search in a journal.

    Attributes:
        id, key, owner: as it was accepted.
        request: as plain values.
        status: "accepted" until it is over.
        created, ended: in seconds since 1970.
        replay: the scores of its evaluations so far; of one that is over, and in lists, none.
        result, error: how it ended.
        fetched: whether somebody has its result.
    """

    id: str
    key: str | None
    owner: str
    request: dict[str, Any]
    status: Status
    created: float
    ended: float | None = None
    replay: Replay = field(default=Replay(), repr=False)
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    fetched: bool = False


class Journal:
    """Searches in a folder; one process at a time has it open. Methods are for any thread.

    Args:
        folder: made if it is not there.
        reading: only look, also while another process has it; nothing is made, and writing is refused.
        clock: seconds since 1970.

    Attributes:
        failure: why the last commit could not be made; None while all could.

    Raises:
        RequestError: the folder cannot be used, another process has it, or another version has written it.
    """

    def __init__(self, folder: str | Path, *, reading: bool = False, clock: Callable[[], float] = time.time):
        self.folder, self._reading, self._clock = Path(folder), reading, clock
        self._lock_file: int | None = None
        try:
            if not reading:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock_file = locked(self.folder / "lock")
            self._writer = self._connect()
            (found,) = self._writer.execute("PRAGMA user_version").fetchone()
            if found not in (VERSION, VERSION if reading else 0):
                raise OSError(f"it is of version {found}, and this is {VERSION}")
            if not reading:
                self._writer.executescript(_TABLES)
                self._writer.execute(f"PRAGMA user_version = {VERSION}")
            self._scored = _ends(self._writer)  # how many entries of each search are there or on their way
        except (OSError, sqlite3.Error) as error:
            if self._lock_file is not None:
                os.close(self._lock_file)
            raise RequestError(
                f"journal={shown(str(folder))}: it cannot be used as a journal ({said(error)}); give another folder"
            ) from error
        self._reads = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._work: list[tuple[Work, concurrent.futures.Future[None] | None]] = []
        self._changed, self._urgent, self._closing = threading.Condition(), False, reading
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rollflow-journal", daemon=True)
        self._thread.start()

    # Writing.

    def accept(
        self, id: str, request: dict[str, Any], *, key: str | None = None, owner: str = ""
    ) -> concurrent.futures.Future[None]:
        """Keeps a request from now on; it is durable when the future is done, which may fail with `KeyTaken`.

        Args:
            id: of the search, its own.
            request: plain values, see `rollflow.wire`.
            key: an idempotency key: a second request of the owner's with it is refused.
            owner: whose it is.
        """
        values = id, owner, key, json.dumps(request), self._clock()

        def work(to: sqlite3.Connection) -> None:
            if key is not None and (other := _by_key(to, owner, key)) is not None:
                raise KeyTaken(f"the idempotency key {shown(key)} is that of the search {other}", other)
            if to.execute("SELECT 1 FROM searches WHERE id = ?", (id,)).fetchone():
                raise RequestError(f"id={shown(id)}: the journal has a search of that id; give another one")
            to.execute(
                "INSERT INTO searches (id, owner, key, request, created, status) VALUES (?, ?, ?, ?, ?, 'accepted')",
                values,
            )

        return self._promise(work)

    def log(self, id: str, start: int, replay: Replay) -> None:
        """Keeps scores of a search, of its evaluations from `start` on, soon: those that are there already are skipped.

        Raises:
            RollflowError: evaluations before `start` are missing.
        """
        with self._changed:
            have = self._scored.get(id, 0)
            if start > have:
                raise RollflowError(f"scores of {id} from {start} on: {have} are there, and those between are missing")
            entries = replay.entries[have - start :]
            if not entries:
                return
            self._scored[id] = have + len(entries)
        values = id, have, len(entries), written(replay._replace(entries=entries))

        def work(to: sqlite3.Connection) -> None:
            to.execute("INSERT OR REPLACE INTO scores (id, start, count, replay) VALUES (?, ?, ?, ?)", values)

        self._add(work, None)

    def restart(self, id: str) -> None:
        """Drops the scores of a search, which begins anew."""
        with self._changed:
            self._scored.pop(id, None)
        self._add(lambda to: _drop(to, id), None)

    def finish(self, id: str, result: dict[str, Any], image: bytes) -> concurrent.futures.Future[None]:
        """Keeps a result and its image; the scores, which nobody needs any more, go."""

        def work(to: sqlite3.Connection) -> None:
            self._end(to, id, "done", "result", result)
            to.execute("INSERT OR REPLACE INTO images (id, bytes) VALUES (?, ?)", (id, image))

        return self._promise(work)

    def fail(
        self,
        id: str,
        status: Literal["failed", "cancelled"],
        error: dict[str, Any],
        result: dict[str, Any] | None = None,
        image: bytes | None = None,
    ) -> concurrent.futures.Future[None]:
        """Keeps how a search ended early, and what it had found."""

        def work(to: sqlite3.Connection) -> None:
            if result is not None:
                open = "WHERE id = ? AND status = 'accepted'"
                to.execute(f"UPDATE searches SET result = ? {open}", (json.dumps(result), id))
            self._end(to, id, status, "error", error)
            if image is not None:
                to.execute("INSERT OR REPLACE INTO images (id, bytes) VALUES (?, ?)", (id, image))

        return self._promise(work)

    def fetched(self, id: str) -> None:
        """Somebody has the result."""
        self._add(lambda to: _nothing(to.execute("UPDATE searches SET fetched = 1 WHERE id = ?", (id,))), None)

    def prune(self, keep: float) -> None:
        """Forgets searches that ended more than `keep` seconds ago."""
        before = self._clock() - keep

        def work(to: sqlite3.Connection) -> None:
            old = "SELECT id FROM searches WHERE status != 'accepted' AND ended < ?"
            to.execute(f"DELETE FROM images WHERE id IN ({old})", (before,))
            to.execute("DELETE FROM searches WHERE status != 'accepted' AND ended < ?", (before,))

        self._add(work, None)

    def flush(self, timeout: float | None = None) -> None:
        """Waits until all that was handed in before is durable."""
        self._promise(_nothing).result(timeout)

    def close(self) -> None:
        """Writes what is left, and lets go of the folder; further calls do nothing."""
        with self._changed:
            self._closing = self._urgent = True
            self._changed.notify()
        self._thread.join()
        for connection in (*self._readers, self._writer):
            with suppress(sqlite3.Error):
                connection.close()
        self._readers.clear()
        if self._lock_file is not None:
            os.close(self._lock_file)
        self._lock_file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading: what is durable.

    def get(self, id: str) -> Kept | None:
        """A search, with its scores while it is not over; None where there is none."""
        found = self._found("WHERE id = ?", (id,))
        return self._with_scores(found[0]) if found else None

    def by_key(self, owner: str, key: str) -> str | None:
        """The id of the search that was accepted with an idempotency key."""
        return _by_key(self._reader, owner, key)

    def unfinished(self) -> list[Kept]:
        """Those that are not over, with their scores, in the order in which they came."""
        return [self._with_scores(one) for one in self._found("WHERE status = 'accepted' ORDER BY number")]

    def jobs(self, limit: int = 100, status: Status | None = None, owner: str | None = None) -> list[Kept]:
        """The last ones, of one status or owner or of all, without their scores, the last first."""
        asked = {name: value for name, value in (("status", status), ("owner", owner)) if value is not None}
        where = " AND ".join(f"{name} = ?" for name in asked)
        rest = f"{'WHERE ' if where else ''}{where} ORDER BY number DESC LIMIT ?"
        return self._found(rest, (*asked.values(), limit))

    def evaluated(self, id: str) -> int:
        """How many evaluations of a search are there."""
        row = self._reader.execute("SELECT MAX(start + count) FROM scores WHERE id = ?", (id,)).fetchone()
        return row[0] or 0

    def image(self, id: str) -> bytes | None:
        """The file of a result's image."""
        row = self._reader.execute("SELECT bytes FROM images WHERE id = ?", (id,)).fetchone()
        return None if row is None else row[0]

    # The rest is its own affair.

    def _connect(self) -> sqlite3.Connection:
        place = f"{(self.folder / FILE).absolute().as_uri()}?mode={'ro' if self._reading else 'rwc'}"
        connection = sqlite3.connect(place, uri=True, isolation_level=None, check_same_thread=False, timeout=30)
        if not self._reading:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        return connection

    @property
    def _reader(self) -> sqlite3.Connection:
        """The connection of this thread."""
        connection = getattr(self._reads, "connection", None)
        if connection is None:
            connection = self._reads.connection = self._connect()
            with self._changed:
                self._readers.append(connection)
        return connection

    def _found(self, rest: str, values: Sequence[Any] = ()) -> list[Kept]:
        rows = self._reader.execute(
            f"SELECT id, key, owner, request, status, created, ended, result, error, fetched FROM searches {rest}",
            values,
        ).fetchall()
        return [_kept(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]

    def _with_scores(self, kept: Kept) -> Kept:
        if kept.status != "accepted":
            return kept
        entries: list[Entry] = []
        found = Replay()
        question = "SELECT start, replay FROM scores WHERE id = ? ORDER BY start"
        for start, text in self._reader.execute(question, (kept.id,)).fetchall():
            if start != len(entries):  # a commit failed between
                break
            part = read(text)
            entries += part.entries
            found = part._replace(scales=part.scales or found.scales)
        return replace(kept, replay=found._replace(entries=(*entries,)))

    def _end(self, to: sqlite3.Connection, id: str, status: Status, name: str, value: dict[str, Any]) -> None:
        """The first end of a search counts."""
        to.execute(
            f"UPDATE searches SET status = ?, ended = ?, {name} = ? WHERE id = ? AND status = 'accepted'",
            (status, self._clock(), json.dumps(value), id),
        )
        _drop(to, id)
        with self._changed:
            self._scored.pop(id, None)

    def _promise(self, work: Work) -> concurrent.futures.Future[None]:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._add(work, future)
        return future

    def _add(self, work: Work, future: concurrent.futures.Future[None] | None) -> None:
        with self._changed:
            if self._closing:
                raise EngineClosed("the journal was closed")
            self._work.append((work, future))
            self._urgent = self._urgent or future is not None
            self._changed.notify()

    def _run(self) -> None:
        """What its thread does: one transaction after another, each of all that has come."""
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._work or self._closing)
                self._changed.wait_for(lambda: self._urgent, PAUSE)
                batch, self._work, self._urgent = self._work, [], False
                closing = self._closing and not batch
            if batch:
                self._commit(batch)

    def _commit(self, batch: Sequence[tuple[Work, concurrent.futures.Future[None] | None]]) -> None:
        failed: dict[int, BaseException] = {}
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for i, (work, _) in enumerate(batch):
                try:
                    with _savepoint(self._writer):
                        work(self._writer)
                except (RollflowError, sqlite3.IntegrityError) as error:  # of this one alone
                    failed[i] = error
            self._writer.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
            self.failure = error
            LOG.error("the journal %s could not be written (%s)", self.folder, said(error))
            failed = dict.fromkeys(range(len(batch)), RollflowError(f"the journal cannot be written ({said(error)})"))
        for i, (_, future) in enumerate(batch):
            if future is None or future.cancelled():
                continue
            if i in failed:
                future.set_exception(failed[i])
            else:
                future.set_result(None)


@contextmanager
def _savepoint(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("SAVEPOINT one")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")
        raise
    connection.execute("RELEASE one")


def _kept(request: str, result: str | None, error: str | None, fetched: int, **rest: Any) -> Kept:
    """A row of the table."""
    own = None if result is None else json.loads(result)
    return Kept(
        request=json.loads(request), result=own, error=None if error is None else json.loads(error),
        fetched=bool(fetched), **rest,
    )  # fmt: skip


def _by_key(connection: sqlite3.Connection, owner: str, key: str) -> str | None:
    row = connection.execute("SELECT id FROM searches WHERE owner = ? AND key = ?", (owner, key)).fetchone()
    return None if row is None else row[0]


def _ends(connection: sqlite3.Connection) -> dict[str, int]:
    return dict(connection.execute("SELECT id, MAX(start + count) FROM scores GROUP BY id"))


def _drop(connection: sqlite3.Connection, id: str) -> None:
    connection.execute("DELETE FROM scores WHERE id = ?", (id,))


def _nothing(_: object) -> None:
    pass


def locked(path: Path) -> int:
    """An open file that no other process has open so; the lock goes with the process, however it ends."""
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise OSError("another process has it open") from error
    return file
