import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import ode, sharding

scipy = pytest.importorskip("scipy.integrate")
Y = np.random.default_rng(0).standard_normal((8, 3, 2)) * np.linspace(0, 5, 8)[:, None, None]
TOLERANCES = dict(rtol=1e-5, atol=1e-6)


def field(xp, t, y):
    return 3 * xp.sin(5 * t * y) - y / (0.02 + t)


def ours(t, y):
    return field(jnp, t.reshape(-1, 1, 1), y)


def theirs(y, start, end):
    solutions = [
        scipy.solve_ivp(lambda t, y: field(np, t, y), (start, end), row.ravel(), **TOLERANCES)
        for row in y
    ]
    return np.stack([s.y[:, -1].reshape(3, 2) for s in solutions]), np.array(
        [s.nfev for s in solutions]
    )


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.2999)])
def test_steps_and_solution_are_those_of_scipy(start, end):
    with jax.enable_x64(True):
        y, calls = ode.rk45(ours, jnp.asarray(Y), start, end, **TOLERANCES)
    expected, expected_calls = theirs(Y, start, end)
    np.testing.assert_array_equal(calls, expected_calls)
    np.testing.assert_allclose(y, expected, atol=1e-10)
    assert len(set(calls.tolist())) > 1  # rows take steps of their own


def test_a_row_does_not_know_the_others():
    with jax.enable_x64(True):
        solve = jax.jit(lambda y: ode.rk45(ours, y, 1.0, 0.0, **TOLERANCES))
        y, calls = solve(jnp.asarray(Y))
        for i in range(len(Y)):
            alone, alone_calls = solve(jnp.asarray(Y[i : i + 1]))
            np.testing.assert_allclose(alone[0], y[i], rtol=1e-13, atol=1e-15)
            assert alone_calls[0] == calls[i]


def test_on_eight_devices():
    solve = lambda params, y: dict(
        zip(("y", "calls"), ode.rk45(ours, y, 1.0, 0.0, **TOLERANCES), strict=True)
    )
    with jax.enable_x64(True):
        found = sharding.Parallel(sharding.make_mesh()).in_batches("batch_size", solve, 8)({}, Y)
    expected, expected_calls = theirs(Y, 1.0, 0.0)
    np.testing.assert_array_equal(found["calls"], expected_calls)
    np.testing.assert_allclose(found["y"], expected, atol=1e-10)


def test_what_cannot_be_solved_is_nan_and_ends():
    """1 / (1 - t) grows without bound; the row beside it is solved."""
    field = lambda t, y: jnp.stack([y[0] ** 2, -y[1], jnp.full(1, jnp.nan)])
    y, calls = ode.rk45(field, jnp.ones((3, 1)), 0.0, 2.0, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.isnan(y.ravel()), [True, False, True])
    np.testing.assert_allclose(y[1], np.exp(-2), rtol=1e-3)
    assert calls.max() < 1000


def test_a_field_of_zeros():
    y, calls = ode.rk45(lambda t, y: 0 * y, jnp.ones((1, 2)), 1.0, 0.0, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y, np.ones((1, 2)))
    assert (
        calls[0] == scipy.solve_ivp(lambda t, y: 0 * y, (1, 0), [1, 1], rtol=1e-5, atol=1e-5).nfev
    )
