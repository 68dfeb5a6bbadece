"""Which checkpoints stay."""

import jax.numpy as jnp
import numpy as np

from dmd_jax import state
from dmd_jax.runtime import checkpoint


def save(manager, step, **scores):
    net = state.Net(
        params={"w": jnp.full(4, step, jnp.float32)}, opt_state={}, ema=None, skipped=jnp.int32(0)
    )
    checkpoint.save(
        manager,
        state.TrainState(step=jnp.int32(step), generator=net),
        step,
        metrics=scores,
    )


def test_the_best_one_outlives_a_restart(tmp_path):
    """Also where a preempted run has left a checkpoint without scores."""
    with checkpoint.open_manager(tmp_path, keep=1, best="FID-64") as manager:
        for step, fid in ((10, 3.0), (20, 1.0), (30, 2.0)):
            save(manager, step, **{"FID-64": fid})
        save(manager, 33)
    assert checkpoint.all_steps(tmp_path) == [20, 33]
    with checkpoint.open_manager(tmp_path, keep=1, best="FID-64") as manager:
        for step, fid in ((40, 4.0), (50, 1.5)):
            save(manager, step, **{"FID-64": fid})
    assert checkpoint.all_steps(tmp_path) == [20, 50]
    abstract = {"w": np.zeros(4, np.float32)}
    np.testing.assert_array_equal(checkpoint.load_weights(tmp_path, abstract, 20)["w"], 20)
