"""What the benchmarks share: how time and memory are told."""

import functools
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dmd_jax.runtime import flops


def seconds_alone(recipe, state, batch) -> float:
    """The time of the step's convolutions and matrix products, each as a program of its own."""
    total = 0.0
    for (primitive, avals, params), count in flops.products(
        jax.make_jaxpr(recipe.train_step)(state, batch).jaxpr
    ).items():
        arrays = [jnp.ones(shape, dtype) for shape, dtype in avals]
        program = (
            jax.jit(functools.partial(primitive.bind, **dict(params))).lower(*arrays).compile()
        )
        total += count * min(
            timed(lambda p=program, a=arrays: jax.block_until_ready(p(*a)))[0] for _ in range(3)
        )
    return total


def timed(function: Callable) -> tuple:
    """Seconds that a call takes, and its result."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def in_turn(functions: Sequence[Callable], repeats: int) -> list[list[float]]:
    """Seconds of the calls of each function, one function after another, `repeats` times; what is slow for a while is so for all."""
    rows = [[timed(function)[0] for function in functions] for _ in range(repeats)]
    return [list(column) for column in zip(*rows, strict=True)]


def median_seconds(function: Callable, repeats: int) -> float:
    """Of `repeats` calls; what compiles has been called before."""
    return statistics.median(in_turn([function], repeats)[0])


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def devices() -> str:
    """What the benchmark runs on."""
    return f"device: {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"


def peak_memory() -> str:
    """Of the device, or of the process where the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return f"{stats.get('peak_bytes_in_use', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30:.1f} GiB"
