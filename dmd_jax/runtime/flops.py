"""Counts the convolutions and matrix products in a program's jaxpr, and their operations.

    matrix product: 2 x outputs x terms of each sum
    convolution: the same, without the terms that are padding or holes

A loop's body counts as often as it runs, unlike in XLA's own `cost_analysis`. Shapes inside
`shard_map` are those of one device.
"""

import collections
import math
from collections.abc import Callable

import jax
import numpy as np


def trips(eqn) -> int:
    """Returns how often the inner program of an equation runs."""
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def once(eqn) -> int:
    """Returns 1, as if every loop ran once, which is how XLA counts."""
    del eqn
    return 1


def products(jaxpr, times: Callable = trips) -> collections.Counter:
    """Counts how often a program runs each convolution and matrix product.

    Args:
      jaxpr: the program.
      times: `equation -> int`, how often its inner program is counted.

    Returns:
      {(primitive, shapes, parameters): count}.
    """
    counts = collections.Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
            avals = tuple((v.aval.shape, str(v.aval.dtype)) for v in eqn.invars)
            counts[eqn.primitive, avals, tuple(sorted(eqn.params.items(), key=str))] += 1
        for inner in _inner_programs(eqn):
            n = times(eqn)
            inner_counts = products(inner, times)
            counts.update({product: n * count for product, count in inner_counts.items()})
    return counts


def _inner_programs(eqn):
    def is_program(value):
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
        program = getattr(value, "jaxpr", value)
        if hasattr(program, "eqns"):
            yield program


def total(counts: collections.Counter) -> int:
    """Returns the operations of `products`; an addition and a multiplication are two."""
    return sum(
        count * _flops(primitive.name, [shape for shape, _ in avals], dict(params))
        for (primitive, avals, params), count in counts.items()
    )


def of_program(traced: jax.stages.Traced, compiled: jax.stages.Compiled) -> float:
    """Returns the operations of a program on each device.

    It is the compiler's count, corrected for loops; if the compiler has none, that of `products`.
    """
    operations = total(products(traced.jaxpr.jaxpr, trips))
    operations_once = total(products(traced.jaxpr.jaxpr, once))
    cost = compiled.cost_analysis() or {}
    if "flops" not in cost:
        return operations
    return cost["flops"] + operations - operations_once


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
    """Counts the pairs of an output and a kernel element that meet an input, along one axis."""
    length = (size - 1) * hole + 1
    padded_length = length + sum(padding)
    reach = (kernel - 1) * spread + 1
    outputs = np.arange((padded_length - reach) // stride + 1)
    position = outputs[:, None] * stride + np.arange(kernel)[None, :] * spread - padding[0]
    return int(((position >= 0) & (position < length) & (position % hole == 0)).sum())
