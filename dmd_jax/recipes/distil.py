"""Distillation of an ODE into one step by its own pairs (InstaFlow, arXiv 2309.06380, equation 6): with x made of z by the ODE,

    min E D(x, G(z, cond)),    for a flow G(z) = z - v(z, 1): one Euler step

D is L2 at first and LPIPS then, in two stages. Of a flow that reflow has straightened little is left to learn.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import losses, optim, recipes, samplers, sharding, state


def make(
    denoiser: denoiser_lib.Denoiser,
    parallel: sharding.Parallel,
    *,
    seed: int,
    null_cond,
    optimizer: dict,
    ema_decay: float,
    ema_warmup: float = 0.0,
    distance: Callable = losses.squared_error,
    distance_params=None,
) -> recipes.Recipe:
    """Batches are {"pairs": {"noise": [B, H, W, C], "image": [B, H, W, C], "cond": [B, ...]}}.

    Args:
      denoiser: of any process; the generator is its one step at the highest noise level.
      parallel: the devices.
      seed: not used: nothing is drawn.
      null_cond: not used either.
      optimizer: arguments of `optim.adamw`.
      ema_decay: of the running mean of the parameters, per step; 0 to keep none.
      ema_warmup: see `optim.warmed_up`; 0 for none.
      distance: see `losses.regression_loss`.
      distance_params: what it needs.
    """
    del seed, null_cond
    generate = samplers.one_step(denoiser, denoiser.process).sample
    tx = optim.adamw(**optimizer)

    def init(params, others=distance_params):
        frozen = jax.tree.map(jnp.array, {"distance": others})
        return state.TrainState(
            jnp.zeros((), jnp.int32), state.create(params, tx, ema=ema_decay > 0), frozen=frozen
        )

    def gradients(generator, frozen, batch):
        def loss(generator):
            x = generate(generator, batch["noise"], batch["cond"])
            return losses.regression_loss(x, batch["image"], frozen["distance"], distance=distance)

        value, grads = jax.value_and_grad(loss)(generator)
        return grads, {"loss": value}

    def train_step(train_state, batch):
        generator = denoiser.cast(train_state.generator.params)
        grads, metrics = parallel.gradients(gradients)(
            generator, train_state.frozen, batch["pairs"]
        )
        decay = optim.warmed_up(ema_decay, ema_warmup, train_state.step)
        generator, norm = optim.apply_gradients(train_state.generator, grads, tx, ema_decay=decay)
        metrics |= {"grad_norm": norm, "skipped": generator.skipped}
        return train_state.replace(step=train_state.step + 1, generator=generator), metrics

    return recipes.Recipe(init, train_step, distance_params)
