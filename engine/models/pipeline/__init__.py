"""Any flow pipeline of diffusers: how it calls its transformer is learned from the pipeline itself, and checked."""

from rollflow.models.pipeline.families import Family as Family
from rollflow.models.pipeline.model import PipelineModel as PipelineModel
