"""One-step image generators out of pretrained diffusion models, in JAX."""

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def load(path, *, plugins=(), **settings):
    """Loads the model of a workdir or of a diffusers directory.

    `dmd_jax.load("/data/coco")(["a red apple"], seed=0)` makes images [1, 512, 512, 3] in [-1, 1].

    Args:
      path: the directory, or a name on the Hugging Face hub if huggingface_hub is installed.
      plugins: packages of your own that the run's config may name.
      **settings: `stage`, `batch_size`, `dtype`, `sampler`, `controlnet` and `quantize`, which
        `dmd_jax.experiment.model.load` explains.

    Returns:
      A `dmd_jax.experiment.model.Model`.

    Raises:
      ValueError: the path holds no model, or the settings do not fit it.
    """
    from dmd_jax import lookup  # here, so that `import dmd_jax` stays fast
    from dmd_jax.experiment import model

    lookup.admit(plugins)
    return model.load(path, **settings)
