"""Distils an ODE into one step, from pairs of its noise z and its image x (InstaFlow, arXiv
2309.06380, equation 6):

    min E D(x, G(z, cond)),    for a flow G(z, cond) = z - v(z, 1, cond): one Euler step

InstaFlow takes L2 as the distance D in a first stage and LPIPS in a second one. The straighter the
flow, the less there is to learn; see `reflow`.
"""

from collections.abc import Callable

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import losses, recipes, sharding

STREAMS = {"pairs": ("noise", "image", "cond")}
PLOTTED = ("loss",)
METHOD = recipes.Method(
    "distillation on pairs of an ODE as in InstaFlow "
    "(rectified flow, https://arxiv.org/abs/2309.06380)",
    "instaflow",
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
    distance: Callable = losses.squared_error,
    distance_params=None,
) -> recipes.Recipe:
    """Makes the recipe for batches {"pairs": {"noise": [B, H, W, C], "image": [B, H, W, C],
    "cond": [B, ...]}}.

    Args:
      denoiser: a denoiser of any process; the generator is its one step from the highest noise
        level.
      parallel: the devices.
      seed: without effect, because nothing is random.
      null_cond: without effect, because no condition is dropped.
      optimizer: arguments of `optim.adamw`.
      ema_decay: of the running mean of the parameters, per step; 0 keeps none.
      ema_warmup: see `optim.warmed_up`; 0 for none.
      distance: see `losses.regression_loss`.
      distance_params: parameters of the distance.
    """
    del null_cond
    generate = denoiser_lib.one_step(denoiser, denoiser.process)

    def draw(_, batch):
        return batch["pairs"]

    def loss(params, distance_params, pairs):
        x = generate(params, pairs["noise"], pairs["cond"])
        return losses.regression_loss(x, pairs["image"], distance_params, distance=distance)

    return recipes.single(
        denoiser,
        parallel,
        draw=draw,
        loss=loss,
        seed=seed,
        optimizer=optimizer,
        ema_decay=ema_decay,
        ema_warmup=ema_warmup,
        others=distance_params,
    )
