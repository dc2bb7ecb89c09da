"""SteerLM on NVIDIA NeMo: attribute-conditioned language models that people steer at inference."""

__version__ = "0.1.0"
