"""Samplers: ways from unit Gaussian noise to images with any denoiser `(params, x_t, t, cond) -> x_hat`.

All but `one_step` follow the probability flow ODE dx = x_hat dalpha + eps_hat dsigma. Its Euler step x_s = alpha_s x_hat + sigma_s eps_hat,
with eps_hat = (x_t - alpha_t x_hat) / sigma_t, is Euler on EDM's ODE, Euler on the flow ODE, and DDIM with eta = 0. `euler` and `heun` take
the grid of any process and begin with sigma z; `ddim`, `pndm` and `dpm_solver_pp` are Stable Diffusion's: they go from timestep to timestep
of `VP` and begin with z. The denoiser computes in float32; the state is float64 where JAX has it enabled, as in EDM, and float32 elsewhere.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import process as process_lib

# Weights of the last five predictions in the calls of PLMS, the newest first; the second call's is for the redone first step alone.
PLMS = np.array(
    [
        [1, 0, 0, 0, 0],
        [1 / 2, -1 / 2, 0, 0, 0],
        [3 / 2, 0, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 0, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, 0, -9 / 24],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0],
    ]
)


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
        return denoise(params, process.prior(z), jnp.full(z.shape[:1], process.t_max, jnp.float32), cond)

    return Sampler(sample, 1)


def euler(denoise: Callable, process: process_lib.Process, *, num_steps: int) -> Sampler:
    """Euler's method; for `VP` diffusers' EulerDiscreteScheduler, whose times lie between timesteps."""
    grid = process.grid(num_steps)
    return _euler(denoise, process, grid, _noisiest(process, grid))


def ddim(denoise: Callable, process: process_lib.VP, *, num_steps: int, spacing: str = "leading") -> Sampler:
    """DDIM with eta = 0 (Song et al., arXiv 2010.02502, equation 12) over timesteps.

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: VP.
      num_steps: 1 to 999.
      spacing: of `VP.timesteps`. Each step ends where the next begins; those of diffusers end a timestep off at times, with "trailing"
        and a num_steps that does not divide 1000.
    """
    return _euler(denoise, process, _timesteps("ddim", process, num_steps, spacing), process.prior)


def pndm(denoise: Callable, process: process_lib.VP, *, num_steps: int) -> Sampler:
    """PLMS as Stable Diffusion has it, with num_steps + 1 network calls: the first step is redone with the mean of the predictions at its
    ends; the others take Adams-Bashforth's mean of up to four eps_hat.

    Raises:
      ValueError: `num_steps` is 1, and there is nothing to redo the step with.

    Source: Liu et al., arXiv 2202.09778, equations 9 and 12; diffusers' PNDMScheduler with skip_prk_steps, which takes the mean of whatever
    the network predicts: the same for eps, not for v.
    """
    grid = _timesteps("pndm", process, num_steps, "leading")
    if num_steps == 1:
        raise ValueError("num_steps of pndm is 1, expected 2 or more; use ddim.")
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    calls = np.arange(num_steps + 1)
    step = np.maximum(calls - 1, 0)
    # x_s = alpha_s / alpha_t x_t + gain eps_hat; the first step is redone from its end: x_s + gain (new - old) / 2.
    gain = alpha[1:] * np.diff(sigma / alpha)
    a = np.where(calls == 1, 1, (alpha[1:] / alpha[:-1])[step])
    b = gain[step, None] * PLMS[np.minimum(calls, 5)]
    return _multistep(denoise, process, lambda x_hat, eps_hat: eps_hat, (np.insert(grid[:-1], 1, grid[1]), a, b))


def dpm_solver_pp(denoise: Callable, process: process_lib.VP, *, num_steps: int) -> Sampler:
    """DPM-Solver++(2M), midpoint: second order in lambda = ln(alpha / sigma) but for the first step and the last, which ends in no noise.

    Source: Lu et al., arXiv 2211.01095, Algorithm 2; diffusers' DPMSolverMultistepScheduler with its own settings.
    """
    grid = _timesteps("dpm_solver_pp", process, num_steps, "linspace")
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    ratio = sigma / alpha  # exp(-lambda), 0 at the end
    h = -np.diff(np.log(ratio[:-1]))
    slope = np.zeros(num_steps)  # 1 / (2 r), the weight of the difference of the last two x_hat
    slope[1:-1] = h[1:] / h[:-1] / 2
    gain = alpha[1:] * (1 - ratio[1:] / ratio[:-1])
    b = gain[:, None] * np.stack([1 + slope, -slope], axis=1)
    return _multistep(denoise, process, lambda x_hat, eps_hat: x_hat, (grid[:-1], sigma[1:] / sigma[:-1], b))


def heun(denoise: Callable, process: process_lib.Process, *, num_steps: int) -> Sampler:
    """Heun's method: each Euler step is redone with the mean of the predictions at its two ends, except one that ends in no noise,
    where there is no second prediction (EDM, arXiv 2206.00364, Algorithm 1)."""
    grid = process.grid(num_steps)

    def sample(params, z, cond, noise=None):
        predict = functools.partial(_predict, denoise, process, params, cond=cond)

        def step(x, times):
            return _heun_step(predict, process, x, *times), None

        return _integrate(step, _noisiest(process, grid), z, (grid[:-1], grid[1:]))

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

        return _integrate(step, _noisiest(process, grid), z, (raised, grid[1:], added, np.arange(num_steps)))

    return Sampler(sample, _heun_calls(process, grid))


def _euler(denoise, process, grid, start):
    def sample(params, z, cond, noise=None):
        def step(x, times):
            t, s = times
            return _advance(process, x, _predict(denoise, process, params, x, t, cond), t, s), None

        return _integrate(step, start, z, (grid[:-1], grid[1:]))

    return Sampler(sample, len(grid) - 1)


def _multistep(denoise, process, choose, calls):
    """x becomes a x + sum_k b_k h_k with the last chosen predictions h, the newest first; `calls` are t [N], a [N] and b [N, K]."""

    def sample(params, z, cond, noise=None):
        def step(carry, call):
            (x, h), (t, a, b) = carry, call
            new = choose(*_predict(denoise, process, params, x, t, cond))
            h = jnp.concatenate([new[None].astype(h.dtype), h[:-1]])
            return (a * x + (process_lib.expand(b, h) * h).sum(0), h), None

        def start(z):
            x = process.prior(z)
            return x, jnp.broadcast_to(x, (calls[2].shape[1], *x.shape))  # anything finite: what is not there yet has the weight 0

        return _integrate(step, start, z, calls)[0]

    return Sampler(sample, len(calls[0]))


def _timesteps(name, process, num_steps, spacing):
    if not isinstance(process, process_lib.VP):
        raise ValueError(f"{name} needs the process VP, got {type(process).__name__}; use euler or heun.")
    return process.timesteps(num_steps, spacing)


def _noisiest(process, grid):
    return lambda z: process.sigma(jnp.asarray(grid[0])) * z


def _integrate(step, start, z, times):
    state, _ = jax.lax.scan(step, start(z.astype(float)), jax.tree.map(jnp.asarray, times))
    return jax.tree.map(lambda x: x.astype(jnp.float32), state)


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
