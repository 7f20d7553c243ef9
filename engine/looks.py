"""Pictures of searches on their way: for a report that shows what their evaluations bought."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from rollflow.errors import RollflowError
from rollflow.job import Job

MOMENTS = (0.1, 0.3, 0.6)  # shares of a budget after which a picture is taken
REQUESTS = 16  # of which pictures are taken
SIDE = 160  # pixels of a picture's longer side, at most


class Looks:
    """Takes pictures of the best particles so far. Each is decoded for it, as a chore of the engine's.

    Args:
        clock: seconds, as the ledger counts them.

    Attributes:
        taken: what was taken: the request's number, NFE, seconds and best reward then, whether it is the final image,
            and the picture.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self.taken: list[dict[str, Any]] = []

    def follow(self, jobs: Sequence[Job], moments: Sequence[float] = MOMENTS) -> None:
        """Waits for jobs, whatever becomes of them, and takes pictures of the first at shares of their budgets."""
        changed, left = threading.Event(), {job: [*moments] for job in jobs[:REQUESTS]}
        with ExitStack() as watches:
            for job in left:
                watches.enter_context(job.watched(changed.set))
            while any(not job.done() for job in left):
                changed.wait()
                changed.clear()
                for job, shares in left.items():
                    self._look(job, shares)
        concurrent.futures.wait([job._future for job in jobs])
        for job in left:
            with suppress(RollflowError):  # it has no image
                result = job.result()
                self._take(job, result.committed_nfe, result.reward, result.image, final=True)

    def _look(self, job: Job, shares: list[float]) -> None:
        update = None if job.done() or not shares else job.update
        budget = job.request.nfe
        if update is None or budget is None or update.committed_nfe < shares[0] * budget:
            return
        while shares and update.committed_nfe >= shares[0] * budget:
            shares.pop(0)
        with suppress(RollflowError):  # it ended meanwhile
            if (image := update.image()) is not None and not job.done():
                self._take(job, update.committed_nfe, update.best_reward, image, final=False)

    def _take(self, job: Job, nfe: int, reward: float, image: Image.Image, final: bool) -> None:
        picture = image.copy()
        picture.thumbnail((SIDE, SIDE))
        self.taken.append(
            {
                "request": job.number, "nfe": nfe, "seconds": self._clock(), "final": final, "image": picture,
                "reward": reward if abs(reward) < float("inf") else None,
            }
        )  # fmt: skip

    def save(self, folder: Path) -> list[dict[str, Any]]:
        """Writes the pictures into a folder's folder `images`; returns what was taken, with files for pictures."""
        found = []
        if (folder / "images").is_dir():  # of an earlier recording
            for old in (folder / "images").glob("[0-9]*-*.webp"):
                old.unlink()
        for one in self.taken:
            file = Path("images") / f"{one['request']}-{'final' if one['final'] else one['nfe']}.webp"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            one["image"].save(folder / file, lossless=max(one["image"].size) <= 96, quality=85)
            found.append({**{name: value for name, value in one.items() if name != "image"}, "file": file.as_posix()})
        return found
