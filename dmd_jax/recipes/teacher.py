"""Trains a diffusion model from scratch: the denoising loss of EDM (Karras et al., arXiv 2206.00364, equation 8)."""

import jax
import jax.numpy as jnp

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import losses, optim, recipes, sharding, state


def make(
    denoiser: denoiser_lib.Denoiser,
    parallel: sharding.Parallel,
    *,
    seed: int,
    null_cond,
    optimizer: dict,
    ema_decay: float,
    cond_dropout: float,
    ema_warmup: float = 0.0,
) -> recipes.Recipe:
    """Batches are {"images": {"image": [B, H, W, C], "cond": [B, ...]}}.

    Args:
      denoiser: the model to be trained.
      parallel: the devices.
      seed: of noise and times.
      null_cond: the condition that stands for none.
      optimizer: arguments of `optim.adamw`.
      ema_decay: of the running mean of the parameters, per step; 0 to keep none.
      cond_dropout: fraction of samples that see `null_cond`, so that the model can be guided.
      ema_warmup: see `optim.warmed_up`; 0 for none.
    """
    tx = optim.adamw(**optimizer)
    process = denoiser.process

    def init(params, others=None):
        return state.TrainState(
            step=jnp.zeros((), jnp.int32), generator=state.create(params, tx, ema=ema_decay > 0)
        )

    def gradients(params, frozen, batch):
        def loss(params):
            output, target = denoiser.output_and_target(
                params, batch["image"], batch["eps"], batch["t"], batch["cond"]
            )
            return losses.denoising_loss(output, target)

        value, grads = jax.value_and_grad(loss)(params)
        return grads, {"loss": value}

    def train_step(train_state, batch):
        image, cond = batch["images"]["image"], batch["images"]["cond"]
        k_t, k_eps, k_drop = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), train_state.step), 3
        )
        t = process.sample_t(k_t, image.shape[:1])
        cond = recipes.drop(k_drop, cond, null_cond, cond_dropout)
        batch = parallel.split(
            {"image": image, "cond": cond, "t": t, "eps": jax.random.normal(k_eps, image.shape)}
        )

        grads, metrics = parallel.gradients(gradients)(
            denoiser.cast(train_state.generator.params), None, batch
        )
        decay = optim.warmed_up(ema_decay, ema_warmup, train_state.step)
        generator, norm = optim.apply_gradients(train_state.generator, grads, tx, ema_decay=decay)
        metrics |= {"grad_norm": norm, "skipped": generator.skipped}
        return train_state.replace(step=train_state.step + 1, generator=generator), metrics

    return recipes.Recipe(init, train_step)
