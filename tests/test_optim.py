import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmd_jax import optim, state

PARAMS = {
    "conv": {"kernel": np.float32([[3.0, -2.0]]), "bias": np.float32([5.0])},
    "norm": {"scale": np.float32([1.0])},
}
GRADS = jax.tree.map(lambda p: 0.1 * p, PARAMS)


def test_weight_decay_shrinks_biases_and_norms_too():
    tx = optim.adamw(learning_rate=0.1, warmup_steps=0)
    net, _ = optim.apply_gradients(
        state.create(PARAMS, tx, ema=False), jax.tree.map(jnp.zeros_like, PARAMS), tx
    )
    chex.assert_trees_all_close(
        net.params, jax.tree.map(lambda p: p * (1 - 0.1 * 0.01), PARAMS), rtol=1e-6
    )


def test_first_step_is_adams():
    tx = optim.adamw(learning_rate=0.1, warmup_steps=0, weight_decay=0)
    net, _ = optim.apply_gradients(state.create(PARAMS, tx, ema=False), GRADS, tx)
    chex.assert_trees_all_close(
        net.params, jax.tree.map(lambda p, g: p - 0.1 * np.sign(g), PARAMS, GRADS), rtol=1e-5
    )


@pytest.mark.parametrize(("size", "clipped"), [(5.0, 5.0), (10.0, 10.0), (1000.0, 10.0)])
def test_gradients_are_clipped_at_a_norm_of_10(size, clipped):
    grads = jax.tree.map(lambda g: g * size / optax.tree.norm(GRADS), GRADS)
    tx = optim.adamw(learning_rate=0.1, warmup_steps=0)
    net, norm = optim.apply_gradients(state.create(PARAMS, tx, ema=False), grads, tx)
    moment = optax.tree.get(net.opt_state, "mu")
    np.testing.assert_allclose(norm, size, rtol=1e-5)  # what is reported is not clipped
    np.testing.assert_allclose(optax.tree.norm(moment), 0.1 * clipped, rtol=1e-5)


def learning_rates(num_steps, **settings):
    """Adam's update has the size of the learning rate when the gradient never changes."""
    tx = optim.adamw(learning_rate=0.5, weight_decay=0, **settings)
    param = jnp.ones(())
    opt_state = tx.init(param)

    def step(opt_state, _):
        updates, opt_state = tx.update(jnp.ones(()), opt_state, param)
        return opt_state, -updates

    return jax.lax.scan(step, opt_state, length=num_steps)[1]


@pytest.mark.parametrize("decay", [{}, {"decay_steps": 1000}])
def test_no_warmup(decay):
    np.testing.assert_allclose(learning_rates(2, warmup_steps=0, **decay), [0.5, 0.5], rtol=1e-4)


def test_warmup_then_constant():
    np.testing.assert_allclose(
        learning_rates(8, warmup_steps=4), [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5], rtol=1e-4
    )


def test_warmup_then_cosine():
    expected = [0, 0.25, *(0.25 * (1 + np.cos(np.pi * np.arange(9) / 8)))]
    np.testing.assert_allclose(
        learning_rates(11, warmup_steps=2, decay_steps=10), expected, rtol=1e-4, atol=1e-6
    )


def test_running_mean():
    tx = optim.adamw(learning_rate=0.1, warmup_steps=0)
    net, _ = optim.apply_gradients(state.create(PARAMS, tx, ema=True), GRADS, tx, ema_decay=0.9)
    chex.assert_trees_all_close(
        net.ema, jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, PARAMS, net.params), rtol=1e-6
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad):
    tx = optim.adamw(learning_rate=0.1, warmup_steps=0)
    update = jax.jit(lambda net, grads: optim.apply_gradients(net, grads, tx, ema_decay=0.9))
    before, _ = update(state.create(PARAMS, tx, ema=True), GRADS)
    after, norm = update(before, {**GRADS, "norm": {"scale": np.float32([bad])}})
    assert not np.isfinite(norm)
    assert (before.skipped, after.skipped) == (0, 1)
    chex.assert_trees_all_equal(after.replace(skipped=before.skipped), before)
    recovered, _ = update(after, GRADS)
    chex.assert_trees_all_equal(recovered.replace(skipped=before.skipped), update(before, GRADS)[0])


def test_a_new_network_has_buffers_of_its_own():
    params = jax.tree.map(jnp.asarray, PARAMS)
    net = state.create(params, optim.adamw(learning_rate=0.1, warmup_steps=0), ema=True)
    jax.tree.map(lambda a: a.delete(), net)
    chex.assert_trees_all_equal(params, PARAMS)


def test_frequencies_are_not_trained():
    params = {"map_noise": {"freqs": jnp.ones(3)}, "map_layer0": {"bias": jnp.ones(3)}}
    tx = optim.adamw(learning_rate=0.1, warmup_steps=0, weight_decay=0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert not np.any(updates["map_noise"]["freqs"]) and np.all(updates["map_layer0"]["bias"])


def test_a_running_mean_warms_up_as_that_of_rectified_flows():
    found = [float(optim.warmed_up(0.9999, 10, jnp.int32(n))) for n in (0, 1, 90, 10**7)]
    np.testing.assert_allclose(found, [1 / 10, 2 / 11, 91 / 100, 0.9999], rtol=1e-6)
    assert [float(optim.warmed_up(0.9, 0, jnp.int32(n))) for n in (0, 7)] == [np.float32(0.9)] * 2
