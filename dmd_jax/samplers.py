"""Deterministic samplers: the probability flow ODE dx = x_hat dalpha + eps_hat dsigma on any time grid.

Its Euler step x_s = alpha_s x_hat + sigma_s eps_hat, with eps_hat = (x_t - alpha_t x_hat) / sigma_t, is Euler on EDM's ODE, Euler on the
flow ODE, and DDIM with eta = 0. A denoiser here is `(x_t, t) -> x_hat` with params and condition already bound.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import process as process_lib


def euler(denoise: Callable, process: process_lib.Process, grid: np.ndarray, x: jax.Array) -> jax.Array:
    """Integrates `x` [B, ...] at time grid[0] to time grid[-1]; len(grid) - 1 network calls."""

    def step(x, times):
        t, s = times
        return _advance(process, x, _predict(denoise, process, x, t), t, s), None

    return jax.lax.scan(step, x, _intervals(grid))[0]


def heun(denoise: Callable, process: process_lib.Process, grid: np.ndarray, x: jax.Array) -> jax.Array:
    """As `euler`, to second order: each step is redone with the mean of the predictions at its two ends, except one that
    ends in no noise, where there is no second prediction (EDM, arXiv 2206.00364, Algorithm 1). See `heun_calls` for the cost."""

    def step(x, times):
        t, s = times
        first = _predict(denoise, process, x, t)
        ahead = _advance(process, x, first, t, s)

        def correct():
            second = _predict(denoise, process, ahead, s)
            return _advance(process, x, jax.tree.map(lambda a, b: (a + b) / 2, first, second), t, s)

        return jax.lax.cond(process.sigma(s) > 0, correct, lambda: ahead), None

    return jax.lax.scan(step, x, _intervals(grid))[0]


def heun_calls(process: process_lib.Process, grid: np.ndarray) -> int:
    """How often `heun` calls the network for an image."""
    return 2 * (len(grid) - 1) - int(process.sigma(jnp.asarray(grid[-1])) == 0)


def _intervals(grid):
    return jnp.asarray(grid[:-1]), jnp.asarray(grid[1:])


def _predict(denoise, process, x_t, t):
    x_hat = denoise(x_t, jnp.full(x_t.shape[:1], t))
    return x_hat, (x_t - process.alpha(t) * x_hat) / process.sigma(t)


def _advance(process, x_t, prediction, t, s):
    x_hat, eps_hat = prediction
    return x_t + (process.alpha(s) - process.alpha(t)) * x_hat + (process.sigma(s) - process.sigma(t)) * eps_hat
