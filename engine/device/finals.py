"""The images of searches that are over: judged as the 8-bit images that are returned, by reward and held-out judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from rollflow import rewards
from rollflow.device.judge import Call, Judge, grouped
from rollflow.row import Event, Outcome, Report, Show, Shown


class Finals:
    """Images of searches that are over, on their way through their rewards and held-out judges.

    Args:
        shows: the searches.
        images: of all their candidates, in order.
        wait: waits for the images.
        judge: calls the rewards.
        device: where rewards see images.
        report: where the outcomes go.
    """

    def __init__(
        self,
        shows: Sequence[Show],
        images: Tensor,
        wait: Callable[[], None],
        judge: Judge,
        device: torch.device,
        report: Report,
    ):
        self._shows, self._images, self._wait = shows, images, wait
        self._judge, self._device, self._report = judge, device, report
        self._making = Lock()
        self._made: tuple[Tensor, Tensor] | None = None
        self._first: dict[int, int] = {}  # each search's first image
        for show in shows:
            self._first[show.brief.ticket] = sum(len(other.candidates) for other in shows[: len(self._first)])

    def post(self) -> None:
        """Has every search judged by its reward."""
        for reward, group in grouped([show.brief.reward for show in self._shows]):
            shows = [self._shows[i] for i in group]
            places = [[self._first[s.brief.ticket] + i for i in range(len(s.candidates))] for s in shows]
            self._judge.post(Call(reward, shows, places, self._shown, self._chosen), self._report)

    def _pixels(self) -> tuple[Tensor, Tensor]:
        """The images and the same in 8 bits, on the CPU."""
        with self._making:
            if self._made is None:
                self._wait()
                pixels = self._images.cpu()
                self._made = pixels, rounded(pixels)
            return self._made

    def _shown(self) -> Tensor:
        """What rewards see: the 8-bit images that are returned."""
        return self._pixels()[1].to(self._device).float() / 255

    def _chosen(self, shows: Sequence[Show], scores: list[list[float]]) -> Event | None:
        """The best candidate of each search; a held-out judge sees it afterwards."""
        pixels, eight_bit = self._pixels()
        outcomes, places = [], []
        for show, own in zip(shows, scores, strict=True):
            levels = [candidate.level for candidate in show.candidates]
            ranks = [(_worth(score), level) for score, level in zip(own, levels, strict=True)]
            best = ranks.index(max(ranks))
            places.append(place := self._first[show.brief.ticket] + best)
            own_pixels = pixels[place].clone(), eight_bit[place].clone()  # a view would keep everybody's images
            outcomes.append(Outcome(*own_pixels, own[best], None))
        held_out = rewards.held_out(shows[0].brief.reward)
        if held_out is None:
            return Shown(shows, outcomes)
        found = {show.brief.ticket: outcome for show, outcome in zip(shows, outcomes, strict=True)}
        call = Call(held_out, shows, [[place] for place in places], self._shown, partial(_with_held_out, found))
        self._judge.post(call, self._report)
        return None


def _with_held_out(outcomes: dict[int, Outcome], shows: Sequence[Show], scores: list[list[float]]) -> Event:
    found = [outcomes[show.brief.ticket] for show in shows]
    return Shown(shows, [outcome._replace(held_out=s) for outcome, (s,) in zip(found, scores, strict=True)])


def rounded(pixels: Tensor) -> Tensor:
    """Images in [0, 1] in 8 bits."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _worth(score: float) -> float:
    """A score that is no finite number is worst."""
    return score if math.isfinite(score) else -math.inf
