"""Training methods. Each file has `make(denoiser, parallel, *, seed, ...) -> Recipe`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax import process as process_lib


class Recipe(NamedTuple):
    """A method as pure functions.

    Attributes:
      init: `(params, others) -> TrainState`, from the initial or the teacher's parameters and from `others`.
      train_step: `(state, batch) -> (state, metrics)`; metrics are scalars.
      others: parameters of further networks, such as a distance; None if there are none.
    """

    init: Callable
    train_step: Callable
    others: dict | None = None


def drop(key: jax.Array, cond: jax.Array, null_cond, fraction: float) -> jax.Array:
    """`cond` [B, ...] with `null_cond` in the place of a random `fraction` of the samples."""
    dropped = jax.random.bernoulli(key, fraction, cond.shape[:1])
    return jnp.where(process_lib.expand(dropped, cond), jnp.asarray(null_cond, cond.dtype), cond)
