"""Distribution Matching Distillation (Yin et al., arXiv 2311.18828), Algorithms 1 to 3."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import losses, optim, recipes, rng, sharding, state
from dmd_jax import process as process_lib

STREAMS = {"fresh": ("cond",), "pairs": ("noise", "image", "cond")}
PLOTTED = ("matching", "regression", "fake_score")
METHOD = recipes.Method(
    "Distribution Matching Distillation (https://arxiv.org/abs/2311.18828)", "dmd"
)


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
    matched: tuple[str, ...] = ("fresh",),
    distance: Callable = losses.squared_error,
    distance_params=None,
) -> recipes.Recipe:
    """Makes the recipe for batches {"fresh": {"cond": [B, ...]}, "pairs": {"noise": [P, H, W, C],
    "image": [P, H, W, C], "cond": [P, ...]}}.

    Args:
      denoiser: the teacher; generator and fake score start as copies of it.
      parallel: the devices.
      seed: of noise and times.
      null_cond: the condition that stands for none in the guidance.
      optimizer: arguments of `optim.adamw` for the generator.
      fake_score_optimizer: arguments of `optim.adamw` for the fake score.
      ema_decay: of the running mean of the generator's parameters, per step; 0 keeps none.
      matching_weight: of the distribution matching loss.
      regression_weight: of the regression loss.
      guidance_scale: of the real score; 1 for no guidance.
      matching_levels: lowest and highest noise level of the distribution matching loss.
      fake_score_levels: lowest and highest noise level of the fake score's training.
      matched: the streams whose images the distribution matching loss and the fake score see:
        ("fresh",), or ("fresh", "pairs") as in Algorithm 1 for LAION.
      distance: of the regression loss, see `losses.regression_loss`.
      distance_params: parameters of the distance.

    Raises:
      ValueError: `matched` is something else.
    """
    if tuple(matched) not in (("fresh",), ("fresh", "pairs")):
        raise ValueError(f"matched is {matched}; expected ('fresh',), or ('fresh', 'pairs').")
    process = denoiser.process
    generate = denoiser_lib.one_step(denoiser, process)
    real_score = denoiser_lib.guided(denoiser, guidance_scale, null_cond)
    tx = optim.adamw(**optimizer)
    fake_tx = optim.adamw(**fake_score_optimizer)

    def init(params, others):
        frozen = {"real_score": denoiser.cast(params), "distance": others}
        return state.TrainState(
            step=jnp.zeros((), jnp.int32),
            generator=state.create(params, tx, ema=ema_decay > 0),
            fake_score=state.create(params, fake_tx, ema=False),
            frozen=jax.tree.map(jnp.array, frozen),
        )

    def generator_loss(params, fake_score, frozen, batch):
        """Computes equation 10; also returns the images that the matching loss sees."""
        pairs, noised = batch["pairs"], batch["noised"]
        images = generate(params, batch["z"], batch["cond"])  # [B + P, H, W, C]
        x_pairs = images[-len(pairs["image"]) :]
        x = images[: len(noised["t"])]
        cond = batch["cond"][: len(x)]

        x_const = jax.lax.stop_gradient(x)
        x_t = process_lib.add_noise(process, x_const, noised["eps"], noised["t"])
        x_real = real_score(frozen["real_score"], x_t, noised["t"], cond)
        x_fake = denoiser(fake_score, x_t, noised["t"], cond)
        matching = losses.distribution_matching_loss(x, x_real, x_fake)
        regression = losses.regression_loss(
            x_pairs, pairs["image"], frozen["distance"], distance=distance
        )
        metrics = {
            "matching": matching,
            "regression": regression,
            "real_fake": jnp.mean(jnp.abs(x_real - x_fake)),
        }
        return matching_weight * matching + regression_weight * regression, (x_const, metrics)

    def fake_score_loss(params, x, batch):
        """Computes equation 6."""
        eps, t = batch["noised"]["fake_eps"], batch["noised"]["fake_t"]
        cond = batch["cond"][: len(x)]
        return losses.denoising_loss(*denoiser.output_and_target(params, x, eps, t, cond))

    def gradients(trained, frozen, batch):
        generator, fake_score = trained
        fresh, pairs = batch["fresh"], batch["pairs"]
        noised = [batch["noised"][stream] for stream in matched]
        batch = {
            "z": jnp.concatenate([fresh["z"], pairs["noise"]]),
            "cond": jnp.concatenate([fresh["cond"], pairs["cond"]]),
            "noised": jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *noised),
            "pairs": pairs,
        }
        grad_generator = jax.grad(generator_loss, has_aux=True)
        generator_grads, (x, metrics) = grad_generator(generator, fake_score, frozen, batch)
        loss, fake_grads = jax.value_and_grad(fake_score_loss)(fake_score, x, batch)
        return (generator_grads, fake_grads), metrics | {"fake_score": loss}

    def draw_noised(key, shape):
        """Draws times and noise for one stream, for both losses."""
        keys = rng.keys(key, ("t", "eps", "fake_t", "fake_eps"))
        count = shape[:1]
        return {
            "t": process_lib.sample_levels(process, keys["t"], count, *matching_levels),
            "eps": jax.random.normal(keys["eps"], shape),
            "fake_t": process_lib.sample_levels(process, keys["fake_t"], count, *fake_score_levels),
            "fake_eps": jax.random.normal(keys["fake_eps"], shape),
        }

    def draw(key, batch):
        cond, pairs = batch["fresh"]["cond"], batch["pairs"]
        shape = pairs["noise"].shape
        shapes = {"fresh": (len(cond), *shape[1:]), "pairs": shape}
        keys = rng.keys(key, ("z", *matched))
        return {
            "fresh": {"z": jax.random.normal(keys["z"], shapes["fresh"]), "cond": cond},
            "pairs": pairs,
            "noised": {stream: draw_noised(keys[stream], shapes[stream]) for stream in matched},
        }

    def train_step(train_state, batch):
        generator, fake_score = train_state.generator, train_state.fake_score
        key = jax.random.fold_in(jax.random.key(seed), train_state.step)
        arrays = parallel.split(draw(key, batch))

        trained = denoiser.cast(generator.params), denoiser.cast(fake_score.params)
        grads, metrics = parallel.gradients(gradients)(trained, train_state.frozen, arrays)
        generator, norm = optim.apply_gradients(generator, grads[0], tx, ema_decay=ema_decay)
        fake_score, fake_norm = optim.apply_gradients(fake_score, grads[1], fake_tx)
        metrics |= {
            "grad_norm": norm,
            "fake_grad_norm": fake_norm,
            "skipped": generator.skipped + fake_score.skipped,
        }
        train_state = train_state.replace(
            step=train_state.step + 1, generator=generator, fake_score=fake_score
        )
        return train_state, metrics

    return recipes.Recipe(init, train_step, distance_params)
