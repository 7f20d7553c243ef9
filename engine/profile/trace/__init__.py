"""The trace: what every lane, thread and request did, for Perfetto."""

from rollflow.profile.trace.writing import save as save
from rollflow.profile.trace.writing import trace as trace
