"""The difference of two recordings: what got slower, beyond noise."""

from rollflow.profile.diff.comparing import Diff as Diff
from rollflow.profile.diff.comparing import diff as diff
from rollflow.profile.diff.comparing import recordings as recordings
