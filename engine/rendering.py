"""From the outcome of a search to what its caller gets."""

from __future__ import annotations

import warnings

from rollflow.errors import shown
from rollflow.profile.ledger import Ledger
from rollflow.request import Result, picture
from rollflow.ticket import Finished


class Rendering:
    """Makes results, and warns once of rewards that are no numbers.

    Args:
        ledger: knows what they cost.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._warned = ledger, False

    def __call__(self, finished: Finished) -> Result:
        """What the caller gets."""
        outcome, history, plan = finished.outcome, finished.history, finished.plan
        if history.invalid and not self._warned:
            self._warned = True
            warnings.warn(
                f"the reward {plan.reward.name} gave {history.invalid} of {len(history)} particles of "
                f"{shown(plan.request.prompt)} a score that is no finite number: these count as worst. "
                "Result.invalid_rewards counts them; this engine warns once",
                RuntimeWarning,
                stacklevel=5,
            )
        return Result(
            image=picture(outcome.rounded),
            pixels=outcome.pixels,
            reward=outcome.reward,
            held_out=outcome.held_out,
            committed_nfe=history.committed,
            executed_nfe=history.executed,
            invalid_rewards=history.invalid,
            history=history.records,
            seconds=finished.seconds,
            request=plan.request,
            stopped=finished.stopped,
            notes=[*history.notes],
            network_rows=history.executed * finished.network_rows,
            terms=history.named(outcome.terms),
            cost=self._ledger.cost(finished.ticket),
            cached_nfe=history.cached,
        )
