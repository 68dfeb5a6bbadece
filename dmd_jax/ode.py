"""An adaptive solver of dy/dt = f(t, y) that chooses the steps of every image of a batch by itself: Dormand and Prince's pair of orders 5
and 4.

A step of length h with the slopes k_i = f(t + c_i h, y + h sum_j a_ij k_j) ends at y + h sum_j b_j k_j, of order 5; it is taken if

    rms(h sum_j e_j k_j / (atol + rtol max(|y|, |y'|))) < 1

and the next length is 0.9 h times the fifth root of its inverse, 0.2 to 10 times h (Hairer, Norsett, Wanner, Solving Ordinary Differential
Equations I, sections II.4 and II.5). These are scipy's steps, solve_ivp with RK45, so that counts of calls can be compared with those in
papers. The solvers of diffrax 0.7 and jax.experimental.ode do not run inside jax.shard_map, where the carry of their loops changes type.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import process as process_lib

C = np.array([1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])
A = (
    np.array([1 / 5]),
    np.array([3 / 40, 9 / 40]),
    np.array([44 / 45, -56 / 15, 32 / 9]),
    np.array([19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729]),
    np.array([9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656]),
    np.array(
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]
    ),  # b: the last slope is the first of the next step
)
E = np.array([-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40])


def rk45(
    f: Callable, y: jax.Array, start: float, end: float, *, rtol: float, atol: float
) -> tuple[jax.Array, jax.Array]:
    """The solution at `end`, for each row of `y` with steps of its own.

    Args:
      f: `(t [B], y [B, ...]) -> dy/dt` [B, ...].
      y: at time `start`, [B, ...]; its dtype is that of the computation.
      start: time, the same for all rows.
      end: time, before or after `start`.
      rtol: tolerance relative to |y|.
      atol: absolute tolerance.

    Returns:
      y at `end`, NaN where no step is short enough; and the calls of f that each row has needed, [B] integers. f is called until the last
      row is done.
    """
    sign = 1.0 if end > start else -1.0
    shortest = 10 * float(jnp.finfo(y.dtype).eps) * max(abs(start), abs(end))

    def norm(a):
        return jnp.sqrt(jnp.mean(a**2, axis=tuple(range(1, a.ndim))))

    def step(state):
        t, y, slope, h, rejected, calls = state
        left = sign * (end - t)
        h = jnp.minimum(jnp.maximum(h, shortest), left)
        slopes = [slope]
        for c, weights in zip(C, A, strict=True):
            ahead = y + process_lib.expand(sign * h, y) * _mix(weights, slopes)
            slopes.append(f(t + sign * c * h, ahead))
        scale = atol + rtol * jnp.maximum(jnp.abs(y), jnp.abs(ahead))
        error = norm(process_lib.expand(h, y) * _mix(E, slopes) / scale)
        factor = jnp.where(
            error < jnp.inf, jnp.clip(0.9 * error**-0.2, 0.2, jnp.where(rejected, 1, 10)), 0.2
        )  # of a NaN 0.2
        taken, failed = error < 1, ~(error < 1) & ~(h * factor >= shortest)
        t = jnp.where(failed | taken & (h >= left), end, jnp.where(taken, t + sign * h, t))
        y, slope = (
            jnp.where(process_lib.expand(taken, y), new, old)
            for new, old in ((ahead, y), (slopes[-1], slope))
        )
        y = jnp.where(process_lib.expand(failed, y), jnp.nan, y)
        return t, y, slope, h * factor, ~taken, calls + len(C) * (left > 0)

    slope, h = _first_step(f, y, start, sign, abs(end - start), rtol, atol, norm)
    alike = jnp.zeros_like(h)
    state = (alike + start, y, slope, h, alike > 0, (alike + 2).astype(int))
    _, y, _, _, _, calls = jax.lax.while_loop(
        lambda state: (sign * (end - state[0]) > 0).any(), step, state
    )
    return y, calls


def _mix(weights, slopes):
    return sum(w * k for w, k in zip(weights.tolist(), slopes, strict=True) if w)


def _first_step(f, y, start, sign, longest, rtol, atol, norm):
    """The slope at the start and the length of the first step (Hairer et al., section II.4, "Starting Step Size")."""
    t, scale = jnp.full(y.shape[:1], start, y.dtype), atol + rtol * jnp.abs(y)
    slope = f(t, y)
    size, speed = norm(y / scale), norm(slope / scale)
    h = jnp.minimum(jnp.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed), longest)
    bend = norm((f(t + sign * h, y + process_lib.expand(sign * h, y) * slope) - slope) / scale) / h
    most = jnp.maximum(speed, bend)
    guess = jnp.where(most <= 1e-15, jnp.maximum(1e-6, 1e-3 * h), (0.01 / most) ** 0.2)
    return slope, jnp.minimum(jnp.minimum(100 * h, guess), longest)
