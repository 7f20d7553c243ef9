"""Rewards: functions from images and prompts to scores.

A reward is anything with the methods of `Reward`, or a plain function `f(images, prompts) -> scores`; the built-in ones
have names, which combine to expressions such as "0.7*vqa + 0.3*aesthetic". A *held-out* reward is a second judge that
no search sees: the engine reports its score of the final image, which shows whether a search improved the image or only
fooled its reward.
"""

from rollflow.rewards.catalog import combine as combine
from rollflow.rewards.catalog import held_out as held_out
from rollflow.rewards.catalog import make as make
from rollflow.rewards.catalog import names as names
from rollflow.rewards.catalog import unscaled as unscaled
from rollflow.rewards.catalog import with_gradients as with_gradients
from rollflow.rewards.combined import Combined as Combined
from rollflow.rewards.combined import terms_of as terms_of
from rollflow.rewards.protocol import RETRIES as RETRIES
from rollflow.rewards.protocol import FunctionReward as FunctionReward
from rollflow.rewards.protocol import Reward as Reward
from rollflow.rewards.protocol import Terms as Terms
from rollflow.rewards.protocol import batch as batch
from rollflow.rewards.protocol import check as check
from rollflow.rewards.protocol import clips as clips
from rollflow.rewards.protocol import concurrent as concurrent
from rollflow.rewards.protocol import differentiable as differentiable
from rollflow.rewards.protocol import measures as measures
from rollflow.rewards.protocol import retries as retries
from rollflow.rewards.protocol import retry_on as retry_on
from rollflow.rewards.protocol import size as size
from rollflow.rewards.protocol import terms as terms
from rollflow.rewards.protocol import timeout as timeout
from rollflow.rewards.protocol import title as title
