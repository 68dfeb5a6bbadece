"""The losses of Distribution Matching Distillation (Yin et al., arXiv 2311.18828), on arrays of shape [B, H, W, C]."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

CHOICES = ("squared_error",)  # the distances that a config may name


@jax.jit
def distribution_matching_loss(x: jax.Array, x_real: jax.Array, x_fake: jax.Array) -> jax.Array:
    """A scalar whose gradient moves the generated images towards the teacher's distribution (equations 7 and 8, Algorithm 2).

    The gradient with respect to each image is g / N, with N = B H W C and

        g = (x_fake - x_real) / mean |x - x_real|

    the mean being over each image's own pixels. Where it is not finite (x equal to x_real) it is zero. The value is mean(g^2) / 2; it
    says nothing about progress.

    Args:
      x: generated images.
      x_real: the teacher's (guided) prediction of x from its noised self.
      x_fake: the fake score's prediction from the same. Neither prediction receives a gradient.
    """
    x_const, x_real, x_fake = jax.lax.stop_gradient((x, x_real, x_fake))
    scale = jnp.mean(jnp.abs(x_const - x_real), axis=tuple(range(1, x.ndim)), keepdims=True)
    g = (x_fake - x_real) / scale
    g = jnp.where(jnp.isfinite(g), g, 0)
    return 0.5 * jnp.mean(g**2) + jnp.mean(g * (x - x_const))


def squared_error(params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared difference of each image, [B]; a distance without parameters."""
    return jnp.mean((x - y) ** 2, axis=tuple(range(1, x.ndim)))


@functools.partial(jax.jit, static_argnames="distance")
def regression_loss(
    x: jax.Array, y: jax.Array, params=None, *, distance: Callable = squared_error
) -> jax.Array:
    """The mean distance between generated images `x` and the images `y` that the teacher's ODE made of the same noise (equation 9).

    Args:
      x: generated images.
      y: the teacher's images; no gradient reaches them.
      params: of the distance.
      distance: `(params, x, y) -> [B]`; the paper uses LPIPS, see dmd_jax/models/vgg.py.
    """
    return jnp.mean(distance(params, x, jax.lax.stop_gradient(y)))


def denoising_loss(output: jax.Array, target: jax.Array) -> jax.Array:
    """The mean squared error in the network's output space, from `Denoiser.output_and_target`; equation 6 for the fake score."""
    return jnp.mean((output - target) ** 2)
