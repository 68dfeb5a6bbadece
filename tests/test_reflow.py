"""Reflow between two Gaussians, from noise N(0, 1) to images N(MEAN, STD^2), in closed form.

The ODE of the first rectified flow is z -> MEAN + STD z. The straight flow of its pairs has the
velocity z - x at x_t = (1 - t) x + t z.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import process, samplers, sharding
from dmd_jax.recipes import distil, reflow

MEAN, STD = 1.5, 0.4
KNOTS = np.linspace(0, 1, 33)
Z = np.random.default_rng(0).standard_normal((512, 2, 2, 1), np.float32)
COND = np.zeros(len(Z), np.int32)


def network(params, x, noise, cond):
    """slope(t) x + offset(t), both linear between knots."""
    slope, offset = (jnp.interp(noise / 1000, KNOTS, params[name]) for name in ("slope", "offset"))
    return slope[:, None, None, None] * x + offset[:, None, None, None]


FLOW = denoiser_lib.Denoiser(network, process.RectifiedFlow(), denoiser_lib.flow)


def first_flow():
    """E[eps - x | x_t] for independent noise and images."""
    variance = KNOTS**2 + ((1 - KNOTS) * STD) ** 2
    slope = (KNOTS - (1 - KNOTS) * STD**2) / variance
    return {
        "slope": slope.astype(np.float32),
        "offset": (-MEAN - slope * (1 - KNOTS) * MEAN).astype(np.float32),
    }


def straight_flow():
    slope = (1 - STD) / (KNOTS + (1 - KNOTS) * STD)
    return {"slope": slope, "offset": -MEAN - slope * (1 - KNOTS) * MEAN}


def straightness(params):
    return float(samplers.straightness(FLOW, FLOW.process, num_steps=100)(params, Z, COND).mean())


def euler(params, num_steps):
    return samplers.euler(FLOW, FLOW.process, num_steps=num_steps).sample(params, Z, COND)


def train(recipe, params, num_steps, **settings):
    """On pairs of the ODE of `params`."""
    parallel = sharding.Parallel(sharding.make_mesh(1))
    optimizer = dict(learning_rate=0.05, warmup_steps=1, decay_steps=num_steps, weight_decay=0.0)
    made = recipe.make(
        FLOW, parallel, seed=0, null_cond=0, optimizer=optimizer, ema_decay=0.0, **settings
    )
    pairs = {"noise": Z, "image": np.asarray(euler(params, 1000)), "cond": COND}

    @jax.jit
    def run(state):
        return jax.lax.fori_loop(
            0, num_steps, lambda _, state: made.train_step(state, {"pairs": pairs})[0], state
        )

    return jax.device_get(run(made.init(params, made.others)).generator.params)


@pytest.fixture(scope="module")
def reflowed():
    return train(reflow, first_flow(), 1500)


def test_the_first_flow_is_curved_and_reaches_the_images():
    assert straightness(first_flow()) > 0.05
    np.testing.assert_allclose(euler(first_flow(), 200), MEAN + STD * Z, atol=0.02)
    assert np.abs(np.asarray(euler(first_flow(), 1)) - (MEAN + STD * Z)).max() > 0.5


def test_reflow_straightens(reflowed):
    assert straightness(reflowed) < 1e-3 * straightness(first_flow())
    middle = slice(1, -1)  # few of the times are near the ends
    expected = straight_flow()
    for name in expected:
        np.testing.assert_allclose(reflowed[name][middle], expected[name][middle], atol=0.03)


def test_one_step_of_the_straight_flow_is_its_ode(reflowed):
    ode = np.asarray(euler(first_flow(), 1000))
    assert np.abs(np.asarray(euler(reflowed, 1)) - ode).max() < 0.05
    assert np.abs(np.asarray(euler(reflowed, 1)) - np.asarray(euler(reflowed, 100))).max() < 0.03


def test_reflow_keeps_the_marginals(reflowed):
    """Of x_t at every time, not only of the images."""
    for t in (0.25, 0.5, 0.75):
        first, second = (integrate(params, t) for params in (first_flow(), reflowed))
        np.testing.assert_allclose(second.mean(), (1 - t) * MEAN, atol=0.06)  # 2,048 draws
        np.testing.assert_allclose(first.mean(), (1 - t) * MEAN, atol=0.06)
    np.testing.assert_allclose(
        [np.mean(euler(reflowed, 25)), np.std(euler(reflowed, 25))], [MEAN, STD], atol=0.04
    )


def integrate(params, t_end):
    x = np.asarray(Z, np.float64)
    times = np.linspace(1, t_end, 101)
    for t, s in itertools.pairwise(times):
        x = x + (s - t) * np.asarray(
            network(params, x.astype(np.float32), jnp.full(len(x), 1000 * t, jnp.float32), COND)
        )
    return x


def test_distillation_finds_the_same_one_step():
    distilled = train(distil, first_flow(), 300)
    one_step = samplers.one_step(FLOW, FLOW.process).sample(distilled, Z, COND)
    assert np.abs(np.asarray(one_step) - np.asarray(euler(first_flow(), 1000))).max() < 0.02
