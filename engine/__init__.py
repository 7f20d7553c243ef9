"""rollflow: a sampler engine for inference-time scaling of flow models."""

__version__ = "0.1.0"
