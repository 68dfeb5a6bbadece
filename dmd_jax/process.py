"""Noise processes: x_t = alpha(t) x + sigma(t) eps, with larger t noisier in all of them.

`t` is opaque everywhere else: only the process knows whether it is a standard deviation (`EDM`), an index into a table (`VP`) or a
fraction (`RectifiedFlow`). Every process has `NUM_LEVELS` noise levels; `level(0)` is the least noisy.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

NUM_LEVELS = 1000


class Process(Protocol):
    """What the rest of the package asks of a noise process. Times have shape [B]; each function returns the same shape."""

    t_max: float  # the time at which a one-step generator is called

    def alpha(self, t: jax.Array) -> jax.Array: ...

    def sigma(self, t: jax.Array) -> jax.Array: ...

    def level(self, index: jax.Array) -> jax.Array:
        """The time of noise level `index`, 0 to NUM_LEVELS - 1."""

    def sample_t(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Times for the training of a teacher."""

    def grid(self, num_steps: int) -> np.ndarray:
        """Times of a sampler, float64 [num_steps + 1], descending; the last one is the time of the result."""

    def prior(self, z: jax.Array) -> jax.Array:
        """The state from which sampling starts, for unit Gaussian noise `z`."""


@dataclasses.dataclass(frozen=True)
class EDM:
    """x_t = x + t eps: t is the standard deviation of the noise (Karras et al., arXiv 2206.00364, Table 1)."""

    sigma_data: float = 0.5  # standard deviation of the data
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0  # exponent of the time grid, equation 5
    p_mean: float = -1.2  # ln(sigma) ~ N(p_mean, p_std^2) in training
    p_std: float = 1.2

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t):
        return jnp.ones_like(t)

    def sigma(self, t):
        return t

    def level(self, index):
        return jnp.asarray(self._ramp(NUM_LEVELS)[::-1].astype(np.float32))[index]

    def sample_t(self, key, shape):
        return jnp.exp(self.p_mean + self.p_std * jax.random.normal(key, shape))

    def grid(self, num_steps):
        return np.append(self._ramp(num_steps), 0.0)

    def prior(self, z):
        return self.sigma_max * z

    def _ramp(self, n):
        """Equation 5: n values from sigma_max down to sigma_min."""
        top, bottom = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (top + np.linspace(0, 1, n) * (bottom - top)) ** self.rho


@dataclasses.dataclass(frozen=True)
class VP:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps: t indexes the table of Stable Diffusion ("scaled linear" betas)."""

    beta_min: float = 0.00085
    beta_max: float = 0.012

    @property
    def t_max(self) -> float:
        return float(NUM_LEVELS - 1)

    def alpha(self, t):
        return jnp.sqrt(self._abar(t))

    def sigma(self, t):
        return jnp.sqrt(1 - self._abar(t))

    def level(self, index):
        return index.astype(jnp.float32)

    def sample_t(self, key, shape):
        return jax.random.randint(key, shape, 0, NUM_LEVELS).astype(jnp.float32)

    def grid(self, num_steps):
        return np.round(np.linspace(NUM_LEVELS - 1, 0, num_steps + 1))

    def prior(self, z):
        return z  # not sigma(t_max) z: Stable Diffusion is sampled from unit noise

    def _abar(self, t):
        return jnp.asarray(_scaled_linear(self.beta_min, self.beta_max))[t.astype(jnp.int32)]


@functools.cache
def _scaled_linear(beta_min, beta_max):
    betas = np.linspace(beta_min**0.5, beta_max**0.5, NUM_LEVELS) ** 2
    return np.cumprod(1 - betas).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x + t eps, t in [0, 1] (Liu et al., arXiv 2209.03003, whose t runs the other way)."""

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def level(self, index):
        return (index + 1) / NUM_LEVELS  # never t = 0, where nothing is left to predict

    def sample_t(self, key, shape):
        return jax.random.uniform(key, shape, minval=1 / NUM_LEVELS)

    def grid(self, num_steps):
        return np.linspace(1, 0, num_steps + 1)

    def prior(self, z):
        return z


def add_noise(process: Process, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """x_t for clean `x` and noise `eps`, both [B, ...], at times `t` [B]."""
    return expand(process.alpha(t), x) * x + expand(process.sigma(t), x) * eps


def sample_levels(process: Process, key: jax.Array, shape: tuple[int, ...], low: int, high: int) -> jax.Array:
    """Times drawn uniformly over the noise levels `low` to `high`, both included."""
    return process.level(jax.random.randint(key, shape, low, high + 1))


def expand(a: jax.Array, like: jax.Array) -> jax.Array:
    """`a` [B] as [B, 1, ...], to be multiplied with `like` [B, ...]."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))
