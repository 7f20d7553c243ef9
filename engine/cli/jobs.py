"""`rollflow jobs`: the searches that a journal holds."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tyro

from rollflow.cli.options import by_default
from rollflow.errors import RequestError, shown

if TYPE_CHECKING:
    from rollflow.journal import Kept

Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Ended = Annotated[str | None, by_default("all", metavar="STATUS")]


@dataclass(frozen=True)
class Jobs:
    """List the searches that a journal holds, the last first; a server may have it open meanwhile.

    An accepted search waits or runs, or goes on when a server is started with this journal. What a client has fetched
    goes when it is older than the server's --keep, as do all others.
    """

    journal: Folder
    """The folder that was given to `rollflow serve --journal` or `Engine(journal=...)`."""
    status: Ended = None
    """Only those that are accepted, done, failed or cancelled."""
    limit: int = 100
    """How many at most."""
    json: bool = False
    """Print them as JSON, one a line."""

    def __call__(self) -> None:
        """Runs the command.

        Raises:
            RequestError: there is no journal in the folder, no such status, or a limit below 1.
        """
        from rollflow.journal import Journal, Status

        if self.status is not None and self.status not in get_args(Status):
            raise RequestError(f"--status {shown(self.status)}: choose one of {', '.join(get_args(Status))}")
        if self.limit < 1:
            raise RequestError(f"--limit {self.limit}: it must be at least 1")
        with Journal(self.journal, reading=True) as journal:
            status: Any = self.status
            found = [described(kept, journal.evaluated(kept.id)) for kept in journal.jobs(self.limit, status)]
        if self.json:
            for one in found:
                print(json.dumps(one))
        else:
            _print(found)


def described(kept: Kept, evaluated: int) -> dict[str, Any]:
    """A search as plain JSON: of a request its prompt and what it asks for beyond it, of a result the numbers."""
    from rollflow.wire import TENSORS

    result = {
        name: value for name, value in (kept.result or {}).items() if name not in ("improvements", "level", "prompt")
    }
    asked = {name: value for name, value in kept.request.items() if name not in TENSORS and name[:1] != "_"}
    return {
        "id": kept.id, "status": kept.status, "created": kept.created, "ended": kept.ended, "owner": kept.owner,
        "key": kept.key, "fetched": kept.fetched, "request": asked, "result": result or None, "error": kept.error,
        "evaluated": evaluated if kept.status == "accepted" else None,
    }  # fmt: skip


def _print(found: list[dict[str, Any]]) -> None:
    from rollflow.cli.judging import print_table

    print_table(
        "searches",
        ("id", "status", "created", "owner", "NFE", "reward", "fetched", "prompt"),
        [_row(one) for one in found],
        "accepted: it waits, runs, or goes on after the next start; NFE: of such a one those that it need not do "
        "again; fetched: whether its image was asked for",
    )


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    result = one["result"] or {}
    nfe, reward = result.get("nfe", one["evaluated"]), result.get("reward")
    why = one["error"].get("message", "") if one["status"] == "failed" else ""
    status = f"{one['status']}: {why}" if why else one["status"]
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["created"]))
    return (
        one["id"], shown(status, 80).strip("'\""), created, one["owner"], "" if nfe is None else str(nfe),
        "" if reward is None else f"{reward:.4g}", "yes" if one["fetched"] else "",
        shown(one["request"].get("prompt", ""), 60).strip("'\""),
    )  # fmt: skip
