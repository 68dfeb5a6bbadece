"""Reflow: a flow learns to go straight from the noise of each pair to its image (Liu et al., arXiv
2209.03003, equation 1; InstaFlow, arXiv 2309.06380, equation 5). Its paths become straighter:

    min E || (eps - x) - v(x_t, t, cond) ||^2,    x_t = (1 - t) x + t eps,    t uniform

The pairs (eps, x) come from the ODE of the teacher or of another flow. Reflow can be repeated with
pairs of the flow that it has trained.
"""

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import losses, recipes, rng, sharding
from dmd_jax import process as process_lib

STREAMS = {"pairs": ("noise", "image", "cond")}
PLOTTED = ("loss",)
METHOD = recipes.Method(
    "reflow as in InstaFlow (rectified flow, https://arxiv.org/abs/2309.06380)", "rectified-flow"
)


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
    """Makes the recipe for batches {"pairs": {"noise": [B, H, W, C], "image": [B, H, W, C],
    "cond": [B, ...]}}.

    Args:
      denoiser: a denoiser of the process `RectifiedFlow`.
      parallel: the devices.
      seed: of the times.
      null_cond: the condition that stands for none.
      optimizer: arguments of `optim.adamw`.
      ema_decay: of the running mean of the parameters, per step; 0 keeps none.
      ema_warmup: see `optim.warmed_up`; 0 for none.
      cond_dropout: fraction of samples that see `null_cond`.

    Raises:
      ValueError: the denoiser has another process.
    """
    process = denoiser.process
    if not isinstance(process, process_lib.RectifiedFlow):
        raise ValueError(
            f"reflow needs the process RectifiedFlow, got {type(process).__name__}; "
            "give it to the stage."
        )

    def draw(key, batch):
        pairs = batch["pairs"]
        keys = rng.keys(key, ("t", "drop"))
        t = process.sample_t(keys["t"], pairs["image"].shape[:1])
        cond = recipes.drop(keys["drop"], pairs["cond"], null_cond, cond_dropout)
        return pairs | {"cond": cond, "t": t}

    def loss(params, _, arrays):
        x, eps, t = arrays["image"], arrays["noise"], arrays["t"]
        x_t = process_lib.add_noise(process, x, eps, t)
        x_hat = denoiser(params, x_t, t, arrays["cond"])
        return losses.denoising_loss(denoiser_lib.velocity(x_t, x_hat, t), eps - x)

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
