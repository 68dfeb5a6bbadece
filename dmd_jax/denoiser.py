"""A denoiser x_hat(x_t, t, cond) out of any network, by four numbers:

    x_hat = skip(t) x_t + out(t) F(in(t) x_t, noise(t), cond)

where F is the network. `edm`, `eps`, `v` and `flow` below say what F predicts (EDM: arXiv 2206.00364, Table 1).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax import process as process_lib


class Coefficients(NamedTuple):
    """Each of shape [B]."""

    skip: jax.Array
    out: jax.Array
    in_: jax.Array
    noise: jax.Array  # what the network is told of t


def edm(process: process_lib.EDM, t: jax.Array) -> Coefficients:
    sigma, sigma_data = process.sigma(t), process.sigma_data
    norm = jnp.sqrt(sigma**2 + sigma_data**2)
    return Coefficients((sigma_data / norm) ** 2, sigma * sigma_data / norm, 1 / norm, jnp.log(sigma) / 4)


def eps(process: process_lib.Process, t: jax.Array) -> Coefficients:
    alpha = process.alpha(t)
    return Coefficients(1 / alpha, -process.sigma(t) / alpha, jnp.ones_like(t), t)


def v(process: process_lib.Process, t: jax.Array) -> Coefficients:
    """v = alpha eps - sigma x."""
    return Coefficients(process.alpha(t), -process.sigma(t), jnp.ones_like(t), t)


def flow(process: process_lib.Process, t: jax.Array) -> Coefficients:
    """F = eps - x."""
    return Coefficients(jnp.ones_like(t), -process.sigma(t), jnp.ones_like(t), process_lib.NUM_LEVELS * t)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network with the process and the prediction it was made for.

    Attributes:
      network: `(params, x, noise, cond) -> F`, x and F of shape [B, H, W, C], noise [B].
      process: the noise process.
      prediction: one of the functions above.
    """

    network: Callable
    process: process_lib.Process
    prediction: Callable = edm

    def __call__(self, params, x_t: jax.Array, t: jax.Array, cond=None) -> jax.Array:
        """The expected clean image given `x_t` [B, H, W, C] at times `t` [B], in float32."""
        skip, out, in_, noise = self._coefficients(x_t, t)
        return skip * x_t + out * self._network(params, in_ * x_t, noise, cond)

    def output_and_target(self, params, x: jax.Array, eps: jax.Array, t: jax.Array, cond=None):
        """The network's raw output at x_t, and what it should have been: (F, (x - skip x_t) / out), both [B, H, W, C].

        The plain mean of (F - target)^2 is EDM's loss with its weight lambda(sigma), DDPM's eps-loss, the v-loss and the flow-loss.
        """
        x_t = process_lib.add_noise(self.process, x, eps, t)
        skip, out, in_, noise = self._coefficients(x_t, t)
        return self._network(params, in_ * x_t, noise, cond), (x - skip * x_t) / out

    def _coefficients(self, x, t):
        skip, out, in_, noise = self.prediction(self.process, t)
        return *(process_lib.expand(c, x) for c in (skip, out, in_)), noise

    def _network(self, params, x, noise, cond):
        return self.network(params, x, noise, cond).astype(jnp.float32)


def guided(denoiser: Denoiser, scale: float, null_cond) -> Callable:
    """Classifier-free guidance: a denoiser that returns null + scale (cond - null), from one call at twice the batch.

    Args:
      denoiser: `(params, x_t, t, cond) -> x_hat`.
      scale: 1 or less is the conditional prediction alone, as in DMD; there is no interpolation.
      null_cond: the condition that stands for none, without a batch axis.

    Source: Ho and Salimans, arXiv 2207.12598; in x-space, which equals eps-space at the same x_t.
    """
    if scale <= 1:
        return denoiser

    def guided_denoiser(params, x_t, t, cond):
        null = jax.tree.map(lambda n, c: jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape), null_cond, cond)
        twice = jax.tree.map(lambda *a: jnp.concatenate(a), (x_t, t, null), (x_t, t, cond))
        x_null, x_cond = jnp.split(denoiser(params, *twice), 2)
        return x_null + scale * (x_cond - x_null)

    return guided_denoiser
