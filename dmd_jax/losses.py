"""The losses of Distribution Matching Distillation (Yin et al., arXiv 2311.18828).

Images have the shape [B, H, W, C].
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

CHOICES = ("squared_error",)  # the distances that a config may name


@jax.jit
def distribution_matching_loss(x: jax.Array, x_real: jax.Array, x_fake: jax.Array) -> jax.Array:
    """Returns a scalar whose gradient moves the images towards the teacher's distribution.

    The gradient with respect to each image is g / N, with N = B H W C and

        g = (x_fake - x_real) / mean |x - x_real|

    where the mean is over the image's own pixels. Where g is not finite (x equals x_real) it is set
    to zero. The value is mean(g^2) / 2; it says nothing about progress.

    Args:
      x: generated images.
      x_real: the teacher's (guided) prediction from noised x.
      x_fake: the fake score's prediction from the same. Neither prediction receives a gradient.

    Source: equations 7 and 8, Algorithm 2.
    """
    x_const, x_real, x_fake = jax.lax.stop_gradient((x, x_real, x_fake))
    scale = jnp.mean(jnp.abs(x_const - x_real), axis=tuple(range(1, x.ndim)), keepdims=True)
    g = (x_fake - x_real) / scale
    g = jnp.where(jnp.isfinite(g), g, 0)
    return 0.5 * jnp.mean(g**2) + jnp.mean(g * (x - x_const))


def squared_error(params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean squared difference of each image, [B]: a distance without parameters."""
    return jnp.mean((x - y) ** 2, axis=tuple(range(1, x.ndim)))


@functools.partial(jax.jit, static_argnames="distance")
def regression_loss(
    x: jax.Array, y: jax.Array, params=None, *, distance: Callable = squared_error
) -> jax.Array:
    """Returns the mean distance between generated images and the teacher's (equation 9).

    Args:
      x: generated images.
      y: the images that the teacher's ODE made of the same noise; they receive no gradient.
      params: parameters of the distance.
      distance: `(params, x, y) -> [B]`; the paper uses LPIPS, see dmd_jax/models/lpips.py.
    """
    return jnp.mean(distance(params, x, jax.lax.stop_gradient(y)))


def denoising_loss(output: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the mean squared error of a network's output, see `Denoiser.output_and_target`.

    For the fake score it is equation 6.
    """
    return jnp.mean((output - target) ** 2)
