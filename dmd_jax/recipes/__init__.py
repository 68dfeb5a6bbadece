"""Training methods: a method is a file, in this folder or in a package of the user's own.

A method's file has one function, `make(denoiser, parallel, *, seed, null_cond, ...) -> Recipe`, and
says with three constants what the rest of the program has to know about it:

    STREAMS   {stream: fields}: what a batch holds, {stream: {field: array [B, ...]}}
    PLOTTED   names of the metrics that a report draws
    METHOD    a `Method`, what a model card says; None if the method makes no one-step generator
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import optim, sharding, state
from dmd_jax import process as process_lib


class Recipe(NamedTuple):
    """A method as pure functions.

    Attributes:
      init: `(params, others) -> TrainState`, from the initial parameters, such as the teacher's,
        and from `others`.
      train_step: `(state, batch) -> (state, metrics)`; metrics are scalars.
      others: parameters of further networks, such as a distance; None if there are none.
    """

    init: Callable
    train_step: Callable
    others: dict | None = None


class Method(NamedTuple):
    """What a model card says about a method.

    Attributes:
      name: of the method, with the address of its paper.
      tag: of the model card.
    """

    name: str
    tag: str


def single(
    denoiser: denoiser_lib.Denoiser,
    parallel: sharding.Parallel,
    *,
    draw: Callable,
    loss: Callable,
    seed: int,
    optimizer: dict,
    ema_decay: float,
    ema_warmup: float = 0.0,
    others=None,
) -> Recipe:
    """Makes a recipe that trains one network, the generator, with one loss.

    Args:
      denoiser: the network and what its parameters are cast to.
      parallel: the devices.
      draw: `(key, batch) -> arrays`, adds random arrays to what the loss reads of a batch; all of
        them [B, ...].
      loss: `(params, others, arrays) -> scalar`.
      seed: of the keys.
      optimizer: arguments of `optim.adamw`.
      ema_decay: of the running mean of the parameters, per step; 0 keeps none.
      ema_warmup: see `optim.warmed_up`; 0 for none.
      others: parameters that the loss reads and no step changes.
    """
    tx = optim.adamw(**optimizer)

    def init(params, others):
        return state.TrainState(
            step=jnp.zeros((), jnp.int32),
            generator=state.create(params, tx, ema=ema_decay > 0),
            frozen=jax.tree.map(jnp.array, others),
        )

    def gradients(params, others, arrays):
        value, grads = jax.value_and_grad(loss)(params, others, arrays)
        return grads, {"loss": value}

    def train_step(train_state, batch):
        generator = train_state.generator
        key = jax.random.fold_in(jax.random.key(seed), train_state.step)
        arrays = parallel.split(draw(key, batch))
        params = denoiser.cast(generator.params)
        grads, metrics = parallel.gradients(gradients)(params, train_state.frozen, arrays)
        decay = optim.warmed_up(ema_decay, ema_warmup, train_state.step)
        generator, norm = optim.apply_gradients(generator, grads, tx, ema_decay=decay)
        metrics |= {"grad_norm": norm, "skipped": generator.skipped}
        return train_state.replace(step=train_state.step + 1, generator=generator), metrics

    return Recipe(init, train_step, others)


def drop(key: jax.Array, cond: jax.Array, null_cond, fraction: float) -> jax.Array:
    """Replaces `cond` [B, ...] by `null_cond` in a random `fraction` of the samples."""
    dropped = jax.random.bernoulli(key, fraction, cond.shape[:1])
    return jnp.where(process_lib.expand(dropped, cond), jnp.asarray(null_cond, cond.dtype), cond)
