"""What a program computes, counted from its jaxpr, is what XLA counts."""

import jax
import jax.numpy as jnp
import pytest

from dmd_jax.runtime import flops


def test_products_are_counted_with_their_repetitions():
    def program(x, kernel):
        x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=3)[0]
        return (
            jax.jit(lambda x: jax.lax.conv(x[None, None], kernel, (1, 1), "SAME"))(x)
            + (x @ x)[None, None]
        )

    jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 4)), jnp.ones((1, 1, 3, 3))).jaxpr
    counts = lambda times: sorted(
        (p.name, n) for (p, *_), n in flops.products(jaxpr, times).items()
    )
    assert counts(flops.trips) == [("conv_general_dilated", 1), ("dot_general", 4)]
    assert counts(flops.once) == [("conv_general_dilated", 1), ("dot_general", 2)]
    # 3x3 on 4x4, padding left out: (3 * 4 - 2)^2 terms
    assert flops.total(flops.products(jaxpr)) == 2 * (4 * 64 + 100)


def conv(strides=(1, 1), padding="SAME", groups=1, **settings):
    def function(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            dimension_numbers=numbers,
            feature_group_count=groups,
            **settings,
        )

    return function, ((2, 9, 8, 4), (3, 3, 4 // groups, 8))


PROGRAMS = {
    "product": (lambda x, y: x @ y, ((5, 6), (6, 7))),
    "batched": (lambda x, y: jnp.einsum("bihd,bjhd->bhij", x, y), ((2, 3, 4, 5), (2, 7, 4, 5))),
    "same": conv(),
    "strided": conv(strides=(2, 2)),
    "valid": conv(padding="VALID"),
    "one side": conv(padding=((0, 1), (2, 0))),
    "groups": conv(groups=2),
    "holes": conv(padding=((1, 2), (0, 1)), lhs_dilation=(2, 2)),
    "spread": conv(rhs_dilation=(2, 1)),
}


@pytest.mark.parametrize("gradient", [None, 0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_operations_are_those_of_xla(name, gradient):
    function, shapes = PROGRAMS[name]
    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    output = jax.eval_shape(function, x, y)
    program, arrays = {
        None: (function, (x, y)),
        0: (lambda y, g: jax.linear_transpose(lambda x: function(x, y), x)(g), (y, output)),
        1: (lambda x, g: jax.linear_transpose(lambda y: function(x, y), y)(g), (x, output)),
    }[gradient]
    traced = jax.jit(program).trace(*arrays)
    assert (
        flops.total(flops.products(traced.jaxpr.jaxpr))
        == traced.lower().compile().cost_analysis()["flops"]
    )
