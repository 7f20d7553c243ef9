"""The images of searches that are over: judged as the 8-bit images that are returned, by reward and held-out judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from rollflow import rewards
from rollflow.copies import Download
from rollflow.device.judge import Judge
from rollflow.device.terms import Judgement
from rollflow.rewards import Combined, Reward
from rollflow.row import Event, Outcome, Report, Score, Show, Shown


class Finals:
    """Images of searches that are over, on their way through their rewards and held-out judges.

    Args:
        shows: the searches.
        images: of all their candidates, in order.
        wait: waits for the images.
        judge: calls the rewards.
        report: where the outcomes go.
    """

    def __init__(
        self,
        shows: Sequence[Show],
        images: Tensor,
        wait: Callable[[], None],
        judge: Judge,
        report: Report,
    ):
        self._shows, self._images, self._wait = shows, images, wait
        self._judge, self._report = judge, report
        self._making = Lock()
        self._made: tuple[Tensor, Download] | None = None
        self._first: dict[int, int] = {}  # each search's first image
        for show in shows:
            self._first[show.brief.ticket] = sum(len(other.candidates) for other in shows[: len(self._first)])

    def post(self) -> None:
        """Has every search judged by its reward."""
        places = [[self._first[s.brief.ticket] + i for i in range(len(s.candidates))] for s in self._shows]
        judges = [show.brief.reward for show in self._shows]
        for call in Judgement(self._shows, judges, places, self._shown, self._chosen).calls():
            self._judge.post(call, self._report)

    def _pixels(self) -> tuple[Tensor, Download]:
        """The images in 8 bits where they were decoded, and these and the images themselves on their way to the CPU.

        Rewards need not wait for that way: they judge, on the device, the very bits that are returned.
        """
        with self._making:
            if self._made is None:
                self._wait()
                eight_bit = rounded(self._images)
                self._made = eight_bit, Download(self._images, eight_bit)
            return self._made

    def _shown(self) -> Tensor:
        """What rewards see: the 8-bit images that are returned."""
        return self._pixels()[0].float() / 255

    def _chosen(self, shows: Sequence[Show], scores: list[list[Score]]) -> Event | None:
        """The best candidate of each search; a held-out judge sees it afterwards."""
        pixels, eight_bit = self._pixels()[1].wait()
        over: list[tuple[Show, Outcome]] = []
        open_: list[tuple[Show, Outcome, int, Reward]] = []
        for show, own in zip(shows, scores, strict=True):
            values = [_value(show.brief.reward, score, show.scales) for score in own]
            ranks = [(_worth(value), c.level) for value, c in zip(values, show.candidates, strict=True)]
            best = ranks.index(max(ranks))
            place = self._first[show.brief.ticket] + best
            own_pixels = pixels[place].clone(), eight_bit[place].clone()  # a view would keep everybody's images
            terms = score if isinstance(score := own[best], tuple) else None
            outcome = Outcome(*own_pixels, values[best], None, terms)
            judge = show.brief.held_out
            if judge is None:
                judge = rewards.held_out(show.brief.reward)
            if judge is None:
                over.append((show, outcome))
            else:
                open_.append((show, outcome, place, judge))
        if open_:
            found = {show.brief.ticket: outcome for show, outcome, _, _ in open_}
            then = partial(_with_held_out, found, {show.brief.ticket: judge for show, _, _, judge in open_})
            again = [show for show, *_ in open_], [judge for *_, judge in open_], [[place] for *_, place, _ in open_]
            for call in Judgement(*again, self._shown, then).calls():
                self._judge.post(call, self._report)
        return Shown([show for show, _ in over], [outcome for _, outcome in over]) if over else None


def _with_held_out(
    outcomes: dict[int, Outcome], judges: dict[int, Reward], shows: Sequence[Show], scores: list[list[Score]]
) -> Event:
    made = []
    for show, (score,) in zip(shows, scores, strict=True):
        ticket = show.brief.ticket
        made.append(outcomes[ticket]._replace(held_out=_value(judges[ticket], score)))
    return Shown(shows, made)


def _value(reward: Reward, score: Score, scales: Sequence[tuple[float, float]] = ()) -> float:
    """The reward of a score: of a combined one of the scores of its terms."""
    if isinstance(score, tuple):
        assert isinstance(reward, Combined)
        return reward.of(score, scales)
    return score


def rounded(pixels: Tensor) -> Tensor:
    """Images in [0, 1] in 8 bits."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _worth(score: float) -> float:
    """A score that is no finite number is worst."""
    return score if math.isfinite(score) else -math.inf
