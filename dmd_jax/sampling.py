"""Images from a trained stage, each from noise of its own seed: image i is the same in any batch and on any number of devices."""

from collections.abc import Iterable

import jax
import numpy as np

from dmd_jax import recipes, sharding


def noise(seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> np.ndarray:
    """Unit Gaussian noise [N, *shape]; row k depends on `seed` and indices[k] alone."""
    return np.stack([np.random.Generator(np.random.Philox(key=[seed, i])).standard_normal(shape, np.float32) for i in indices])


def make_sampler(recipe: recipes.Recipe, parallel: sharding.Parallel, batch_size: int):
    """`(params, z [N, H, W, C], cond [N, ...]) -> images` as numpy, for any N: one program, run on batches of `batch_size`.

    Raises:
      ValueError: the devices cannot share a batch of that size.
    """
    parallel.check_batch("sampling batch_size", batch_size)
    program = jax.jit(parallel.map(lambda params, batch: recipe.sample(params, *batch)))

    def sample(params, z, cond):
        images = []
        for start in range(0, len(z), batch_size):
            rows = np.arange(start, start + batch_size) % len(z)  # the last batch is filled up from the beginning
            images.append(np.asarray(program(params, (z[rows], cond[rows]))))
        return np.concatenate(images)[: len(z)]

    return sample
