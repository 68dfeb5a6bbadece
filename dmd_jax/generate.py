"""Makes images with a trained network, each from a seed of its own.

So image i is the same in any batch and on any number of devices, up to the order of sums.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import samplers, sharding


def inputs(
    seed: int, indices: Iterable[int], shape: tuple[int, ...], conditions
) -> dict[str, np.ndarray]:
    """Draws the inputs of images; row k depends on `seed`, `conditions` and indices[k] alone.

    Args:
      seed: of all images.
      indices: of the N images.
      shape: of an image.
      conditions: a source of {"cond": ...}, arrays or trees of arrays; image i takes condition i,
        and after the last one the first follows.

    Returns:
      {"z": [N, *shape] unit Gaussian, "key": [N, 2] uint32 for noise that a sampler adds, "cond":
      [N, ...] or a tree of such}.
    """

    def row(i):
        rng = np.random.Generator(np.random.Philox(key=[seed, i]))
        return {
            "z": rng.standard_normal(shape, np.float32),
            "key": rng.integers(2**32, size=2, dtype=np.uint32),
            "cond": conditions[i % len(conditions)]["cond"],
        }

    rows = [row(i) for i in indices]
    return jax.tree.map(lambda *column: np.stack(column), *rows)


def make_sample(
    sampler: samplers.Sampler, parallel: sharding.Parallel, batch_size: int
) -> Callable:
    """Makes `(params, inputs) -> images`, numpy, for any number of images.

    The sampler's state is float64, as in EDM.

    Raises:
      ValueError: the devices cannot share a batch of that size.
    """

    def sample(params, batch):
        shape = batch["z"].shape[1:]

        def noise(i):
            def of_image(key):
                key = jax.random.fold_in(jax.random.wrap_key_data(key), i)
                return jax.random.normal(key, shape, jnp.float32)

            return jax.vmap(of_image)(batch["key"])

        return sampler.sample(params, batch["z"], batch["cond"], noise)

    run = parallel.in_batches("sampling batch_size", sample, batch_size)

    def run_with_float64(params, inputs):
        with jax.enable_x64(True):
            return run(params, inputs)

    return run_with_float64
