"""Something of every row of one set against all rows of another, in float64 on all devices; all
pairs at once fit into no memory.
"""

import functools
from collections.abc import Callable

import jax

from dmd_jax import sharding

ROWS = 512  # at a time on each device


def by_rows(function: Callable, whole, rows, parallel: sharding.Parallel):
    """`function(whole, rows)`, where `rows` is worked off in batches over the devices and each of
    them has all of `whole`.

    Float64, since the metrics on features are small differences of large sums: then the devices'
    number and the batches change nothing within 1e-9. Accelerators do that slowly, but two thousand
    rows are a second even on two cores.

    Args:
      function: `(whole, rows [B, ...]) -> [B, ...]`, trees of arrays.
      whole: a tree of arrays.
      rows: a tree of arrays [N, ...].
      parallel: the devices.

    Returns:
      What the function does for all rows, [N, ...], numpy.
    """
    pieces = parallel.mesh.size * parallel.accumulation
    count = len(jax.tree.leaves(rows)[0])
    with jax.enable_x64(True):
        run = _in_batches(function, pieces * min(ROWS, -(-count // pieces)), parallel)
        return run(sharding.place(whole, parallel.replicated), rows)


@functools.lru_cache(32)  # or every evaluation during training would compile it again
def _in_batches(function, batch_size, parallel):
    return parallel.in_batches("rows", function, batch_size)
