"""A denoiser x_hat(x_t, t, cond) made of any network F by four numbers:

    x_hat = skip(t) x_t + out(t) F(in(t) x_t, noise(t), cond)

`edm`, `eps`, `v`, `flow` and `flow_to_data` are the predictions: each gives the four numbers for a
network F that predicts this quantity (EDM: arXiv 2206.00364, Table 1).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax import process as process_lib

CHOICES = ("edm", "eps", "v", "flow", "flow_to_data")  # what a config may name


class Coefficients(NamedTuple):
    """The four numbers, each of shape [B]."""

    skip: jax.Array
    out: jax.Array
    in_: jax.Array
    noise: jax.Array  # the network's input that stands for t


def edm(process: process_lib.EDM, t: jax.Array) -> Coefficients:
    """F is EDM's mixture of x and eps, of unit variance at every noise level."""
    sigma = process.sigma(t)
    sigma_data = process.sigma_data
    norm = jnp.sqrt(sigma**2 + sigma_data**2)
    return Coefficients(
        (sigma_data / norm) ** 2, sigma * sigma_data / norm, 1 / norm, jnp.log(sigma) / 4
    )


def eps(process: process_lib.Process, t: jax.Array) -> Coefficients:
    """F = eps."""
    alpha = process.alpha(t)
    return Coefficients(1 / alpha, -process.sigma(t) / alpha, jnp.ones_like(t), t)


def v(process: process_lib.Process, t: jax.Array) -> Coefficients:
    """F = alpha eps - sigma x."""
    return Coefficients(process.alpha(t), -process.sigma(t), jnp.ones_like(t), t)


def flow(process: process_lib.Process, t: jax.Array) -> Coefficients:
    """F = eps - x."""
    return Coefficients(
        jnp.ones_like(t), -process.sigma(t), jnp.ones_like(t), process_lib.NUM_LEVELS * t
    )


def flow_to_data(process: process_lib.Process, t: jax.Array) -> Coefficients:
    """F = x - eps: the sign of the papers and of InstaFlow's public checkpoints."""
    return flow(process, t)._replace(out=process.sigma(t))


# The processes that each prediction is defined for.
PROCESSES = {
    edm: (process_lib.EDM,),
    eps: (process_lib.EDM, process_lib.VP),  # a flow has alpha 0 at t_max, by which it divides
    v: (process_lib.VP,),
    flow: (process_lib.RectifiedFlow,),
    flow_to_data: (process_lib.RectifiedFlow,),
}


def rectified(process: process_lib.Process, prediction: Callable) -> Callable:
    """Returns the prediction with which a network of `process` and `prediction` serves as a flow.

    The change of variables is exact. At the time s at which `process` has the flow's ratio of noise
    to data, t / (1 - t), its x_s is the flow's x_t times sigma(s) / t. Near t = 1 the ratio may be
    above all of `process`; s is its noisiest time then.

    Args:
      process: of the network.
      prediction: of the network, one of the functions above.
    """

    def coefficients(flow_process, t):
        s = process.at_ratio(flow_process.sigma(t) / flow_process.alpha(t))
        scale = process.sigma(s) / flow_process.sigma(t)
        skip, out, in_, noise = prediction(process, s)
        return Coefficients(skip * scale, out, in_ * scale, noise)

    return coefficients


def velocity(x_t: jax.Array, x_hat: jax.Array, t: jax.Array) -> jax.Array:
    """Returns a rectified flow's dx_t/dt = eps_hat - x_hat, [B, ...], at times `t` [B]."""
    return (x_t - x_hat) / process_lib.expand(t, x_t)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network with its process and its prediction.

    Attributes:
      network: `(params, x, noise, cond) -> F`, x and F of shape [B, H, W, C], noise [B].
      process: the noise process.
      prediction: one of the functions above.
      cast: `params -> params`, converts them to the precision in which the network computes; by
        default it changes nothing.
    """

    network: Callable
    process: process_lib.Process
    prediction: Callable = edm
    cast: Callable = lambda params: params

    def __post_init__(self):
        """Raises ValueError if one of our predictions is undefined for one of our processes."""
        kind = type(self.process)
        fitting = [prediction for prediction, kinds in PROCESSES.items() if kind in kinds]
        if fitting and self.prediction in PROCESSES and self.prediction not in fitting:
            names = " or ".join(prediction.__name__ for prediction in fitting)
            raise ValueError(
                f"the prediction {self.prediction.__name__} does not fit the process "
                f"{kind.__name__}; expected {names}, or a function of your own."
            )

    def __call__(self, params, x_t: jax.Array, t: jax.Array, cond=None) -> jax.Array:
        """Predicts the clean image of `x_t` [B, H, W, C] at times `t` [B], in float32."""
        skip, out, in_, noise = self._coefficients(x_t, t)
        return skip * x_t + out * self._network(params, in_ * x_t, noise, cond)

    def output_and_target(self, params, x: jax.Array, eps: jax.Array, t: jax.Array, cond=None):
        """Returns the network's output F at x_t and its target (x - skip x_t) / out, [B, H, W, C].

        The plain mean of (F - target)^2 is EDM's loss with its weight lambda(sigma), DDPM's
        eps-loss, the v-loss and the flow-loss.
        """
        x_t = process_lib.add_noise(self.process, x, eps, t)
        skip, out, in_, noise = self._coefficients(x_t, t)
        target = (x - skip * x_t) / out
        return self._network(params, in_ * x_t, noise, cond), target

    def _coefficients(self, x, t):
        skip, out, in_, noise = self.prediction(self.process, t)
        return *(process_lib.expand(c, x) for c in (skip, out, in_)), noise

    def _network(self, params, x, noise, cond):
        output = self.network(params, x, noise, cond)
        if output.shape != x.shape:
            raise ValueError(
                f"the network made {output.shape} of {x.shape}; expected the shape of its input."
            )
        return output.astype(jnp.float32)


def one_step(denoise: Callable, process: process_lib.Process) -> Callable:
    """Returns the one-step generator G(z, cond): the denoiser at the highest noise level.

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: of the denoiser.

    Returns:
      `(params, z, cond) -> x`, with unit Gaussian noise `z` and x [B, H, W, C].
    """

    def generate(params, z, cond):
        t = jnp.full(z.shape[:1], process.t_max, jnp.float32)
        return denoise(params, process.prior(z), t, cond)

    return generate


def guided(denoise: Callable, scale: float, null_cond) -> Callable:
    """Returns the denoiser null + scale (cond - null) of classifier-free guidance.

    It makes one call at twice the batch.

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      scale: 1 or less gives the conditional prediction alone, as in DMD; there is no interpolation.
      null_cond: the condition that stands for none, without a batch axis. Parts of it that are None
        are equal to those of `cond`.

    Raises:
      ValueError: every part of `null_cond` is None, so there would be no guidance.

    Source: Ho and Salimans, arXiv 2207.12598; in x-space, which equals eps-space at the same x_t.
    """
    if scale <= 1:
        return denoise
    if not jax.tree.leaves(null_cond):
        raise ValueError(
            f"guidance of scale {scale} needs a null_cond, got {null_cond}; "
            "name the condition that stands for none."
        )

    def null_of(null, cond):
        return cond if null is None else jnp.broadcast_to(jnp.asarray(null, cond.dtype), cond.shape)

    def guided_denoiser(params, x_t, t, cond):
        null = jax.tree.map(null_of, null_cond, cond, is_leaf=lambda part: part is None)
        twice = jax.tree.map(lambda *a: jnp.concatenate(a), (x_t, t, null), (x_t, t, cond))
        x_null, x_cond = jnp.split(denoise(params, *twice), 2)
        return x_null + scale * (x_cond - x_null)

    return guided_denoiser
