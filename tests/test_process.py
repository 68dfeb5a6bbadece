import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import process as process_lib
from dmd_jax import samplers

PROCESSES = (process_lib.EDM(), process_lib.VP(), process_lib.RectifiedFlow())
EDM_LEVELS = {
    0: 0.002,
    1: 0.00205020,
    20: 0.00323159,
    100: 0.0167514,
    300: 0.319434,
    500: 2.526508,
    700: 12.44353,
}
EDM_LEVELS |= {900: 45.5560, 980: 72.05387, 998: 79.56379, 999: 79.99998}
ABAR = {
    0: 0.9991500,
    20: 0.9813144,
    249: 0.6754324,
    399: 0.4260864,
    499: 0.2776697,
    749: 0.0566235,
    980: 0.00584378,
}
ABAR |= {981: 0.00577550, 999: 0.00466010}
RATIO = {
    0: 0.02917,
    20: 0.13799,
    249: 0.69320,
    399: 1.16058,
    499: 1.61289,
    749: 4.08173,
    980: 13.0431,
    981: 13.1204,
    999: 14.6146,
}
EDM_GRID = [
    80,
    57.586,
    40.786,
    28.375,
    19.352,
    12.910,
    8.4009,
    5.3152,
    3.2568,
    1.9233,
    1.0882,
    0.58535,
    0.29644,
    0.13952,
]
EDM_GRID += [0.059947, 0.022935, 0.0075280, 0.002, 0]


def all_levels(process):
    return process.level(jnp.arange(process_lib.NUM_LEVELS))


def test_edm_levels():
    process = process_lib.EDM()
    t = process.level(jnp.array(list(EDM_LEVELS)))
    np.testing.assert_allclose(process.sigma(t), list(EDM_LEVELS.values()), rtol=3e-6)
    np.testing.assert_array_equal(process.alpha(t), np.ones(len(t)))


def test_vp_table():
    process = process_lib.VP()
    t = process.level(jnp.array(list(ABAR)))
    abar = np.array(list(ABAR.values()))
    np.testing.assert_array_equal(t, list(ABAR))
    np.testing.assert_allclose(process.alpha(t), np.sqrt(abar), rtol=3e-6)
    np.testing.assert_allclose(process.sigma(t), np.sqrt(1 - abar), rtol=3e-5)
    np.testing.assert_allclose(process.sigma(t) / process.alpha(t), list(RATIO.values()), rtol=1e-4)
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    for t, tolerance in (
        (all_levels(process), 3e-7),
        (np.arange(1000.0), 1e-12),
    ):  # JAX's float32, numpy's float64
        np.testing.assert_allclose(process.alpha(t), np.sqrt(abar), rtol=tolerance)
        np.testing.assert_allclose(process.sigma(t), np.sqrt(1 - abar), rtol=tolerance)


def test_vp_between_timesteps():
    """It is np.interp of sigma / alpha, as in diffusers' EulerDiscreteScheduler; no noise at -1."""
    process, t = process_lib.VP(), np.array([-1, -0.25, 0.5, 437.5, 998.9])
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    ratio = np.interp(t, np.arange(-1, 1000), np.append(0, np.sqrt(1 / abar - 1)))
    np.testing.assert_allclose(process.sigma(t) / process.alpha(t), ratio, rtol=1e-11)
    np.testing.assert_allclose(process.alpha(t) ** 2 + process.sigma(t) ** 2, 1, rtol=1e-14)
    np.testing.assert_allclose(jax.jit(process.sigma)(jnp.float32(t)), process.sigma(t), rtol=1e-6)
    assert (process.alpha(t)[0], process.sigma(t)[0]) == (1, 0)


def test_rectified_flow_is_a_straight_line():
    process = process_lib.RectifiedFlow()
    t = jnp.array([0.0, 0.25, 1.0])
    np.testing.assert_array_equal(process.alpha(t), [1, 0.75, 0])
    np.testing.assert_array_equal(process.sigma(t), [0, 0.25, 1])


@pytest.mark.parametrize("process", PROCESSES)
def test_larger_levels_are_noisier(process):
    t = all_levels(process)
    assert (np.diff(t) > 0).all()
    assert (np.diff(process.sigma(t) / process.alpha(t)) > 0).all()
    assert process.sigma(t)[0] > 0  # something is left to predict


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("bounds", [(20, 980), (0, 999)])
def test_sampled_levels_reach_both_bounds_evenly(process, bounds):
    t = process_lib.sample_levels(process, jax.random.key(0), (200_000,), *bounds)
    index = np.searchsorted(all_levels(process), t)
    np.testing.assert_array_equal(process.level(index), t)
    assert (index.min(), index.max()) == bounds
    counts, _ = np.histogram(index, bins=10, range=(bounds[0], bounds[1] + 1))
    np.testing.assert_allclose(counts / index.size, 0.1, atol=0.005)


def test_training_times():
    key = jax.random.key(0)
    edm, vp, flow = (process.sample_t(key, (100_000,)) for process in PROCESSES)
    np.testing.assert_allclose((np.log(edm).mean(), np.log(edm).std()), (-1.2, 1.2), atol=0.02)
    assert set(np.unique(vp)) == set(range(1000))
    assert 0 < flow.min() < 0.002 and 0.998 < flow.max() < 1


def test_edm_grid():
    grid = process_lib.EDM().grid(18)
    np.testing.assert_allclose(grid, EDM_GRID, rtol=5e-5)
    assert grid.dtype == np.float64


@pytest.mark.parametrize("process", PROCESSES)
def test_grids_descend_from_the_noisiest_time(process):
    grid = process.grid(7)
    assert (
        grid.shape == (8,)
        and grid[0] == pytest.approx(process.t_max, rel=1e-6)
        and process.sigma(grid)[-1] == 0
    )
    assert (np.diff(grid) < 0).all()


@pytest.mark.parametrize(
    ("spacing", "expected", "first"),
    [
        ("leading", [751, 501, 251, 1, 0], 1),
        ("trailing", [999, 749, 499, 249, 0], 999),
        ("linspace", [999, 749, 500, 250, -1], 999),
    ],
)
def test_timesteps(spacing, expected, first):
    process = process_lib.VP()
    np.testing.assert_array_equal(process.timesteps(4, spacing), expected)
    assert process.timesteps(1, spacing)[0] == first  # of the three only "leading" begins at 1


def test_fractional_grid():
    np.testing.assert_array_equal(process_lib.VP().grid(4), [999, 666, 333, 0, -1])
    np.testing.assert_array_equal(process_lib.VP().grid(1), [0, -1])


@pytest.mark.parametrize("num_steps", [0, 1000])
def test_there_are_fewer_steps_than_timesteps(num_steps):
    for grid in (process_lib.VP().grid, lambda n: process_lib.VP().timesteps(n, "leading")):
        with pytest.raises(ValueError, match=f"num_steps is {num_steps}, expected 1 to 999"):
            grid(num_steps)
    with pytest.raises(
        ValueError, match="no spacing 'even'; there are: leading, trailing, linspace"
    ):
        process_lib.VP().timesteps(4, "even")


def test_prior_scale():
    z = jnp.array([1.0, -2.0])
    edm, vp, flow = (process.prior(z) for process in PROCESSES)
    np.testing.assert_array_equal(edm, [80, -160])
    np.testing.assert_array_equal(vp, z)  # not sigma(999) z
    np.testing.assert_array_equal(flow, z)
    assert [process.t_max for process in PROCESSES] == [
        80,
        999,
        1,
    ]  # 80, not the 79.99998 of the table


@pytest.mark.parametrize("process", PROCESSES)
def test_add_noise_has_a_time_per_image(process):
    x, eps = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2), dtype=np.float32)
    t = process.level(jnp.array([20, 500, 999]))
    expected = [process.alpha(t)[i] * x[i] + process.sigma(t)[i] * eps[i] for i in range(3)]
    chex.assert_trees_all_close(
        process_lib.add_noise(process, x, eps, t), np.stack(expected), rtol=1e-6
    )


@pytest.mark.parametrize("process", PROCESSES)
def test_the_time_of_a_ratio(process):
    """The inverse of sigma / alpha, at all levels, between them and beyond."""
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.float64, 1e-12)):
        with jax.enable_x64(True):
            t = process.level(jnp.arange(process_lib.NUM_LEVELS)).astype(dtype)
            t = jnp.concatenate([t, (t[1:] + 2 * t[:-1]) / 3])
            found = jax.jit(process.at_ratio)(process.sigma(t) / process.alpha(t))
        np.testing.assert_allclose(found, t, rtol=tolerance, atol=tolerance * process.t_max)
        assert found.dtype == dtype
    none, most = process.at_ratio(jnp.array([0.0, jnp.inf]))
    assert process.sigma(none[None]) == 0 and most == process.t_max


def test_the_time_of_a_ratio_by_itself():
    np.testing.assert_allclose(process_lib.EDM().at_ratio(jnp.array([0.5, 81])), [0.5, 80])
    np.testing.assert_allclose(
        process_lib.VP().at_ratio(jnp.array(list(RATIO.values()))), list(RATIO), atol=0.1
    )
    np.testing.assert_allclose(
        process_lib.RectifiedFlow().at_ratio(jnp.array([0.25, 3])), [0.2, 0.75], rtol=1e-6
    )


def test_rectified_flow_in_the_papers_time():
    """t = 0 is noise X_0 and t = 1 data X_1."""
    process, rng = process_lib.RectifiedFlow(), np.random.default_rng(0)
    x0, x1 = rng.standard_normal((2, 5, 2, 2, 1), dtype=np.float32)
    t = np.float32([0, 0.1, 0.4, 0.75, 1])[:, None, None, None]
    seen = []

    def unet(params, x, label, cond):  # that predicts -v
        jax.debug.callback(lambda label: seen.append(label), label)
        return params * x + label[:, None, None, None] / 1000

    denoise = denoiser_lib.Denoiser(unet, process, denoiser_lib.flow)
    x_t = process_lib.add_noise(process, x1, x0, jnp.asarray(1 - t.ravel()))
    np.testing.assert_allclose(x_t, t * x1 + (1 - t) * x0, atol=1e-6)
    _, target = denoise.output_and_target(0.3, x1[1:-1], x0[1:-1], jnp.asarray(1 - t.ravel()[1:-1]))
    np.testing.assert_allclose(target, -(x1 - x0)[1:-1], atol=1e-5)
    jax.effects_barrier()
    np.testing.assert_allclose(seen.pop(), 1000 * (1 - t.ravel()[1:-1]), rtol=1e-6)

    x = samplers.euler(denoise, process, num_steps=3).sample(0.3, jnp.asarray(x0), None)
    jax.effects_barrier()
    np.testing.assert_allclose(
        seen, np.repeat(np.float32([[1000], [666.67], [333.33]]), 5, axis=1), atol=0.005
    )
    z = x0
    for i in range(3):
        z = z + -(0.3 * z + (1 - i / 3)) / 3
    np.testing.assert_allclose(x, z, atol=1e-6)
