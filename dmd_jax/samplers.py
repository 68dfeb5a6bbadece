"""Samplers: ways from unit Gaussian noise to images with any denoiser `(params, x_t, t, cond) -> x_hat`.

All but `one_step` follow the probability flow ODE dx = x_hat dalpha + eps_hat dsigma. Its Euler step x_s = alpha_s x_hat + sigma_s eps_hat,
with eps_hat = (x_t - alpha_t x_hat) / sigma_t, is Euler on EDM's ODE, Euler on the flow ODE, and DDIM with eta = 0. `euler` and `heun` take
the grid of any process and begin with sigma z; `ddim`, `pndm` and `dpm_solver_pp` are Stable Diffusion's: they go from timestep to timestep
of `VP` and begin with z; `rk45` chooses its own times. The denoiser computes in float32; the state is float64 where JAX has it enabled, as
in EDM, and float32 elsewhere.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import ode
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
T_MIN = 1e-3  # where `rk45` leaves the ODE of a flow


class Sampler(NamedTuple):
    """One way to make images.

    Attributes:
      sample: `(params, z, cond, noise) -> images`, all of z's shape [B, H, W, C]; `noise(i)` are unit Gaussian arrays of that shape too,
        for the samplers that add noise on the way.
      nfe: network calls for an image; None where each image has its own number.
      count: `(params, z, cond, noise) -> network calls` [B], where `nfe` is None.
    """

    sample: Callable
    nfe: int | None
    count: Callable | None = None


def one_step(denoise: Callable, process: process_lib.Process) -> Sampler:
    """The one-step generator: the denoiser at the highest noise level."""

    def sample(params, z, cond, noise=None):
        return denoise(
            params, process.prior(z), jnp.full(z.shape[:1], process.t_max, jnp.float32), cond
        )

    return Sampler(sample, 1)


def euler(denoise: Callable, process: process_lib.Process, *, num_steps: int) -> Sampler:
    """Euler's method; for `VP` diffusers' EulerDiscreteScheduler, whose times lie between timesteps."""
    grid = process.grid(num_steps)
    return _euler(denoise, process, grid, _noisiest(process, grid))


def ddim(
    denoise: Callable, process: process_lib.VP, *, num_steps: int, spacing: str = "leading"
) -> Sampler:
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
    return _multistep(
        denoise, process, lambda x_hat, eps_hat: eps_hat, (np.insert(grid[:-1], 1, grid[1]), a, b)
    )


def dpm_solver_pp(
    denoise: Callable, process: process_lib.VP, *, num_steps: int, last: str = "zero"
) -> Sampler:
    """DPM-Solver++(2M), midpoint: second order in lambda = ln(alpha / sigma) but for the first step and, mostly, the last.

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: VP.
      num_steps: 1 to 999.
      last: where the last step ends: "zero", in no noise, and it is of first order; or "sigma_min", at timestep 0, and it is of first
        order below 15 steps alone. The second is what InstaFlow's pairs were made with.

    Raises:
      ValueError: there is no such grid, or no such end.

    Source: Lu et al., arXiv 2211.01095, Algorithm 2; diffusers' DPMSolverMultistepScheduler with final_sigmas_type `last`, and the
    settings it has by itself.
    """
    grid = _timesteps("dpm_solver_pp", process, num_steps, "linspace")
    if last not in ("zero", "sigma_min"):
        raise ValueError(f"no end {last!r} of dpm_solver_pp; there are: zero, sigma_min.")
    if last == "sigma_min":
        grid[-1] = 0
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    ratio = sigma / alpha  # exp(-lambda), 0 where no noise is left
    second = slice(1, num_steps - (last == "zero" or num_steps < 15))  # steps of second order
    h = -np.diff(np.log(ratio[: second.stop + 1]))
    slope = np.zeros(num_steps)  # 1 / (2 r), the weight of the difference of the last two x_hat
    slope[second] = h[1:] / h[:-1] / 2
    gain = alpha[1:] * (1 - ratio[1:] / ratio[:-1])
    b = gain[:, None] * np.stack([1 + slope, -slope], axis=1)
    return _multistep(
        denoise, process, lambda x_hat, eps_hat: x_hat, (grid[:-1], sigma[1:] / sigma[:-1], b)
    )


def rk45(
    denoise: Callable, process: process_lib.RectifiedFlow, *, rtol: float = 1e-5, atol: float = 1e-5
) -> Sampler:
    """The adaptive solver that rectified flows are measured with, dx/dt = (x_t - x_hat) / t from t = 1, each image with steps of its own.

    In the public code it is the noise end that is left out, by a time of 1e-3. Here that end is regular: x_hat is of the network's own
    time 1. What is singular is the division at the data end, so the ODE is followed to t = T_MIN, and from there one Euler step goes to
    t = 0; it is off by T_MIN^2 / 2 times the acceleration of x, 5e-7 times that.

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: RectifiedFlow.
      rtol: tolerance of a step, see `ode.rk45`.
      atol: likewise.

    Raises:
      ValueError: the process is another one.

    Source: Liu et al., arXiv 2209.03003, whose code has rtol = atol = 1e-5.
    """
    _check_flow("rk45", process)

    def solve(params, z, cond):
        def velocity(t, x):
            x_hat, eps_hat = _predict(denoise, process, params, x, t, cond)
            return eps_hat - x_hat

        return ode.rk45(
            velocity, process.prior(z.astype(float)), process.t_max, T_MIN, rtol=rtol, atol=atol
        )

    def sample(params, z, cond, noise=None):
        x, _ = solve(params, z, cond)
        return denoise(
            params, x.astype(jnp.float32), jnp.full(z.shape[:1], T_MIN, jnp.float32), cond
        )

    def count(params, z, cond, noise=None):
        return solve(params, z, cond)[1] + 1

    return Sampler(sample, None, count)


def straightness(
    denoise: Callable, process: process_lib.RectifiedFlow, *, num_steps: int = 100
) -> Callable:
    """How straight the ways from noise to images are: the mean of ((Z_0 - Z_1) - v_i)^2 over the steps i of Euler's method and over the
    elements of an image, 0 if and only if one step is enough.

    Z_0 is the noise, Z_1 the image and v_i the velocity at step i; time may run either way. Papers do not say whether theirs is a mean or
    a sum over the elements.

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: RectifiedFlow.
      num_steps: of Euler; so many images are held for each.

    Returns:
      `(params, z, cond) -> S` [B], which can stand for the `sample` of a `Sampler`.

    Raises:
      ValueError: the process is another one.

    Source: Liu et al., arXiv 2209.03003.
    """
    _check_flow("straightness", process)
    if num_steps < 2:
        raise ValueError(
            f"num_steps of straightness is {num_steps}, expected 2 or more: one step is straight."
        )
    grid = process.grid(num_steps)
    follow = _euler_path(
        denoise,
        process,
        grid,
        _noisiest(process, grid),
        see=lambda x_hat, eps_hat: (eps_hat - x_hat).astype(jnp.float32),
    )

    def measure(params, z, cond, noise=None):
        x, velocities = follow(params, z, cond)
        return jnp.square((z - x)[None] - velocities).mean(axis=(0, *range(2, z.ndim + 1)))

    return measure


def heun(denoise: Callable, process: process_lib.Process, *, num_steps: int) -> Sampler:
    """Heun's method: each Euler step is redone with the mean of the predictions at its two ends, except one that ends in no noise,
    where there is no second prediction (EDM, arXiv 2206.00364, Algorithm 1)."""
    grid = process.grid(num_steps)

    def sample(params, z, cond, noise=None):
        predict = functools.partial(_predict, denoise, process, params, cond=cond)

        def step(x, times):
            return _heun_step(predict, process, x, *times), None

        return _integrate(step, _noisiest(process, grid), z, (grid[:-1], grid[1:]))[0]

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
    gamma = np.where(
        (s_min <= grid[:-1]) & (grid[:-1] <= s_max), min(churn / num_steps, 2**0.5 - 1), 0
    )
    raised = grid[:-1] * (1 + gamma)
    added = s_noise * np.sqrt(raised**2 - grid[:-1] ** 2)

    def sample(params, z, cond, noise):
        predict = functools.partial(_predict, denoise, process, params, cond=cond)

        def step(x, times):
            t, s, scale, i = times
            return _heun_step(predict, process, x + scale * noise(i), t, s), None

        return _integrate(
            step, _noisiest(process, grid), z, (raised, grid[1:], added, np.arange(num_steps))
        )[0]

    return Sampler(sample, _heun_calls(process, grid))


def _euler(denoise, process, grid, start):
    follow = _euler_path(denoise, process, grid, start, see=lambda x_hat, eps_hat: None)
    return Sampler(lambda params, z, cond, noise=None: follow(params, z, cond)[0], len(grid) - 1)


def _euler_path(denoise, process, grid, start, *, see):
    """`(params, z, cond) -> (x, seen)`, with what `see` makes of the predictions of each step."""

    def follow(params, z, cond):
        def step(x, times):
            t, s = times
            prediction = _predict(denoise, process, params, x, t, cond)
            return _advance(process, x, prediction, t, s), see(*prediction)

        return _integrate(step, start, z, (grid[:-1], grid[1:]))

    return follow


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
            return x, jnp.broadcast_to(
                x, (calls[2].shape[1], *x.shape)
            )  # anything finite: what is not there yet has the weight 0

        return _integrate(step, start, z, calls)[0][0]

    return Sampler(sample, len(calls[0]))


def _timesteps(name, process, num_steps, spacing):
    if not isinstance(process, process_lib.VP):
        raise ValueError(
            f"{name} needs the process VP, got {type(process).__name__}; use euler or heun."
        )
    return process.timesteps(num_steps, spacing)


def _check_flow(name, process):
    if not isinstance(process, process_lib.RectifiedFlow):
        raise ValueError(
            f"{name} needs the process RectifiedFlow, got {type(process).__name__}; rectify the denoiser first."
        )


def _noisiest(process, grid):
    return lambda z: process.sigma(jnp.asarray(grid[0])) * z


def _integrate(step, start, z, times):
    state, seen = jax.lax.scan(step, start(z.astype(float)), jax.tree.map(jnp.asarray, times))
    return jax.tree.map(lambda x: x.astype(jnp.float32), state), seen


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
    """(x_hat, eps_hat) at a time t, of all images or of each [B]."""
    x_hat = denoise(params, x_t.astype(jnp.float32), jnp.full(x_t.shape[:1], t, jnp.float32), cond)
    alpha, sigma = (process_lib.expand(a, x_t) for a in (process.alpha(t), process.sigma(t)))
    return x_hat, (x_t - alpha * x_hat) / sigma


def _advance(process, x_t, prediction, t, s):
    x_hat, eps_hat = prediction
    return (
        x_t
        + (process.alpha(s) - process.alpha(t)) * x_hat
        + (process.sigma(s) - process.sigma(t)) * eps_hat
    )
