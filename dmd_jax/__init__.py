"""One-step image generators out of pretrained diffusion models, in JAX."""

__version__ = "0.1.0"
