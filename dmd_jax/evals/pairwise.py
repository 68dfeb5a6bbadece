"""Applies a function to each row of one set and all rows of another, in float64 and in batches,
because the matrix of all pairs would not fit in memory.
"""

import functools
from collections.abc import Callable

import jax

from dmd_jax import sharding

ROWS = 512  # of a batch, on each device


def by_rows(function: Callable, whole, rows, parallel: sharding.Parallel):
    """Returns `function(whole, rows)`, computed over batches of `rows`.

    A batch of `rows` is split over the devices, and each device has all of `whole`. The metrics on
    features are small differences of large sums; in float64 the number of devices and the batches
    change them by less than 1e-9. Accelerators are slow in float64, but two thousand rows take a
    second even on two cores.

    Args:
      function: `(whole, rows [B, ...]) -> [B, ...]`, trees of arrays.
      whole: a tree of arrays.
      rows: a tree of arrays [N, ...].
      parallel: the devices.

    Returns:
      The results for all rows, [N, ...], numpy.
    """
    pieces = parallel.mesh.size * parallel.accumulation
    count = len(jax.tree.leaves(rows)[0])
    with jax.enable_x64(True):
        run = _in_batches(function, pieces * min(ROWS, -(-count // pieces)), parallel)
        return run(sharding.place(whole, parallel.replicated), rows)


@functools.lru_cache(32)  # without it every evaluation during training would compile again
def _in_batches(function, batch_size, parallel):
    return parallel.in_batches("rows", function, batch_size)
