import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dmd_jax import sharding

RNG = np.random.default_rng(0)
PARAMS = {
    "w": RNG.standard_normal((512, 4), dtype=np.float32) / 16,
    "b": RNG.standard_normal((1, 4), dtype=np.float32),
}  # w is split
BATCH = {
    "x": RNG.standard_normal((16, 512), dtype=np.float32),
    "y": RNG.standard_normal((16, 4), dtype=np.float32),
}


def parallel(data, fsdp=1, accumulation=1):
    return sharding.Parallel(sharding.make_mesh(data, fsdp), accumulation)


def gradient(params, scale, batch):
    def loss(params):
        return scale * jnp.mean(
            (jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]) ** 2
        )

    value, grads = jax.value_and_grad(loss)(params)
    return grads, {"loss": value}


@pytest.mark.parametrize(
    ("data", "fsdp", "accumulation"),
    [(1, 1, 1), (8, 1, 1), (2, 4, 1), (1, 1, 2), (4, 2, 2), (1, 1, 16)],
)
def test_gradient_does_not_depend_on_the_mesh(data, fsdp, accumulation):
    spread = parallel(data, fsdp, accumulation)
    grads, metrics = jax.jit(spread.gradients(gradient))(PARAMS, jnp.float32(3), BATCH)
    chex.assert_trees_all_close((grads, metrics), gradient(PARAMS, 3, BATCH), rtol=1e-5, atol=1e-6)
    assert jax.tree.map(lambda a: a.sharding.spec, grads) == jax.tree.map(
        lambda s: s.spec, spread.state_shardings(grads)
    )


def test_parameters_are_gathered_in_their_precision_and_gradients_scattered_in_float32():
    """Of the parameters that are split: of each device's share, not of all of it."""
    spread = parallel(2, 4)

    def step(params, batch):
        half = {"w": params["w"].astype(jnp.bfloat16), "b": params["b"]}
        return spread.gradients(gradient)(half, jnp.float32(1), batch)

    placed = sharding.place(PARAMS, spread.state_shardings(PARAMS))
    text = jax.jit(step).lower(placed, BATCH).as_text()
    assert '"stablehlo.all_gather"' in text and "(tensor<128x4xbf16>) -> tensor<512x4xbf16>" in text
    assert (
        '"stablehlo.reduce_scatter"' in text and "(tensor<512x4xf32>) -> tensor<128x4xf32>" in text
    )
    assert "(tensor<128x4xf32>) -> tensor<128x4xf32>" in text  # all_reduce over data


def test_pieces_are_worked_off_one_after_another():
    shapes = []

    def record(params, scale, batch):
        shapes.append(batch["x"].shape)
        return gradient(params, scale, batch)

    jax.eval_shape(parallel(2, 2, 2).gradients(record), PARAMS, jnp.float32(1), BATCH)
    assert set(shapes) == {(2, 512)}


def test_map_keeps_the_order():
    double = jax.jit(parallel(4, 2).map(lambda params, batch: params["b"] * batch["y"]))
    result = double(PARAMS, BATCH)
    np.testing.assert_array_equal(result, PARAMS["b"] * BATCH["y"])
    assert {shard.data.shape for shard in result.addressable_shards} == {(2, 4)}


def test_random_arrays_are_the_same_on_every_mesh_and_split():
    def draw(parallel):
        return jax.jit(lambda: parallel.split(jax.random.normal(jax.random.key(0), (16, 3))))()

    one, eight = draw(parallel(1)), draw(parallel(2, 4))
    np.testing.assert_array_equal(one, eight)
    assert {shard.data.shape for shard in eight.addressable_shards} == {(2, 3)}


def test_state_shardings():
    shapes = {
        "conv": (3, 3, 64, 128),
        "tall": (256, 6),
        "small": (4, 4),
        "odd": (7, 331),
        "scalar": (),
        "bias": (1024,),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = jax.tree.map(lambda s: s.spec, parallel(2, 4).state_shardings(tree))
    split = {"conv": P(None, None, None, "fsdp"), "tall": P("fsdp"), "bias": P("fsdp")}
    assert specs == {"small": P(), "odd": P(), "scalar": P(), **split}
    assert set(
        jax.tree.leaves(jax.tree.map(lambda s: s.spec, parallel(8).state_shardings(tree)))
    ) == {P()}


@pytest.mark.parametrize(
    ("data", "accumulation", "batch_size", "message"),
    [
        (8, 1, 100, "batch_size 100 is not divisible by 8 devices; use 96 or 104."),
        (8, 1, 5, "batch_size 5 is not divisible by 8 devices; use 8."),
        (
            4,
            2,
            12,
            "batch_size 12 is not divisible by 4 devices x 2 accumulation steps; use 8 or 16.",
        ),
    ],
)
def test_batches_that_cannot_be_split(data, accumulation, batch_size, message):
    with pytest.raises(ValueError) as error:
        parallel(data, 1, accumulation).check_batch("batch_size", batch_size)
    assert str(error.value) == message


def test_batches_that_can_be_split():
    parallel(2, 4, accumulation=2).check_batch("batch_size", 32)


def test_split_refuses_a_batch_that_cannot_be_split():
    with pytest.raises(ValueError, match=r"^batch_size 12 is not divisible by 8 devices; use 8"):
        parallel(8, 1, 1).split({"even": np.zeros(16), "odd": np.zeros(12)})


def test_make_mesh():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(sharding.make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    assert dict(sharding.make_mesh(data=3).shape) == {"data": 3, "fsdp": 1}


@pytest.mark.parametrize(("data", "fsdp", "needed"), [(4, 4, "16"), (9, 1, "9"), (-1, 16, ".*")])
def test_make_mesh_with_too_many_devices(data, fsdp, needed):
    with pytest.raises(ValueError, match=f"needs {needed} devices, but there are 8"):
        sharding.make_mesh(data, fsdp)


def test_no_device_is_idle_in_silence():
    with pytest.raises(ValueError, match=r"mesh.fsdp is 3, which leaves 2 of 8 devices idle"):
        sharding.make_mesh(-1, 3)
    assert sharding.make_mesh(2, 3).size == 6  # as it is asked for
