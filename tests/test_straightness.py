"""Rectified flows between N(0, 1) and N(m, s^2), with m and s for each pixel, in closed form.

The pairs of the first flow are independent. Its x_t has the mean (1 - t) m and the variance u^2 =
(1 - t)^2 s^2 + t^2. Its velocity is the mean of eps - x given x_t, -m + u' (x_t - (1 - t) m) / u,
so that z goes to (1 - t) m + u z at time t and to m + s z at the end.

The pairs of the reflow are (z, m + s z). The same holds with u = (1 - t) s + t: straight lines.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import generate, ode, samplers, sharding
from dmd_jax import process as process_lib

FLOW = process_lib.RectifiedFlow()
M, S = (
    np.linspace(a, b, 32, dtype=np.float32).reshape(1, 4, 4, 2) for a, b in ((1, -0.5), (0.1, 1.5))
)
Z = np.random.default_rng(0).standard_normal((8, 4, 4, 2), np.float32)


def first(t):
    """u, u'"""
    u = ((1 - t) ** 2 * S**2 + t**2) ** 0.5
    return u, (t - (1 - t) * S**2) / u


def reflow(t):
    return (1 - t) * S + t, 1 - S


FLOWS = {"first": first, "reflow": reflow}


def velocity(flow, t, x):
    u, slope = flow(t)
    return slope * (x - (1 - t) * M) / u - M


def denoiser(flow):
    def denoise(params, x_t, t, cond):
        t = process_lib.expand(t, x_t)
        return x_t - t * velocity(flow, t, x_t)

    return denoise


def on_the_mesh(sample):
    parallel = sharding.Parallel(sharding.make_mesh())
    inputs = dict(z=Z, key=np.zeros((8, 2), np.uint32), cond=np.zeros(8, np.int32))
    return generate.make_sample(samplers.Sampler(sample, None), parallel, 8)({}, inputs)


def in_numpy(flow, num_steps):
    """The image and the straightness by Euler's method in the papers' time."""
    z, velocities = Z.astype(float), []
    for i in range(num_steps):
        velocities.append(-velocity(flow, 1 - i / num_steps, z))
        z = z + velocities[-1] / num_steps
    return z, np.mean([((z - Z) - v) ** 2 for v in velocities], axis=(0, 2, 3, 4))


def test_the_velocity_is_the_regression_of_the_pairs():
    """Least squares over pairs, of two pixels, at one time."""
    rng, t = np.random.default_rng(1), 0.3
    for flow, eps in ((first, rng.standard_normal((400_000, 2))), (reflow, None)):
        z = rng.standard_normal((400_000, 2))
        eps = z if eps is None else eps
        m, s = M.ravel()[[0, -1]], S.ravel()[[0, -1]]
        x = m + s * z
        for pixel, (x_t, target) in enumerate(
            zip(((1 - t) * x + t * eps).T, (eps - x).T, strict=True)
        ):
            slope, offset = np.polyfit(x_t, target, 1)
            at = [
                velocity(flow, t, np.full(M.shape, value)).ravel()[[0, -1]][pixel]
                for value in (-1.0, 1.0)
            ]
            np.testing.assert_allclose([offset - slope, offset + slope], at, atol=0.02)


@pytest.mark.parametrize("name", FLOWS)
def test_the_ways_and_their_variances(name):
    """At every time x_t of the ODE has the mean and the variance of the interpolated pairs.

    Between the ends the variances of the two flows differ by 2 t (1 - t) s, because the pairs
    (z, m + s z) have the covariance s.
    """
    flow = FLOWS[name]
    for t in (0.75, 0.4, 0.1):
        with jax.enable_x64(True):
            field = lambda t, x: velocity(flow, process_lib.expand(t, x), x)
            x, _ = ode.rk45(field, jnp.asarray(Z, float), 1.0, t, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(x, (1 - t) * M + flow(t)[0] * Z, atol=1e-6)
        covariance = {"first": 0, "reflow": S}[name]  # of eps and x
        np.testing.assert_allclose(
            flow(t)[0] ** 2, (1 - t) ** 2 * S**2 + t**2 + 2 * t * (1 - t) * covariance, rtol=1e-5
        )


@pytest.mark.parametrize("name", FLOWS)
def test_solvers_reach_the_end(name):
    denoise = denoiser(FLOWS[name])
    np.testing.assert_allclose(
        on_the_mesh(samplers.rk45(denoise, FLOW).sample), M + S * Z, atol=5e-4
    )
    np.testing.assert_allclose(
        on_the_mesh(samplers.euler(denoise, FLOW, num_steps=2000).sample), M + S * Z, atol=5e-3
    )


def test_one_step_is_exact_for_the_reflow_alone():
    for num_steps in (1, 3):
        x = on_the_mesh(samplers.euler(denoiser(reflow), FLOW, num_steps=num_steps).sample)
        np.testing.assert_allclose(x, M + S * Z, atol=1e-6)
    np.testing.assert_allclose(
        on_the_mesh(samplers.one_step(denoiser(reflow), FLOW).sample), M + S * Z, atol=1e-6
    )
    x = on_the_mesh(samplers.one_step(denoiser(first), FLOW).sample)
    np.testing.assert_allclose(x, np.broadcast_to(M, x.shape), atol=1e-6)  # the mean of all images


@pytest.mark.parametrize("num_steps", [2, 25, 100])
def test_straightness_of_the_first_flow_is_numpys(num_steps):
    x, expected = in_numpy(first, num_steps)
    denoise = denoiser(first)
    np.testing.assert_allclose(
        on_the_mesh(samplers.euler(denoise, FLOW, num_steps=num_steps).sample), x, atol=1e-5
    )
    measure = samplers.straightness(denoise, FLOW, num_steps=num_steps)
    for found in (
        on_the_mesh(measure),
        measure(None, jnp.asarray(Z), None),
    ):  # a state of float64 and of float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    assert num_steps == 1 or (expected > 0.02).all()


def test_straightness_of_the_first_flow_is_the_integral():
    """Of E[(z - x - v)^2] over time: (1 - s - u')^2 z^2."""
    times = (np.arange(20_000) + 0.5) / 20_000
    bend = np.mean([(1 - S - first(t)[1]) ** 2 for t in times], axis=0)
    expected = (bend * Z**2).mean(axis=(1, 2, 3))
    errors = [
        np.abs(
            on_the_mesh(samplers.straightness(denoiser(first), FLOW, num_steps=n)) / expected - 1
        ).max()
        for n in (100, 400)
    ]
    assert errors[0] < 0.05 and errors[1] < errors[0] / 3  # first order


def test_the_reflow_is_straight():
    for num_steps in (2, 25, 100):
        measure = samplers.straightness(denoiser(reflow), FLOW, num_steps=num_steps)
        assert (on_the_mesh(measure) < 1e-9).all()
    assert on_the_mesh(measure).shape == (8,)
    with pytest.raises(ValueError, match="num_steps of straightness is 1, expected 2 or more"):
        samplers.straightness(denoiser(reflow), FLOW, num_steps=1)
