"""Trains a diffusion model from scratch with EDM's denoising loss (Karras et al., arXiv 2206.00364,
equation 8):

    min E lambda(sigma) || x_hat(x + sigma eps, sigma, cond) - x ||^2,    sigma from the process

That is the plain mean squared error of the network's output, see `Denoiser.output_and_target`; it
serves every process and prediction.
"""

import jax

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import losses, recipes, rng, sharding

STREAMS = {"images": ("image", "cond")}
PLOTTED = ("loss",)
METHOD = None


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
    """Makes the recipe for batches {"images": {"image": [B, H, W, C], "cond": [B, ...]}}.

    Args:
      denoiser: the model to be trained.
      parallel: the devices.
      seed: of noise and times.
      null_cond: the condition that stands for none.
      optimizer: arguments of `optim.adamw`.
      ema_decay: of the running mean of the parameters, per step; 0 keeps none.
      cond_dropout: fraction of samples that see `null_cond`, so that the model can be guided.
      ema_warmup: see `optim.warmed_up`; 0 for none.
    """

    def draw(key, batch):
        image, cond = batch["images"]["image"], batch["images"]["cond"]
        keys = rng.keys(key, ("t", "eps", "drop"))
        return {
            "image": image,
            "cond": recipes.drop(keys["drop"], cond, null_cond, cond_dropout),
            "t": denoiser.process.sample_t(keys["t"], image.shape[:1]),
            "eps": jax.random.normal(keys["eps"], image.shape),
        }

    def loss(params, _, arrays):
        output, target = denoiser.output_and_target(
            params, arrays["image"], arrays["eps"], arrays["t"], arrays["cond"]
        )
        return losses.denoising_loss(output, target)

    return recipes.single(
        denoiser,
        parallel,
        draw=draw,
        loss=loss,
        seed=seed,
        optimizer=optimizer,
        ema_decay=ema_decay,
        ema_warmup=ema_warmup,
    )
