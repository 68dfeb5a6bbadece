"""An adaptive solver of dy/dt = f(t, y) with steps of its own for every image of a batch.

It is Dormand and Prince's pair of orders 5 and 4. A step of length h has the slopes
k_i = f(t + c_i h, y + h sum_j a_ij k_j) and ends at y' = y + h sum_j b_j k_j, of order 5. The step
is accepted if

    rms(h sum_j e_j k_j / (atol + rtol max(|y|, |y'|))) < 1

and the next length is 0.9 h times the inverse fifth root of this error, between 0.2 h and 10 h
(Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, sections II.4 and II.5). These
are the steps of scipy's solve_ivp with RK45, so that counts of calls compare with those in papers.

The solvers of diffrax 0.7 and jax.experimental.ode do not run inside jax.shard_map, where the carry
of their loops changes type.
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
    # This row is b, so that the last slope is the first of the next step.
    np.array([35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]),
)
E = np.array([-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40])


def rk45(
    f: Callable, y: jax.Array, start: float, end: float, *, rtol: float, atol: float
) -> tuple[jax.Array, jax.Array]:
    """Solves the equation from `start` to `end`, with steps of its own for each row of `y`.

    Args:
      f: `(t [B], y [B, ...]) -> dy/dt` [B, ...].
      y: the state at time `start`, [B, ...]; its dtype is that of the computation.
      start: time, the same for all rows.
      end: time, before or after `start`.
      rtol: tolerance relative to |y|.
      atol: absolute tolerance.

    Returns:
      y at `end`, NaN in rows for which no step is short enough; and the calls of f that each row
      needed, [B] integers. f is called until the last row is done.
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
        factor = jnp.clip(0.9 * error**-0.2, 0.2, jnp.where(rejected, 1, 10))
        factor = jnp.where(error < jnp.inf, factor, 0.2)  # also if the error is NaN
        accepted = error < 1
        failed = ~accepted & ~(h * factor >= shortest)
        at_end = failed | (accepted & (h >= left))
        t = jnp.where(accepted, t + sign * h, t)
        t = jnp.where(at_end, end, t)
        y = jnp.where(process_lib.expand(accepted, y), ahead, y)
        y = jnp.where(process_lib.expand(failed, y), jnp.nan, y)
        slope = jnp.where(process_lib.expand(accepted, y), slopes[-1], slope)
        return t, y, slope, h * factor, ~accepted, calls + len(C) * (left > 0)

    def unfinished(state):
        t, *_ = state
        return (sign * (end - t) > 0).any()

    slope, h = _first_step(f, y, start, sign, abs(end - start), rtol, atol, norm)
    zeros = jnp.zeros_like(h)  # inside jax.shard_map they vary over devices, as the carry has to
    state = (zeros + start, y, slope, h, zeros > 0, (zeros + 2).astype(int))
    _, y, _, _, _, calls = jax.lax.while_loop(unfinished, step, state)
    return y, calls


def _mix(weights, slopes):
    return sum(w * k for w, k in zip(weights.tolist(), slopes, strict=True) if w)


def _first_step(f, y, start, sign, longest, rtol, atol, norm):
    """Returns the slope at the start and the length of the first step.

    Source: Hairer et al., section II.4, "Starting Step Size".
    """
    t = jnp.full(y.shape[:1], start, y.dtype)
    scale = atol + rtol * jnp.abs(y)
    slope = f(t, y)
    size = norm(y / scale)
    speed = norm(slope / scale)
    h = jnp.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
    h = jnp.minimum(h, longest)
    slope_ahead = f(t + sign * h, y + process_lib.expand(sign * h, y) * slope)
    curvature = norm((slope_ahead - slope) / scale) / h
    larger = jnp.maximum(speed, curvature)
    guess = jnp.where(larger <= 1e-15, jnp.maximum(1e-6, 1e-3 * h), (0.01 / larger) ** 0.2)
    return slope, jnp.minimum(jnp.minimum(100 * h, guess), longest)
