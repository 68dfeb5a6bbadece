"""DMD where everything is known: eight Gaussians on a ring, whose exact denoiser is the teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import process, samplers, sharding
from dmd_jax.recipes import dmd

ANGLES = 2 * np.pi * np.arange(8) / 8
MODES = (0.7 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)).astype(
    np.float32
)  # a standard deviation of about 0.5
STD = 0.08
WIDTH = 64
PROCESS = process.EDM()


def exact(x_t, sigma):
    """E[x | x_t] for points x_t [B, 2] at noise sigma [B, 1]."""
    variance = STD**2 + sigma**2
    weights = jax.nn.softmax(x_t @ MODES.T / variance)  # all modes are equally far from 0
    return (STD**2 * x_t + sigma**2 * (weights @ MODES)) / variance


def network(params, x, noise, cond):
    """The output of the exact denoiser, plus a correction that starts at zero and is trained."""
    x, noise = x.reshape(-1, 2), noise[:, None]
    sigma = jnp.exp(4 * noise)
    norm = jnp.sqrt(sigma**2 + 0.25)
    x_t = norm * x
    output = (exact(x_t, sigma) - 0.25 / norm**2 * x_t) * norm / (0.5 * sigma)
    h = jnp.concatenate([x, noise, jnp.sin(4 * noise), jnp.cos(4 * noise)], axis=-1)
    for name in ("first", "second"):
        h = jax.nn.silu(h @ params[name]["kernel"] + params[name]["bias"][None])
    return (output + h @ params["last"]).reshape(-1, 1, 1, 2)


DENOISER = denoiser_lib.Denoiser(network, PROCESS)
GENERATE = samplers.one_step(DENOISER, PROCESS).sample


def teacher_params():
    rng = np.random.default_rng(0)

    def layer(n):
        kernel = rng.standard_normal((n, WIDTH)) * np.sqrt(2 / n)
        return {
            "kernel": kernel.astype(np.float32),
            "bias": rng.standard_normal(WIDTH).astype(np.float32),
        }

    return {"first": layer(5), "second": layer(WIDTH), "last": np.zeros((WIDTH, 2), np.float32)}


@pytest.fixture(scope="module")
def pairs():
    """Noise and where the teacher's ODE takes it."""
    noise = jax.random.normal(jax.random.key(1), (2048, 1, 1, 2))
    params = teacher_params()

    solve = jax.jit(samplers.heun(DENOISER, PROCESS, num_steps=40).sample)
    return {"noise": noise, "image": solve(params, noise, None), "cond": jnp.zeros(2048)}


def distil(pairs, *, regression_weight, num_steps=3000):
    """4096 samples of the generator's running mean."""
    schedule = dict(warmup_steps=50, decay_steps=num_steps, beta1=0.5)
    recipe = dmd.make(
        DENOISER,
        sharding.Parallel(sharding.make_mesh(1)),
        seed=0,
        null_cond=0,
        optimizer=dict(learning_rate=2e-3, **schedule),
        fake_score_optimizer=dict(learning_rate=4e-3, **schedule),
        ema_decay=0.99,
        matching_weight=1.0,
        regression_weight=regression_weight,
        guidance_scale=1.0,
        matching_levels=(20, 980),
        fake_score_levels=(0, 999),
    )

    def step(state, i):
        chosen = jax.random.randint(jax.random.fold_in(jax.random.key(2), i), (64,), 0, 2048)
        batch = {
            "fresh": {"cond": jnp.zeros(256)},
            "pairs": jax.tree.map(lambda a: a[chosen], pairs),
        }
        return recipe.train_step(state, batch)

    @jax.jit
    def train(params):
        state, _ = jax.lax.scan(step, recipe.init(params, recipe.others), jnp.arange(num_steps))
        return GENERATE(
            state.generator.ema,
            jax.random.normal(jax.random.key(3), (4096, 1, 1, 2)),
            jnp.zeros(4096),
        )

    return np.asarray(train(teacher_params())).reshape(-1, 2)


def assert_covers_the_ring(x, *, share):
    """Asserts that each mode has about an eighth of the samples `x` [N, 2].

    A part `share` of them has to be within three standard deviations of a mode.
    """
    distances = np.linalg.norm(x[:, None] - MODES[None], axis=-1)
    fractions = np.bincount(distances.argmin(axis=1), minlength=8) / len(x)
    assert fractions.min() > 0.09 and fractions.max() < 0.17, fractions
    assert (distances.min(axis=1) < 3 * STD).mean() > share
    assert np.quantile(np.linalg.norm(x, axis=1), 0.99) < 1  # the ring's radius is 0.7


def test_the_teacher_covers_the_ring(pairs):
    assert_covers_the_ring(np.reshape(pairs["image"], (-1, 2)), share=0.98)


def test_the_start_is_poor():
    x = GENERATE(teacher_params(), jax.random.normal(jax.random.key(0), (512, 1, 1, 2)), None)
    assert np.linalg.norm(x.reshape(-1, 2), axis=1).max() < 0.1  # all in the middle of the ring


@pytest.mark.parametrize("regression_weight", [0.25, 0.0])
def test_dmd_covers_all_modes_evenly(pairs, regression_weight):
    assert_covers_the_ring(distil(pairs, regression_weight=regression_weight), share=0.75)
