import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import process as process_lib
from dmd_jax import samplers

EDM = process_lib.EDM()
CHURN = dict(churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)  # EDM's for ImageNet-64


def gaussian(params, x_t, t, cond):
    """The exact EDM denoiser of N(0, 0.5^2) data."""
    return 0.25 * x_t / (0.25 + process_lib.expand(t, x_t) ** 2)


def images(values):
    return jnp.asarray(values).reshape(-1, 1, 1, 1)


def count_calls(make, process, **settings):
    calls = []

    def denoise(params, x_t, t, cond):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return 0.5 * x_t

    sampler = make(denoise, process, **settings)
    jax.block_until_ready(sampler.sample(None, jnp.ones((1, 1)), None, lambda i: jnp.ones((1, 1))))
    jax.effects_barrier()
    return calls, sampler.nfe


@pytest.mark.parametrize(("num_steps", "golden"), [(18, 0.527624637), (40, 0.504876865), (256, 0.500095425)])
def test_heun_goldens(num_steps, golden):
    sample = samplers.heun(gaussian, EDM, num_steps=num_steps).sample
    np.testing.assert_allclose(sample(None, images([1.0]), None).item(), golden, rtol=3e-6)
    with jax.enable_x64(True):  # the state is float64: only the network's own rounding is left
        np.testing.assert_allclose(sample(None, images([1.0]), None).item(), golden, rtol=2e-7)


def test_stochastic_heun_goldens():
    sample = samplers.stochastic_heun(gaussian, EDM, num_steps=256, **CHURN).sample
    for float64, tolerance in ((True, 1e-6), (False, 2e-5)):
        with jax.enable_x64(float64):
            x = sample(None, images([1.0, -0.7, 0.2]), None, lambda i: jnp.ones((3, 1, 1, 1)))
        np.testing.assert_allclose(x.ravel(), [3.7559039029, 3.7559039024, 3.7559039026], rtol=tolerance)


@pytest.mark.parametrize("num_steps", [18, 40, 256])
def test_samples_of_an_exact_score_have_the_datas_variance(num_steps):
    """Standard deviation 0.5; the deterministic sampler's own error is the golden one, the stochastic one corrects it."""
    z = jax.random.normal(jax.random.key(0), (20_000, 1, 1, 1))
    noise = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(1), i), z.shape)
    exact = float(samplers.heun(gaussian, EDM, num_steps=num_steps).sample(None, images([1.0]), None).item())
    x = samplers.heun(gaussian, EDM, num_steps=num_steps).sample(None, z, None)
    assert float(x.std()) == pytest.approx(exact * float(z.std()), rel=1e-4)
    stochastic = samplers.stochastic_heun(gaussian, EDM, num_steps=num_steps, **CHURN | dict(s_noise=1.0)).sample(None, z, None, noise)
    assert abs(stochastic.mean()) < 0.02
    assert float(stochastic.std()) == pytest.approx(0.5, rel={18: 0.15, 40: 0.05, 256: 0.02}[num_steps])
    assert abs(np.corrcoef(stochastic.ravel(), z.ravel())[0, 1]) < (0.9 if num_steps == 18 else 0.5)


def test_without_churn_stochastic_heun_is_heun():
    z = images([1.0, -0.3])
    stochastic = samplers.stochastic_heun(gaussian, EDM, num_steps=18, **CHURN | dict(churn=0.0))
    heun = samplers.heun(gaussian, EDM, num_steps=18)
    np.testing.assert_array_equal(stochastic.sample(None, z, None, lambda i: jnp.ones_like(z)), heun.sample(None, z, None))
    assert stochastic.nfe == heun.nfe == 35


def test_heun_is_edms_algorithm_1():
    x, grid = 80 * np.float64([[0.3, -1.2]]), EDM.grid(4)
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        d = (x - np.tanh(x)) / t
        ahead = x + (s - t) * d
        if i < 3:
            d = (d + (ahead - np.tanh(ahead)) / s) / 2
        x = x + (s - t) * d
    sampler = samplers.heun(lambda params, x_t, t, cond: jnp.tanh(x_t), EDM, num_steps=4)
    np.testing.assert_allclose(sampler.sample(None, jnp.float32([[0.3, -1.2]]), None), x, atol=1e-5)


@pytest.mark.parametrize(("process", "expected"), [(EDM, 35), (process_lib.VP(), 36)])
def test_heun_calls_the_network_twice_a_step_but_once_where_no_noise_is_left(process, expected):
    calls, nfe = count_calls(samplers.heun, process, num_steps=18)
    assert len(calls) == nfe == expected


def test_noise_is_added_before_the_first_call_of_a_step():
    calls, nfe = count_calls(samplers.stochastic_heun, EDM, num_steps=18, **CHURN)
    grid = EDM.grid(18)
    raised = [t * 2**0.5 if 0.05 <= t <= 50 else t for t in grid[:-1]]  # 40 / 18 is above the limit of sqrt(2) - 1
    assert len(calls) == nfe == 35
    np.testing.assert_allclose(sorted(calls), sorted([*raised, *grid[1:-1]]), rtol=1e-6)


def test_euler_calls_the_network_once_a_step():
    calls, nfe = count_calls(samplers.euler, EDM, num_steps=18)
    assert nfe == 18
    np.testing.assert_allclose(sorted(calls, reverse=True), EDM.grid(18)[:-1], rtol=1e-6)


def test_euler_is_ddim():
    process = process_lib.VP()
    grid = process.grid(10)
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x = z = np.random.default_rng(0).standard_normal((2, 3))
    for t, s in zip(abar[grid[:-1].astype(int)], abar[grid[1:].astype(int)], strict=True):
        x_hat = np.tanh(x)
        eps = (x - np.sqrt(t) * x_hat) / np.sqrt(1 - t)
        x = np.sqrt(s) * x_hat + np.sqrt(1 - s) * eps  # DDIM, equation 12, with sigma_t = 0
    sampler = samplers.euler(lambda params, x_t, t, cond: jnp.tanh(x_t), process, num_steps=10)
    np.testing.assert_allclose(sampler.sample(None, jnp.asarray(z, jnp.float32), None), x, atol=2e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_straight_flows_need_one_step(num_steps):
    point = jnp.array([[0.3, -0.7]])
    sampler = samplers.euler(
        lambda params, x_t, t, cond: jnp.broadcast_to(point, x_t.shape), process_lib.RectifiedFlow(), num_steps=num_steps
    )
    x = sampler.sample(None, jax.random.normal(jax.random.key(0), (4, 2)), None)
    np.testing.assert_allclose(x, np.broadcast_to(point, x.shape), atol=1e-6)


def test_heun_is_of_second_order():
    exact = 80 * 0.5 / np.sqrt(80**2 + 0.5**2)
    errors = [samplers.heun(gaussian, EDM, num_steps=n).sample(None, images([1.0]), None).item() - exact for n in (20, 40)]
    assert 3.5 < errors[0] / errors[1] < 8
