"""Reflow: a flow learns to go straight from the noise of pairs to their images, which straightens it (Liu et al., arXiv 2209.03003,
equation 1; InstaFlow, arXiv 2309.06380, equation 5):

    min E || (eps - x) - v(x_t, t, cond) ||^2,    x_t = (1 - t) x + t eps,    t uniform

where another flow's ODE, or the teacher's, made x of eps. With pairs of a stage trained so, it is the next round.
"""

import jax
import jax.numpy as jnp

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import losses, optim, recipes, sharding, state
from dmd_jax import process as process_lib


def make(
    denoiser: denoiser_lib.Denoiser,
    parallel: sharding.Parallel,
    *,
    seed: int,
    null_cond,
    optimizer: dict,
    ema_decay: float,
    ema_warmup: float = 0.0,
    cond_dropout: float = 0.0,
) -> recipes.Recipe:
    """Batches are {"pairs": {"noise": [B, H, W, C], "image": [B, H, W, C], "cond": [B, ...]}}.

    Args:
      denoiser: of a `RectifiedFlow`.
      parallel: the devices.
      seed: of the times.
      null_cond: the condition that stands for none.
      optimizer: arguments of `optim.adamw`.
      ema_decay: of the running mean of the parameters, per step; 0 to keep none.
      ema_warmup: see `optim.warmed_up`; 0 for none.
      cond_dropout: fraction of samples that see `null_cond`.
    """
    if not isinstance(denoiser.process, process_lib.RectifiedFlow):
        raise ValueError(
            f"reflow needs the process RectifiedFlow, got {type(denoiser.process).__name__}; give it to the stage."
        )
    tx = optim.adamw(**optimizer)

    def init(params, others=None):
        return state.TrainState(
            step=jnp.zeros((), jnp.int32), generator=state.create(params, tx, ema=ema_decay > 0)
        )

    def gradients(params, frozen, batch):
        x_t = process_lib.add_noise(denoiser.process, batch["image"], batch["noise"], batch["t"])

        def loss(params):
            velocity = denoiser_lib.velocity(
                x_t, denoiser(params, x_t, batch["t"], batch["cond"]), batch["t"]
            )
            return losses.denoising_loss(velocity, batch["noise"] - batch["image"])

        value, grads = jax.value_and_grad(loss)(params)
        return grads, {"loss": value}

    def train_step(train_state, batch):
        pairs = batch["pairs"]
        k_t, k_drop = jax.random.split(jax.random.fold_in(jax.random.key(seed), train_state.step))
        t = denoiser.process.sample_t(k_t, pairs["image"].shape[:1])
        cond = recipes.drop(k_drop, pairs["cond"], null_cond, cond_dropout)
        batch = parallel.split(pairs | {"cond": cond, "t": t})

        grads, metrics = parallel.gradients(gradients)(
            denoiser.cast(train_state.generator.params), None, batch
        )
        decay = optim.warmed_up(ema_decay, ema_warmup, train_state.step)
        generator, norm = optim.apply_gradients(train_state.generator, grads, tx, ema_decay=decay)
        metrics |= {"grad_norm": norm, "skipped": generator.skipped}
        return train_state.replace(step=train_state.step + 1, generator=generator), metrics

    return recipes.Recipe(init, train_step)
