"""The convolutions and matrix products of a program, from its jaxpr, and the operations that they take.

    matrix product: 2 x outputs x terms of each sum;    convolution: the same, without the terms that are padding or holes

A loop's body counts as often as it runs, unlike in XLA's own `cost_analysis`. Shapes inside of `shard_map` are those of one device.
"""

import collections
import math
from collections.abc import Callable

import jax
import numpy as np


def trips(eqn) -> int:
    """How often the inner program of an equation runs."""
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def once(eqn) -> int:
    """As if every loop ran once, which is how XLA counts."""
    del eqn
    return 1


def products(jaxpr, times: Callable = trips) -> collections.Counter:
    """How often a program runs each convolution and matrix product.

    Args:
      jaxpr: the program.
      times: `equation -> int`, how often to count what is inside it.

    Returns:
      {(primitive, shapes, parameters): count}.
    """
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
            avals = tuple((v.aval.shape, str(v.aval.dtype)) for v in eqn.invars)
            found[eqn.primitive, avals, tuple(sorted(eqn.params.items(), key=str))] += 1
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                inner, n = products(value, times), times(eqn)
                found.update({product: n * count for product, count in inner.items()})
    return found


def total(found: collections.Counter) -> int:
    """Operations of `products`; an addition and a multiplication are two."""
    return sum(
        count * _flops(primitive.name, [shape for shape, _ in avals], dict(params))
        for (primitive, avals, params), count in found.items()
    )


def of_program(traced: jax.stages.Traced, compiled: jax.stages.Compiled) -> float:
    """Operations of a program on each device, as its compiler counts them, with those of loops as often as they run; where it does not
    say, those of `products`."""
    counted, once_each = (total(products(traced.jaxpr.jaxpr, times)) for times in (trips, once))
    cost = compiled.cost_analysis() or {}
    return cost["flops"] + counted - once_each if "flops" in cost else counted


def _flops(name, shapes, params):
    left, right = shapes
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        shared = math.prod(left[i] for i in (*contracted, *batch))
        return 2 * math.prod(left) * math.prod(right) // shared
    numbers = params["dimension_numbers"]
    rows = left[numbers.lhs_spec[0]] // params["batch_group_count"]
    channels = right[numbers.rhs_spec[0]] * right[numbers.rhs_spec[1]]
    sizes = zip(
        (left[i] for i in numbers.lhs_spec[2:]),
        (right[i] for i in numbers.rhs_spec[2:]),
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    return 2 * rows * channels * math.prod(_terms(*axis) for axis in sizes)


def _terms(size, kernel, stride, padding, hole, spread):
    """Pairs of an output and an element of the kernel that meet an input, along one axis."""
    padded, reach = (size - 1) * hole + 1 + sum(padding), (kernel - 1) * spread + 1
    outputs = np.arange((padded - reach) // stride + 1)
    at = outputs[:, None] * stride + np.arange(kernel)[None, :] * spread - padding[0]
    return int(((at >= 0) & (at <= (size - 1) * hole) & (at % hole == 0)).sum())
