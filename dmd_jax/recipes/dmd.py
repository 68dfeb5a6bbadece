"""Distribution Matching Distillation (Yin et al., arXiv 2311.18828), Algorithms 1 to 3."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import losses, optim, recipes, samplers, sharding, state
from dmd_jax import process as process_lib


def make(
    denoiser: denoiser_lib.Denoiser,
    parallel: sharding.Parallel,
    *,
    seed: int,
    null_cond,
    optimizer: dict,
    fake_score_optimizer: dict,
    ema_decay: float,
    matching_weight: float,
    regression_weight: float,
    guidance_scale: float,
    matching_levels: tuple[int, int],
    fake_score_levels: tuple[int, int],
    distance: Callable = losses.squared_error,
    distance_params=None,
) -> recipes.Recipe:
    """Batches are {"fresh": {"cond": [B, ...]}, "pairs": {"noise": [P, H, W, C], "image": [P, H, W, C], "cond": [P, ...]}}.

    Args:
      denoiser: the teacher; generator and fake score are copies of it.
      parallel: the devices.
      seed: of noise and times.
      null_cond: the condition that stands for none in the guidance.
      optimizer: arguments of `optim.adamw` for the generator.
      fake_score_optimizer: the same for the fake score.
      ema_decay: of the running mean of the generator's parameters, per step; 0 to keep none.
      matching_weight: of the distribution matching loss.
      regression_weight: of the regression loss.
      guidance_scale: of the real score; 1 for none.
      matching_levels: lowest and highest noise level of the distribution matching loss.
      fake_score_levels: the same of the fake score's training.
      distance: of the regression loss, see `losses.regression_loss`.
      distance_params: what it needs.
    """
    process = denoiser.process
    real_score = denoiser_lib.guided(denoiser, guidance_scale, null_cond)
    generate = samplers.one_step(denoiser, process).sample
    tx, fake_tx = optim.adamw(**optimizer), optim.adamw(**fake_score_optimizer)

    def init(params):
        generator, fake_score = state.create(params, tx, ema=ema_decay > 0), state.create(params, fake_tx, ema=False)
        frozen = jax.tree.map(jnp.array, {"real_score": params, "distance": distance_params})
        return state.TrainState(jnp.zeros((), jnp.int32), generator, fake_score, frozen)

    def generator_loss(params, fake_score, frozen, fresh, pairs):
        """Equation 10; also returns the fresh images."""
        both = jax.tree.map(lambda *a: jnp.concatenate(a), (fresh["z"], fresh["cond"]), (pairs["noise"], pairs["cond"]))
        x, x_pairs = jnp.split(generate(params, *both), fresh["z"].shape[:1])
        x_const = jax.lax.stop_gradient(x)
        x_t = process_lib.add_noise(process, x_const, fresh["eps"], fresh["t"])
        x_real = real_score(frozen["real_score"], x_t, fresh["t"], fresh["cond"])
        x_fake = denoiser(fake_score, x_t, fresh["t"], fresh["cond"])
        matching = losses.distribution_matching_loss(x, x_real, x_fake)
        regression = losses.regression_loss(x_pairs, pairs["image"], frozen["distance"], distance=distance)
        metrics = {"matching": matching, "regression": regression, "real_fake": jnp.mean(jnp.abs(x_real - x_fake))}
        return matching_weight * matching + regression_weight * regression, (x_const, metrics)

    def fake_score_loss(params, x, fresh):
        return losses.denoising_loss(*denoiser.output_and_target(params, x, fresh["fake_eps"], fresh["fake_t"], fresh["cond"]))

    def gradients(params, batch):
        generator, fake_score, frozen = params
        fresh, pairs = batch["fresh"], batch["pairs"]
        grad_generator = jax.grad(generator_loss, has_aux=True)
        generator_grads, (x, metrics) = grad_generator(generator, fake_score, frozen, fresh, pairs)
        loss, fake_grads = jax.value_and_grad(fake_score_loss)(fake_score, x, fresh)
        return generator_grads, fake_grads, metrics | {"fake_score": loss}

    def train_step(train_state, batch):
        generator, fake_score = train_state.generator, train_state.fake_score
        cond, shape = batch["fresh"]["cond"], batch["pairs"]["noise"].shape[1:]
        shape, n = (cond.shape[0], *shape), cond.shape[:1]
        k_z, k_t, k_eps, k_fake_t, k_fake_eps = jax.random.split(jax.random.fold_in(jax.random.key(seed), train_state.step), 5)
        fresh = {
            "cond": cond,
            "z": jax.random.normal(k_z, shape),
            "t": process_lib.sample_levels(process, k_t, n, *matching_levels),
            "eps": jax.random.normal(k_eps, shape),
            "fake_t": process_lib.sample_levels(process, k_fake_t, n, *fake_score_levels),
            "fake_eps": jax.random.normal(k_fake_eps, shape),
        }
        batch = parallel.split({"fresh": fresh, "pairs": batch["pairs"]})

        generator_grads, fake_grads, metrics = parallel.mean(gradients)((generator.params, fake_score.params, train_state.frozen), batch)
        generator, norm = optim.apply_gradients(generator, generator_grads, tx, ema_decay=ema_decay)
        fake_score, fake_norm = optim.apply_gradients(fake_score, fake_grads, fake_tx)
        metrics |= {"grad_norm": norm, "fake_grad_norm": fake_norm, "skipped": generator.skipped + fake_score.skipped}
        return train_state.replace(step=train_state.step + 1, generator=generator, fake_score=fake_score), metrics

    return recipes.Recipe(init, train_step)
