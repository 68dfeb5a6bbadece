import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import process as process_lib
from dmd_jax import samplers


def gaussian(x_t, t):
    """The exact EDM denoiser of N(0, 0.5^2) data."""
    return 0.25 * x_t / (0.25 + process_lib.expand(t, x_t) ** 2)


def count_calls(sampler, process, num_steps):
    calls = []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return 0.5 * x_t

    jax.block_until_ready(sampler(denoise, process, process.grid(num_steps), jnp.ones((1, 1))))
    jax.effects_barrier()
    return calls


@pytest.mark.parametrize(("num_steps", "golden"), [(18, 0.527624637), (40, 0.504876865), (256, 0.500095425)])
def test_heun_goldens(num_steps, golden):
    process = process_lib.EDM()
    x = samplers.heun(gaussian, process, process.grid(num_steps), process.prior(jnp.ones((1, 1, 1, 1))))
    np.testing.assert_allclose(x.item(), golden, rtol=3e-6)


@pytest.mark.parametrize(("process", "expected"), [(process_lib.EDM(), 35), (process_lib.VP(), 36)])
def test_heun_calls_the_network_twice_a_step_but_once_where_no_noise_is_left(process, expected):
    assert len(count_calls(samplers.heun, process, 18)) == samplers.heun_calls(process, process.grid(18)) == expected


def test_euler_calls_the_network_once_a_step():
    calls = count_calls(samplers.euler, process_lib.EDM(), 18)
    np.testing.assert_array_equal(sorted(calls, reverse=True), process_lib.EDM().grid(18)[:-1])


def test_euler_is_ddim():
    process = process_lib.VP()
    grid = process.grid(10)
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x = z = np.random.default_rng(0).standard_normal((2, 3))
    for t, s in zip(abar[grid[:-1].astype(int)], abar[grid[1:].astype(int)], strict=True):
        x_hat = np.tanh(x)
        eps = (x - np.sqrt(t) * x_hat) / np.sqrt(1 - t)
        x = np.sqrt(s) * x_hat + np.sqrt(1 - s) * eps  # DDIM, equation 12, with sigma_t = 0
    result = samplers.euler(lambda x_t, t: jnp.tanh(x_t), process, grid, jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(result, x, atol=2e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_straight_flows_need_one_step(num_steps):
    process = process_lib.RectifiedFlow()
    point = jnp.array([[0.3, -0.7]])
    z = jax.random.normal(jax.random.key(0), (4, 2))
    x = samplers.euler(lambda x_t, t: jnp.broadcast_to(point, x_t.shape), process, process.grid(num_steps), z)
    np.testing.assert_allclose(x, np.broadcast_to(point, x.shape), atol=1e-6)


def test_heun_is_of_second_order():
    process = process_lib.EDM()
    exact = 80 * 0.5 / np.sqrt(80**2 + 0.5**2)
    errors = [samplers.heun(gaussian, process, process.grid(n), jnp.full((1, 1), 80.0)).item() - exact for n in (20, 40)]
    assert 3.5 < errors[0] / errors[1] < 8
