"""Samplers turn unit Gaussian noise into images with any denoiser `(params, x_t, t, cond) -> x_hat`.

All but `one_step` follow the probability flow ODE dx = x_hat dalpha + eps_hat dsigma. Its Euler step

    x_s = alpha_s x_hat + sigma_s eps_hat,    eps_hat = (x_t - alpha_t x_hat) / sigma_t

is Euler on EDM's ODE, Euler on the flow ODE, and DDIM with eta = 0. `euler` and `heun` take the grid
of any process and begin with sigma z. `ddim`, `pndm` and `dpm_solver_pp` are Stable Diffusion's:
they go from timestep to timestep of `VP` and begin with z. `rk45` chooses its own times.

The denoiser computes in float32. The state is float64 where JAX has it enabled, as in EDM, and
float32 elsewhere.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import ode
from dmd_jax import process as process_lib

# what a config may name
CHOICES = (
    "one_step",
    "euler",
    "heun",
    "stochastic_heun",
    "rk45",
    "ddim",
    "pndm",
    "dpm_solver_pp",
)
# A row holds the weights of the last five predictions in a call of PLMS, the newest first. The
# second row serves only to redo the first step.
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
T_MIN = 1e-3  # the time at which `rk45` leaves the ODE of a flow


class Sampler(NamedTuple):
    """A way to make images.

    Attributes:
      sample: `(params, z, cond, noise) -> images`, with z and images [B, H, W, C]. `noise(i)` is
        unit Gaussian noise of the same shape, for the samplers that add noise in step i.
      nfe: network calls for an image; None if each image has its own number.
      count: `(params, z, cond, noise) -> network calls` [B], if `nfe` is None.
    """

    sample: Callable
    nfe: int | None
    count: Callable | None = None


def one_step(denoise: Callable, process: process_lib.Process) -> Sampler:
    """Makes the one-step generator, see `denoiser.one_step`."""
    generate = denoiser_lib.one_step(denoise, process)
    return Sampler(lambda params, z, cond, noise=None: generate(params, z, cond), 1)


def euler(denoise: Callable, process: process_lib.Process, *, num_steps: int) -> Sampler:
    """Makes Euler's method.

    For `VP` it is diffusers' EulerDiscreteScheduler, whose times lie between timesteps.
    """
    grid = process.grid(num_steps)
    return _euler(denoise, process, grid, _noisiest(process, grid))


def ddim(
    denoise: Callable, process: process_lib.VP, *, num_steps: int, spacing: str = "leading"
) -> Sampler:
    """Makes DDIM with eta = 0 (Song et al., arXiv 2010.02502, equation 12) over timesteps.

    Each step ends where the next one begins. With "trailing" and a num_steps that does not divide
    1000, some steps of diffusers end one timestep away from there.

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: VP.
      num_steps: 1 to 999.
      spacing: of `VP.timesteps`.
    """
    return _euler(denoise, process, _timesteps("ddim", process, num_steps, spacing), process.prior)


def pndm(denoise: Callable, process: process_lib.VP, *, num_steps: int) -> Sampler:
    """Makes PLMS as Stable Diffusion has it, with num_steps + 1 network calls.

    The first step is redone with the mean of the predictions at its two ends. The other steps take
    Adams-Bashforth's mean of up to four eps_hat.

    Raises:
      ValueError: `num_steps` is 1, so there is no second prediction to redo the step with.

    Source: Liu et al., arXiv 2202.09778, equations 9 and 12; diffusers' PNDMScheduler with
    skip_prk_steps, which takes the mean of what the network predicts: the same for eps, but not
    for v.
    """
    grid = _timesteps("pndm", process, num_steps, "leading")
    if num_steps == 1:
        raise ValueError("num_steps of pndm is 1, expected 2 or more; use ddim.")
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    calls = np.arange(num_steps + 1)
    step = np.maximum(calls - 1, 0)
    # A step is x_s = alpha_s / alpha_t x_t + gain eps_hat. The first one is redone from its end:
    # x_s + gain (new - old) / 2.
    gain = alpha[1:] * np.diff(sigma / alpha)
    t = np.insert(grid[:-1], 1, grid[1])
    a = np.where(calls == 1, 1, (alpha[1:] / alpha[:-1])[step])
    b = gain[step, None] * PLMS[np.minimum(calls, 5)]
    return _multistep(denoise, process, lambda x_hat, eps_hat: eps_hat, (t, a, b))


def dpm_solver_pp(
    denoise: Callable, process: process_lib.VP, *, num_steps: int, last: str = "zero"
) -> Sampler:
    """Makes DPM-Solver++(2M), midpoint.

    It is of second order in lambda = ln(alpha / sigma), except the first step and often the last.

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: VP.
      num_steps: 1 to 999.
      last: where the last step ends. "zero": without noise; the step is of first order.
        "sigma_min": at timestep 0; the step is of first order if there are fewer than 15 steps.
        InstaFlow's pairs were made with "sigma_min".

    Raises:
      ValueError: there is no such grid, or no such end.

    Source: Lu et al., arXiv 2211.01095, Algorithm 2; diffusers' DPMSolverMultistepScheduler with
    final_sigmas_type `last` and its default settings.
    """
    grid = _timesteps("dpm_solver_pp", process, num_steps, "linspace")
    if last not in ("zero", "sigma_min"):
        raise ValueError(f"no end {last!r} of dpm_solver_pp; there are: zero, sigma_min.")
    if last == "sigma_min":
        grid[-1] = 0
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    ratio = sigma / alpha  # exp(-lambda), 0 where no noise is left
    last_is_first_order = last == "zero" or num_steps < 15
    stop = num_steps - 1 if last_is_first_order else num_steps  # steps 1 to stop are of 2nd order
    h = -np.diff(np.log(ratio[: stop + 1]))
    slope = np.zeros(num_steps)  # 1 / (2 r), the weight of the difference of the last two x_hat
    slope[1:stop] = h[1:] / h[:-1] / 2
    gain = alpha[1:] * (1 - ratio[1:] / ratio[:-1])
    a = sigma[1:] / sigma[:-1]
    b = gain[:, None] * np.stack([1 + slope, -slope], axis=1)
    return _multistep(denoise, process, lambda x_hat, eps_hat: x_hat, (grid[:-1], a, b))


def rk45(
    denoise: Callable, process: process_lib.RectifiedFlow, *, rtol: float = 1e-5, atol: float = 1e-5
) -> Sampler:
    """Makes the adaptive solver with which papers measure rectified flows.

    It solves dx/dt = (x_t - x_hat) / t from t = 1, with steps of its own for each image. The public
    code leaves out a time of 1e-3 at the noise end. Here the noise end is regular, because x_hat is
    the network's at its own time 1; the division is singular at the data end. So the solver goes to
    t = T_MIN, and one Euler step goes from there to t = 0. The error of that step is T_MIN^2 / 2 =
    5e-7 times the acceleration of x.

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: RectifiedFlow.
      rtol: relative tolerance of a step, see `ode.rk45`.
      atol: absolute tolerance of a step.

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
        t = jnp.full(z.shape[:1], T_MIN, jnp.float32)
        return denoise(params, x.astype(jnp.float32), t, cond)

    def count(params, z, cond, noise=None):
        _, calls = solve(params, z, cond)
        return calls + 1

    return Sampler(sample, None, count)


def straightness(
    denoise: Callable, process: process_lib.RectifiedFlow, *, num_steps: int = 100
) -> Callable:
    """Makes a measure of how straight the paths from noise to images are.

    It is the mean of ((Z_0 - Z_1) - v_i)^2 over the steps i of Euler's method and the elements of an
    image, and 0 if and only if one step is enough. Z_0 is the noise, Z_1 the image, and v_i the
    velocity at step i; time may run either way. The papers do not say whether theirs is a mean or
    a sum over the elements.

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: RectifiedFlow.
      num_steps: of Euler, at least 2; memory holds one velocity per step and image.

    Returns:
      `(params, z, cond) -> S` [B], which can replace the `sample` of a `Sampler`.

    Raises:
      ValueError: the process is another one, or num_steps is below 2.

    Source: Liu et al., arXiv 2209.03003.
    """
    _check_flow("straightness", process)
    if num_steps < 2:
        raise ValueError(
            f"num_steps of straightness is {num_steps}, expected 2 or more: one step is straight."
        )
    grid = process.grid(num_steps)

    def velocity(x_hat, eps_hat):
        return (eps_hat - x_hat).astype(jnp.float32)

    follow = _euler_path(denoise, process, grid, _noisiest(process, grid), record=velocity)

    def measure(params, z, cond, noise=None):
        x, velocities = follow(params, z, cond)
        return jnp.square((z - x)[None] - velocities).mean(axis=(0, *range(2, z.ndim + 1)))

    return measure


def heun(denoise: Callable, process: process_lib.Process, *, num_steps: int) -> Sampler:
    """Makes Heun's method (EDM, arXiv 2206.00364, Algorithm 1).

    Each Euler step is redone with the mean of the predictions at its two ends. The last step is not:
    it ends without noise, where there is no second prediction.
    """
    grid = process.grid(num_steps)

    def sample(params, z, cond, noise=None):
        predict = functools.partial(_predict, denoise, process, params, cond=cond)

        def step(x, times):
            return _heun_step(predict, process, x, *times), None

        return _integrate(step, _noisiest(process, grid), z, (grid[:-1], grid[1:]))[0]

    return Sampler(sample, 2 * num_steps - 1)


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
    """Makes Heun's method with noise added before each step (EDM, Algorithm 2).

    Args:
      denoise: `(params, x_t, t, cond) -> x_hat`.
      process: EDM, whose time is the standard deviation of the noise.
      num_steps: of Heun.
      churn: S_churn, summed over all steps.
      s_min: S_min, the lowest noise level at which noise is added.
      s_max: S_max, the highest noise level at which noise is added.
      s_noise: S_noise, the standard deviation of unit noise that is added.
    """
    grid = process.grid(num_steps)
    t = grid[:-1]
    gamma = np.where((s_min <= t) & (t <= s_max), min(churn / num_steps, 2**0.5 - 1), 0)
    t_raised = t * (1 + gamma)
    scale = s_noise * np.sqrt(t_raised**2 - t**2)
    times = (t_raised, grid[1:], scale, np.arange(num_steps))

    def sample(params, z, cond, noise):
        predict = functools.partial(_predict, denoise, process, params, cond=cond)

        def step(x, times):
            t, s, scale, i = times
            return _heun_step(predict, process, x + scale * noise(i), t, s), None

        return _integrate(step, _noisiest(process, grid), z, times)[0]

    return Sampler(sample, 2 * num_steps - 1)


def _euler(denoise, process, grid, start):
    follow = _euler_path(denoise, process, grid, start, record=lambda x_hat, eps_hat: None)
    return Sampler(lambda params, z, cond, noise=None: follow(params, z, cond)[0], len(grid) - 1)


def _euler_path(denoise, process, grid, start, *, record):
    """Returns `(params, z, cond) -> (x, records)`; `record` maps the predictions of a step."""

    def follow(params, z, cond):
        def step(x, times):
            t, s = times
            prediction = _predict(denoise, process, params, x, t, cond)
            return _advance(process, x, prediction, t, s), record(*prediction)

        return _integrate(step, start, z, (grid[:-1], grid[1:]))

    return follow


def _multistep(denoise, process, choose, calls):
    """Makes a sampler in which x becomes a x + sum_k b_k h_k, with the last predictions h.

    `choose` takes h out of (x_hat, eps_hat); the newest comes first. `calls` are t [N], a [N] and
    b [N, K].
    """
    num_calls, num_predictions = calls[2].shape

    def sample(params, z, cond, noise=None):
        def step(carry, call):
            x, h = carry
            t, a, b = call
            new = choose(*_predict(denoise, process, params, x, t, cond))
            h = jnp.concatenate([new[None].astype(h.dtype), h[:-1]])
            return (a * x + (process_lib.expand(b, h) * h).sum(0), h), None

        def start(z):
            x = process.prior(z)
            # h may be anything finite: predictions that do not exist yet have the weight 0.
            return x, jnp.broadcast_to(x, (num_predictions, *x.shape))

        (x, _), _ = _integrate(step, start, z, calls)
        return x

    return Sampler(sample, num_calls)


def _timesteps(name, process, num_steps, spacing):
    if not isinstance(process, process_lib.VP):
        raise ValueError(
            f"{name} needs the process VP, got {type(process).__name__}; use euler or heun."
        )
    return process.timesteps(num_steps, spacing)


def _check_flow(name, process):
    if not isinstance(process, process_lib.RectifiedFlow):
        raise ValueError(
            f"{name} needs the process RectifiedFlow, got {type(process).__name__}; "
            "rectify the denoiser first."
        )


def _noisiest(process, grid):
    return lambda z: process.sigma(jnp.asarray(grid[0])) * z


def _integrate(step, start, z, times):
    state, records = jax.lax.scan(step, start(z.astype(float)), jax.tree.map(jnp.asarray, times))
    return jax.tree.map(lambda x: x.astype(jnp.float32), state), records


def _heun_step(predict, process, x, t, s):
    first = predict(x, t)
    ahead = _advance(process, x, first, t, s)

    def correct():
        second = predict(ahead, s)
        return _advance(process, x, jax.tree.map(lambda a, b: (a + b) / 2, first, second), t, s)

    return jax.lax.cond(process.sigma(s) > 0, correct, lambda: ahead)


def _predict(denoise, process, params, x_t, t, cond):
    """Returns (x_hat, eps_hat) at a time t, one for all images or [B]."""
    x_hat = denoise(params, x_t.astype(jnp.float32), jnp.full(x_t.shape[:1], t, jnp.float32), cond)
    alpha = process_lib.expand(process.alpha(t), x_t)
    sigma = process_lib.expand(process.sigma(t), x_t)
    return x_hat, (x_t - alpha * x_hat) / sigma


def _advance(process, x_t, prediction, t, s):
    x_hat, eps_hat = prediction
    dalpha = process.alpha(s) - process.alpha(t)
    dsigma = process.sigma(s) - process.sigma(t)
    return x_t + dalpha * x_hat + dsigma * eps_hat
