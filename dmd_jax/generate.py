"""Images from a trained stage, each from randomness of its own seed: image i is the same in any batch and on any number of devices,
up to the order of sums."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import samplers, sharding


def inputs(
    seed: int, indices: Iterable[int], shape: tuple[int, ...], conditions
) -> dict[str, np.ndarray]:
    """What images are made of; row k depends on `seed`, `conditions` and indices[k] alone.

    Args:
      seed: of all of them.
      indices: of the images, N of them.
      shape: of an image.
      conditions: a source of {"cond": ...}, arrays or trees of them, gone through again and again.

    Returns:
      {"z": [N, *shape] unit Gaussian, "key": [N, 2] uint32 for noise added on the way, "cond": [N, ...] or a tree of such}.
    """
    rows = []
    for i in indices:
        rng = np.random.Generator(np.random.Philox(key=[seed, i]))
        z = rng.standard_normal(shape, np.float32)
        rows.append(
            (
                z,
                rng.integers(2**32, size=2, dtype=np.uint32),
                conditions[i % len(conditions)]["cond"],
            )
        )
    return dict(
        zip(
            ("z", "key", "cond"), jax.tree.map(lambda *column: np.stack(column), *rows), strict=True
        )
    )


def make_sample(
    sampler: samplers.Sampler, parallel: sharding.Parallel, batch_size: int
) -> Callable:
    """`(params, inputs) -> images` as numpy, for any number of images; the sampler's state is float64, as in EDM.

    Raises:
      ValueError: the devices cannot share a batch of that size.
    """

    def sample(params, batch):
        shape = batch["z"].shape[1:]

        def noise(i):
            keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.wrap_key_data(key), i))(
                batch["key"]
            )
            return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)

        return sampler.sample(params, batch["z"], batch["cond"], noise)

    run = parallel.in_batches("sampling batch_size", sample, batch_size)

    def run_with_float64(params, inputs):
        with jax.enable_x64(True):
            return run(params, inputs)

    return run_with_float64
