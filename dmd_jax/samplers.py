"""Samplers: ways from unit Gaussian noise to images with any denoiser `(params, x_t, t, cond) -> x_hat`.

All but `one_step` follow the probability flow ODE dx = x_hat dalpha + eps_hat dsigma along the process's time grid. Its Euler step
x_s = alpha_s x_hat + sigma_s eps_hat, with eps_hat = (x_t - alpha_t x_hat) / sigma_t, is Euler on EDM's ODE, Euler on the flow ODE, and
DDIM with eta = 0. The denoiser computes in float32; the state is float64 where JAX has it enabled, as in EDM, and float32 elsewhere.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import process as process_lib


class Sampler(NamedTuple):
    """One way to make images.

    Attributes:
      sample: `(params, z, cond, noise) -> images`, all of z's shape [B, H, W, C]; `noise(i)` are unit Gaussian arrays of that shape too,
        for the samplers that add noise on the way.
      nfe: network calls for an image.
    """

    sample: Callable
    nfe: int


def one_step(denoise: Callable, process: process_lib.Process) -> Sampler:
    """The one-step generator: the denoiser at the highest noise level."""

    def sample(params, z, cond, noise=None):
        return denoise(params, process.prior(z), jnp.full(z.shape[:1], process.t_max), cond)

    return Sampler(sample, 1)


def euler(denoise: Callable, process: process_lib.Process, *, num_steps: int) -> Sampler:
    """Euler's method; DDIM for `VP`."""
    grid = process.grid(num_steps)

    def sample(params, z, cond, noise=None):
        def step(x, times):
            t, s = times
            return _advance(process, x, _predict(denoise, process, params, x, t, cond), t, s), None

        return _integrate(step, process, z, (grid[:-1], grid[1:]))

    return Sampler(sample, num_steps)


def heun(denoise: Callable, process: process_lib.Process, *, num_steps: int) -> Sampler:
    """Heun's method: each Euler step is redone with the mean of the predictions at its two ends, except one that ends in no noise,
    where there is no second prediction (EDM, arXiv 2206.00364, Algorithm 1)."""
    grid = process.grid(num_steps)

    def sample(params, z, cond, noise=None):
        predict = functools.partial(_predict, denoise, process, params, cond=cond)

        def step(x, times):
            return _heun_step(predict, process, x, *times), None

        return _integrate(step, process, z, (grid[:-1], grid[1:]))

    return Sampler(sample, _heun_calls(process, grid))


def stochastic_heun(
    denoise: Callable,
    process: process_lib.EDM,
    *,
    num_steps: int,
    churn: float,
    s_min: float,
    s_max: float,
    s_noise: float,
) -> Sampler:
    """As `heun`, but noise is added before each step (EDM, Algorithm 2).

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: EDM's; time is the standard deviation of the noise.
      num_steps: of Heun.
      churn: S_churn, over all steps.
      s_min: S_min, the lowest noise at which any is added.
      s_max: S_max, the highest.
      s_noise: S_noise, standard deviation of the noise added.
    """
    grid = process.grid(num_steps)
    gamma = np.where((s_min <= grid[:-1]) & (grid[:-1] <= s_max), min(churn / num_steps, 2**0.5 - 1), 0)
    raised = grid[:-1] * (1 + gamma)
    added = s_noise * np.sqrt(raised**2 - grid[:-1] ** 2)

    def sample(params, z, cond, noise):
        predict = functools.partial(_predict, denoise, process, params, cond=cond)

        def step(x, times):
            t, s, scale, i = times
            return _heun_step(predict, process, x + scale * noise(i), t, s), None

        return _integrate(step, process, z, (raised, grid[1:], added, np.arange(num_steps)))

    return Sampler(sample, _heun_calls(process, grid))


def _integrate(step, process, z, times):
    times = jax.tree.map(jnp.asarray, times)
    return jax.lax.scan(step, process.prior(z.astype(times[0].dtype)), times)[0].astype(jnp.float32)


def _heun_step(predict, process, x, t, s):
    first = predict(x, t)
    ahead = _advance(process, x, first, t, s)

    def correct():
        second = predict(ahead, s)
        return _advance(process, x, jax.tree.map(lambda a, b: (a + b) / 2, first, second), t, s)

    return jax.lax.cond(process.sigma(s) > 0, correct, lambda: ahead)


def _heun_calls(process, grid):
    return 2 * (len(grid) - 1) - int(process.sigma(jnp.asarray(grid[-1])) == 0)


def _predict(denoise, process, params, x_t, t, cond):
    x_hat = denoise(params, x_t.astype(jnp.float32), jnp.full(x_t.shape[:1], t, jnp.float32), cond)
    return x_hat, (x_t - process.alpha(t) * x_hat) / process.sigma(t)


def _advance(process, x_t, prediction, t, s):
    x_hat, eps_hat = prediction
    return x_t + (process.alpha(s) - process.alpha(t)) * x_hat + (process.sigma(s) - process.sigma(t)) * eps_hat
