"""What clients of a soak write down: every search that a server accepted, what became of it, and what was wrong."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rollflow.errors import line

OVER = ("done", "cancelled", "failed")


@dataclass
class Account:
    """A search that was accepted.

    Attributes:
        scenario: what its client was about.
        cancelled: whether the client cancelled it.
        status: "done", "cancelled" or "failed" once it was seen so.
        answer: a digest of result and image, as first seen.
    """

    scenario: str
    cancelled: bool = False
    status: str | None = None
    answer: str | None = None


@dataclass
class Books:
    """Every accepted search and every fault.

    Attributes:
        accounts: by search.
        outcomes: how often each scenario ended how.
        lost: answers that never came, of searches and of requests for an image.
        differing: searches that gave different results when they were asked again.
        faults: what else a server should not do, such as a traceback.
    """

    accounts: dict[str, Account] = field(default_factory=dict)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def accept(self, id: str, scenario: str) -> Account:
        """The account of a search; it has one however often it is accepted."""
        return self.accounts.setdefault(id, Account(scenario))

    def see(self, id: str, status: str, result: Any = None, image: bytes | None = None) -> None:
        """Writes down what a search came to; what differs from what was seen before is a fault."""
        account = self.accounts[id]
        if account.status not in (None, status):
            self.differing.append(f"{id} ({account.scenario}) was {account.status} and is {status}")
        account.status = status
        if status == "cancelled" and not account.cancelled:
            self.faults.append(f"{id} ({account.scenario}) is cancelled, and nobody did")
        if status == "failed":
            self.lost.append(f"{id} ({account.scenario}) failed")
        if image is not None:
            answer = hashlib.sha256(json.dumps(result, sort_keys=True).encode() + image).hexdigest()
            if account.answer not in (None, answer):
                self.differing.append(f"{id} ({account.scenario}) gave two results")
            account.answer = answer

    def fault(self, what: str) -> None:
        """Writes down what should not have been."""
        self.faults.append(line(what, 300))

    def lose(self, what: str) -> None:
        """Writes down an answer that never came."""
        self.lost.append(line(what, 300))

    @property
    def sums(self) -> dict[str, int]:
        """How many of everything."""
        states = Counter(account.status for account in self.accounts.values())
        return {
            "accepted": len(self.accounts),
            **{status: states[status] for status in OVER},
            "lost": len(self.lost),
            "answered_twice_differently": len(self.differing),
            "faults": len(self.faults),
        }
