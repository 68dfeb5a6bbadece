import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dmd_jax import sharding
from dmd_jax.models import layers

PARAMS = {"enc": {"conv": {"kernel": 0, "bias": 0}, "norm": {"scale": 0}}, "out": {"kernel": 0}}


def test_first_match_wins():
    assigned = layers.assign(
        ((r"norm", "n"), (r"^out\.", "o"), (r"kernel$", "k"), (r"", "rest")), PARAMS
    )
    assert assigned == {
        "enc": {"conv": {"kernel": "k", "bias": "rest"}, "norm": {"scale": "n"}},
        "out": {"kernel": "o"},
    }


def test_parameters_that_no_rule_matches_are_listed():
    with pytest.raises(
        ValueError, match=r"no rule matches: \['enc\.conv\.bias', 'enc\.norm\.scale'\]"
    ):
        layers.assign(((r"kernel$", 1),), PARAMS)


def test_rules_that_match_nothing_are_listed():
    with pytest.raises(ValueError, match=r"match no parameter: \['decoder', 'lora'\]"):
        layers.assign(((r"decoder", 1), (r"", 2), (r"lora", 3)), PARAMS)


def test_a_rule_in_the_shadow_of_another_is_no_error():
    assert layers.assign(((r"", 1), (r"kernel$", 2)), PARAMS)["out"] == {"kernel": 1}


exact_gelu = functools.partial(jax.nn.gelu, approximate=False)


def slope(function):
    return jax.vmap(jax.grad(function))


def curvature(function):
    return jax.vmap(jax.grad(jax.grad(function)))


def jvp(function):
    return lambda x: jax.jvp(function, (x,), (2 * jnp.ones_like(x),))[1]


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, slope, jvp, curvature])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_gelu_is_that_of_jax(transform, dtype, tolerance):
    x = jnp.linspace(-8, 8, 1001).astype(dtype)
    y = transform(layers.gelu)(x)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(
        np.float32(y), np.float32(transform(exact_gelu)(x)), rtol=tolerance, atol=tolerance
    )


def test_gelu_keeps_its_precision_far_below_zero():
    x = jnp.array([-4.0, -8.0, -12.0])
    np.testing.assert_allclose(layers.gelu(x), exact_gelu(x), rtol=1e-6)


def test_gelu_is_differentiable_in_a_shard_map():
    # jax 0.12: "Primitive polynomial requires varying manual axes to match", of jax.nn.gelu
    x = jnp.linspace(-3, 3, 16)
    mesh = sharding.make_mesh(data=4, fsdp=2)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(sharding.AXES), out_specs=P(sharding.AXES)
    )
    def gradient(x):
        return jax.grad(lambda x: layers.gelu(x).sum())(x)

    np.testing.assert_allclose(jax.jit(gradient)(x), slope(layers.gelu)(x), rtol=1e-6)
