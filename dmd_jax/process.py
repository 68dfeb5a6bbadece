"""Noise processes: x_t = alpha(t) x + sigma(t) eps, with larger t noisier in all of them.

`t` is opaque everywhere else: only the process knows whether it is a standard deviation (`EDM`), a
place in a table (`VP`) or a fraction (`RectifiedFlow`). Every process has `NUM_LEVELS` noise
levels; `level(0)` is the least noisy.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

NUM_LEVELS = 1000
CHOICES = ("EDM", "VP", "RectifiedFlow")  # what a config may name


class Process(Protocol):
    """The interface of a noise process. Times have shape [B], and so have the results."""

    @property
    def t_max(self) -> float:
        """The time at which a one-step generator is called."""

    def alpha(self, t: jax.Array) -> jax.Array: ...

    def sigma(self, t: jax.Array) -> jax.Array: ...

    def level(self, index: jax.Array) -> jax.Array:
        """Returns the time of noise level `index`, 0 to NUM_LEVELS - 1."""

    def sample_t(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Draws times for the training of a teacher."""

    def grid(self, num_steps: int) -> np.ndarray:
        """Returns times of a sampler, float64 [num_steps + 1], descending.

        At the last one no noise is left: sigma is 0.
        """

    def prior(self, z: jax.Array) -> jax.Array:
        """Returns the input of a one-step generator for unit Gaussian noise `z`."""

    def at_ratio(self, ratio: jax.Array) -> jax.Array:
        """Returns the time at which sigma / alpha is `ratio`, 0 to infinity.

        If the ratio is above that of every time, it is the noisiest time.
        """


@dataclasses.dataclass(frozen=True)
class EDM:
    """x_t = x + t eps: t is the standard deviation of the noise.

    Source: Karras et al., arXiv 2206.00364, Table 1.
    """

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

    def at_ratio(self, ratio):
        return jnp.minimum(ratio, self.sigma_max)

    def _ramp(self, n):
        """Returns n values from sigma_max down to sigma_min (equation 5)."""
        top = self.sigma_max ** (1 / self.rho)
        bottom = self.sigma_min ** (1 / self.rho)
        return (top + np.linspace(0, 1, n) * (bottom - top)) ** self.rho


@dataclasses.dataclass(frozen=True)
class VP:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps: t is a timestep of Stable Diffusion, 0 to 999.

    Its betas are "scaled linear". Between timesteps sigma / alpha is interpolated linearly, as in
    diffusers' EulerDiscreteScheduler; -1 is the time without noise. `alpha` and `sigma` of a numpy
    array are computed in numpy.
    """

    beta_min: float = 0.00085
    beta_max: float = 0.012

    @property
    def t_max(self) -> float:
        return float(NUM_LEVELS - 1)

    def alpha(self, t):
        return 1 / (1 + self._ratio(t) ** 2) ** 0.5

    def sigma(self, t):
        return self._ratio(t) * self.alpha(t)

    def level(self, index):
        return index.astype(jnp.float32)

    def sample_t(self, key, shape):
        return jax.random.randint(key, shape, 0, NUM_LEVELS).astype(jnp.float32)

    def grid(self, num_steps):
        _check_timesteps(num_steps)
        return np.append(np.linspace(0, NUM_LEVELS - 1, num_steps)[::-1], -1)

    def timesteps(self, num_steps: int, spacing: str) -> np.ndarray:
        """Returns a grid of timesteps, [num_steps + 1], descending.

        "leading" and "trailing" end at timestep 0, and "linspace" at the time without noise.

        Args:
          num_steps: 1 to 999.
          spacing: "leading" is Stable Diffusion's own, whose grid of one step begins at timestep 1;
            "trailing" and "linspace" begin at timestep 999.

        Raises:
          ValueError: there is no such grid.

        Source: diffusers 0.42 with SD 1.5's settings (steps_offset 1, set_alpha_to_one false); Lin
        et al., arXiv 2305.08891, Table 2.
        """
        _check_timesteps(num_steps)
        if spacing == "leading":
            return np.append(np.arange(num_steps)[::-1] * (NUM_LEVELS // num_steps) + 1.0, 0)
        if spacing == "trailing":
            times = np.arange(NUM_LEVELS, 0, -NUM_LEVELS / num_steps)
            times = times[:num_steps]  # rounding can make one too many
            return np.append(np.round(times) - 1, 0)
        if spacing == "linspace":
            return np.append(np.round(np.linspace(0, NUM_LEVELS - 1, num_steps + 1))[:0:-1], -1)
        raise ValueError(f"no spacing {spacing!r}; there are: leading, trailing, linspace.")

    def prior(self, z):
        return z  # not sigma(t_max) z: Stable Diffusion is sampled from unit noise

    def at_ratio(self, ratio):
        table = jnp.asarray(_scaled_linear(self.beta_min, self.beta_max)[:-1], ratio.dtype)
        return jnp.interp(ratio, table, jnp.arange(-1, NUM_LEVELS, dtype=ratio.dtype))

    def _ratio(self, t):
        """Returns sigma / alpha."""
        xp = t.__array_namespace__()  # numpy's or JAX's
        table = xp.asarray(_scaled_linear(self.beta_min, self.beta_max), dtype=t.dtype)
        below = xp.floor(t)
        i = below.astype(xp.int32) + 1
        return table[i] + (t - below) * (table[i + 1] - table[i])


@functools.cache
def _scaled_linear(beta_min, beta_max):
    """Returns sigma / alpha at the times -1 to 999, and once more at 999; float64."""
    abar = np.cumprod(1 - np.linspace(beta_min**0.5, beta_max**0.5, NUM_LEVELS) ** 2)
    ratio = np.sqrt((1 - abar) / abar)
    return np.concatenate([[0], ratio, ratio[-1:]])


def _check_timesteps(num_steps):
    if not 1 <= num_steps < NUM_LEVELS:
        raise ValueError(
            f"num_steps is {num_steps}, expected 1 to {NUM_LEVELS - 1}; "
            f"there are {NUM_LEVELS} timesteps."
        )


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x + t eps: t is a fraction (Liu et al., arXiv 2209.03003 and 2309.06380).

    In the papers time runs the other way, from noise X_0 = eps to data X_1 = x:

        theirs                              here
        t                                   1 - t
        X_t = t X_1 + (1 - t) X_0           x_t
        v = X_1 - X_0                       x - eps = -F, with F of `denoiser.flow`
        label 1000 (1 - t) of the network   1000 t
        Z += v / N at t = 0, 1/N, ...       `samplers.euler` over grid(N), t = 1, 1 - 1/N, ...;
                                            labels 1000, 666.67, 333.33 for N = 3
    """

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def level(self, index):
        return (index + 1) / NUM_LEVELS  # never t = 0, where there is nothing to predict

    def sample_t(self, key, shape):
        return jax.random.uniform(key, shape, minval=1 / NUM_LEVELS)

    def grid(self, num_steps):
        return np.linspace(1, 0, num_steps + 1)

    def prior(self, z):
        return z

    def at_ratio(self, ratio):
        return 1 / (1 + 1 / ratio)  # r / (1 + r), and 1 at infinity


def add_noise(process: Process, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """Returns x_t for clean `x` and noise `eps`, both [B, ...], at times `t` [B]."""
    return expand(process.alpha(t), x) * x + expand(process.sigma(t), x) * eps


def sample_levels(
    process: Process, key: jax.Array, shape: tuple[int, ...], low: int, high: int
) -> jax.Array:
    """Draws times uniformly over the noise levels `low` to `high`, both included."""
    return process.level(jax.random.randint(key, shape, low, high + 1))


def expand(a: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes `a` [B] to [B, 1, ...], so that it can be multiplied with `like` [B, ...]."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))
