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
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from rollflow.durable import sync
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
        failure: why the last commit could not be made; None if it could.

    Raises:
        RequestError: the folder cannot be used, another process has it, or another version has written it.
    """

    def __init__(self, folder: str | Path, *, reading: bool = False, clock: Callable[[], float] = time.time):
        self.folder, self._reading, self._clock = Path(folder), reading, clock
        self._lock_file: int | None = None
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        try:
            if reading and not (self.folder / FILE).is_file():
                raise OSError("there is none in it")
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
                for one in (self.folder, *self.folder.absolute().parents):  # which may have been made for it
                    with suppress(OSError):
                        sync(one)
            self._reader = self._connect()
            self._scored = _ends(self._writer)  # how many entries of each search are there or on their way
            (self._opened,) = self._writer.execute("SELECT COALESCE(MAX(number), 0) FROM searches").fetchone()
        except (OSError, sqlite3.Error) as error:
            self._let_go()
            raise RequestError(
                f"journal={shown(str(folder))}: it cannot be used as a journal ({said(error)}); give another folder"
            ) from error
        self._reading_now = threading.Lock()
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
        values = id, have, len(entries), written(replay._replace(entries=entries)), id

        def work(to: sqlite3.Connection) -> None:
            done = to.execute(
                "INSERT OR REPLACE INTO scores (id, start, count, replay) SELECT ?, ?, ?, ? WHERE EXISTS "
                "(SELECT 1 FROM searches WHERE id = ? AND status = 'accepted')",
                values,
            )
            if not done.rowcount:  # it is over
                with self._changed:
                    self._scored.pop(id, None)

        self._add(work, None)

    def restart(self, id: str) -> None:
        """Drops the scores of a search, which begins anew."""
        with self._changed:
            self._scored.pop(id, None)
            self._add(lambda to: _drop(to, id), None)

    def finish(self, id: str, result: dict[str, Any], image: bytes) -> concurrent.futures.Future[None]:
        """Keeps a result and its image; the scores, which nobody needs any more, go."""
        return self._promise(partial(self._end, id, "done", json.dumps(result), None, image))

    def fail(
        self,
        id: str,
        status: Literal["failed", "cancelled"],
        error: dict[str, Any],
        result: dict[str, Any] | None = None,
        image: bytes | None = None,
    ) -> concurrent.futures.Future[None]:
        """Keeps how a search ended, and of a cancelled one what it had found."""
        found = None if result is None else json.dumps(result)
        return self._promise(partial(self._end, id, status, found, json.dumps(error), image))

    def fetched(self, id: str) -> None:
        """Somebody has the result."""
        self._add(lambda to: _nothing(to.execute("UPDATE searches SET fetched = 1 WHERE id = ?", (id,))), None)

    def prune(self, keep: float) -> None:
        """Forgets searches that ended more than `keep` seconds ago."""
        before = self._clock() - keep

        def work(to: sqlite3.Connection) -> None:
            old = "SELECT id FROM searches WHERE status != 'accepted' AND ended < ?"
            to.execute(f"DELETE FROM images WHERE id IN ({old})", (before,))
            to.execute(f"DELETE FROM scores WHERE id IN ({old})", (before,))
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
        with self._reading_now:
            self._let_go()

    def _let_go(self) -> None:
        for connection in (self._reader, self._writer):
            if connection is not None:
                with suppress(sqlite3.Error):
                    connection.close()
        self._reader = self._writer = None
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
        rows = self._rows("SELECT id FROM searches WHERE owner = ? AND key = ?", (owner, key))
        return rows[0][0] if rows else None

    def unfinished(self, left: bool = False) -> list[Kept]:
        """Those that are not over, with their scores, in the order in which they came.

        Args:
            left: only those that were there when the journal was opened.
        """
        most = self._opened if left else 2**62
        found = self._found("WHERE status = 'accepted' AND number <= ? ORDER BY number", (most,))
        return [self._with_scores(one) for one in found]

    def jobs(self, limit: int = 100, status: Status | None = None, owner: str | None = None) -> list[Kept]:
        """The last ones, of a status or an owner, without their scores, the last first."""
        given = {name: value for name, value in (("status", status), ("owner", owner)) if value is not None}
        where = f"WHERE {' AND '.join(f'{name} = ?' for name in given)} " if given else ""
        return self._found(f"{where}ORDER BY number DESC LIMIT ?", (*given.values(), limit))

    def evaluated(self, id: str) -> int:
        """How many evaluations of a search are there."""
        return _prefix(self._rows("SELECT start, count FROM scores WHERE id = ? ORDER BY start", (id,)))

    def image(self, id: str) -> bytes | None:
        """The file of a result's image."""
        rows = self._rows("SELECT bytes FROM images WHERE id = ?", (id,))
        return rows[0][0] if rows else None

    # The rest is its own affair.

    def _connect(self) -> sqlite3.Connection:
        place = f"{(self.folder / FILE).absolute().as_uri()}?mode={'ro' if self._reading else 'rwc'}"
        connection = sqlite3.connect(place, uri=True, isolation_level=None, check_same_thread=False, timeout=30)
        if not self._reading:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _rows(self, question: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._reading_now:
            if self._reader is None:
                raise EngineClosed("the journal was closed")
            return self._reader.execute(question, values).fetchall()

    def _found(self, rest: str, values: Sequence[Any] = ()) -> list[Kept]:
        rows = self._rows(f"SELECT {', '.join(_COLUMNS)} FROM searches {rest}", values)
        return [_kept(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]

    def _with_scores(self, kept: Kept) -> Kept:
        if kept.status != "accepted":
            return kept
        entries: list[Entry] = []
        found = Replay()
        question = "SELECT start, replay FROM scores WHERE id = ? ORDER BY start"
        for start, text in self._rows(question, (kept.id,)):
            if start > len(entries):  # a commit failed between
                break
            part = read(text)
            entries[start:] = part.entries
            found = part._replace(scales=part.scales or found.scales)
        return replace(kept, replay=found._replace(entries=(*entries,)))

    def _end(
        self,
        id: str,
        status: Status,
        result: str | None,
        error: str | None,
        image: bytes | None,
        to: sqlite3.Connection,
    ) -> None:
        """The first end of a search counts."""
        ended = to.execute(
            "UPDATE searches SET status = ?, ended = ?, result = ?, error = ? WHERE id = ? AND status = 'accepted'",
            (status, self._clock(), result, error, id),
        )
        if ended.rowcount and image is not None:
            to.execute("INSERT OR REPLACE INTO images (id, bytes) VALUES (?, ?)", (id, image))
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
        writer = self._writer
        assert writer is not None, "it is closed after this thread has ended"
        try:
            writer.execute("BEGIN IMMEDIATE")
            for i, (work, _) in enumerate(batch):
                try:
                    with _savepoint(writer):
                        work(writer)
                except sqlite3.OperationalError:  # the disk is full, or the like
                    raise
                except Exception as error:  # of this one alone
                    failed[i] = error
            writer.execute("COMMIT")
            self.failure = None
        except Exception as error:
            with suppress(sqlite3.Error):
                writer.execute("ROLLBACK")
            self.failure = error
            LOG.error("the journal %s could not be written (%s)", self.folder, said(error))
            failed = dict.fromkeys(range(len(batch)), RollflowError(f"the journal cannot be written ({said(error)})"))
            with suppress(sqlite3.Error), self._changed:  # whoever goes on from what was not written is told so
                self._scored = _ends(writer)
        for i, (_, future) in enumerate(batch):
            if future is None or not future.set_running_or_notify_cancel():
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
    """How many evaluations of each search are there without a gap, which a commit that failed may have left."""
    rows = connection.execute("SELECT id, start, count FROM scores ORDER BY id, start")
    return {id: _prefix([row[1:] for row in own]) for id, own in groupby(rows, key=itemgetter(0))}


def _prefix(ends: Sequence[tuple[Any, ...]]) -> int:
    end = 0
    for start, count in ends:
        if start > end:
            break
        end = max(end, start + count)
    return end


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
        raise OSError("a process has it open") from error
    return file
