"""Which checkpoints stay."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import state
from dmd_jax.runtime import checkpoint, checksum


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


def saved(directory, *steps):
    """Checkpoints at these steps, and the shapes of their states."""
    rng = np.random.default_rng(0)
    with checkpoint.open_manager(directory, keep=9) as manager:
        for step in steps:
            params = {f"w{i}": rng.standard_normal((64, 32), np.float32) for i in range(3)}
            params = jax.tree.map(jnp.asarray, params)
            net = state.Net(params=params, opt_state={}, ema=None, skipped=jnp.int32(0))
            whole = state.TrainState(step=jnp.int32(step), generator=net)
            checkpoint.save(manager, whole, step, metrics={})
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), whole
    )


def restore(directory, abstract):
    with checkpoint.open_manager(directory, keep=9) as manager:
        return checkpoint.restore(manager, abstract)


def files(directory, step):
    return [p for p in (directory / f"checkpoints/{step}").rglob("*") if p.is_file()]


def largest(directory, step):
    return max(files(directory, step), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "zero", "truncate", "remove"])
def test_damage_anywhere_in_the_arrays_is_noticed(tmp_path, damage):
    abstract = saved(tmp_path, 1, 2)
    path = largest(tmp_path, 2)
    data = bytearray(path.read_bytes())
    if damage == "flip":  # which TensorStore does not notice
        data[len(data) // 2] ^= 4
    path.write_bytes({"zero": bytes(len(data)), "truncate": data[:99]}.get(damage, data))
    if damage == "remove":
        path.unlink()
    with pytest.raises(ValueError, match=r"checkpoint 2 in .* is damaged or of another network"):
        checkpoint.load_weights(tmp_path, abstract.generator.params)
    assert restore(tmp_path, abstract).step == 1
    assert (tmp_path / "unreadable_2").exists() and checkpoint.all_steps(tmp_path) == [1]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_read_that_fails_is_no_damage(tmp_path, monkeypatch, number):
    abstract = saved(tmp_path, 1, 2)
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            OSError, match=r"checkpoint 2 in .* cannot be read .*not known to be damaged, and stays"
        ),
    ):

        def failing(*args, **kwargs):
            raise OSError(number, "the machine is at fault")

        patch.setattr(checkpoint.ocp.CheckpointManager, "restore", failing)
        restore(tmp_path, abstract)
    assert checkpoint.all_steps(tmp_path) == [1, 2] and restore(tmp_path, abstract).step == 2


def test_a_step_that_is_damaged_a_second_time_gets_another_name(tmp_path):
    for _ in range(3):
        abstract = saved(
            tmp_path, *(step for step in (1, 2) if step not in checkpoint.all_steps(tmp_path))
        )
        largest(tmp_path, 2).write_bytes(b"")
        assert restore(tmp_path, abstract).step == 1
    assert {path.name for path in tmp_path.glob("unreadable*")} == {
        "unreadable_2",
        "unreadable_2_2",
        "unreadable_2_3",
    }


def test_a_score_that_is_no_number_is_the_worst(tmp_path):
    with checkpoint.open_manager(tmp_path, keep=1, best="FID") as manager:
        for step, fid in ((10, 3.0), (20, 1.0), (30, np.nan), (40, 2.0), (50, 2.5)):
            save(manager, step, FID=fid)
    assert checkpoint.all_steps(tmp_path) == [20, 50]


def test_the_checksum_is_of_bits_and_not_of_devices():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    tree = {"a": np.arange(96, dtype=np.float32).reshape(8, 12), "b": np.int32(3)}
    split = jax.device_put(
        tree["a"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "data"))
    )
    expected = checksum.of(tree)
    assert (
        expected == checksum.of(tree | {"a": split}) == checksum.of(jax.tree.map(jnp.asarray, tree))
    )
    others = [tree["a"][::-1], tree["a"].reshape(12, 8), -tree["a"], np.nextafter(tree["a"], 9)]
    assert len({expected, *(checksum.of(tree | {"a": a}) for a in others)}) == 5
