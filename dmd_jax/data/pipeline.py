"""Moves batches from sources to the devices.

Their order is a function of (seed, name of the stream, step), so the step alone is the position in
the data, and streams of one length are shuffled differently.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import grain
import jax
import numpy as np

from dmd_jax import data, rng


class Stream(NamedTuple):
    """A source and the number of its items in a global batch.

    Attributes:
      source: the source.
      batch_size: items of a batch, over all devices and processes.
    """

    source: data.Source
    batch_size: int


def batches(
    streams: dict[str, Stream], *, seed: int, start: int, sharding: jax.sharding.Sharding
) -> Iterator[dict]:
    """Yields global batches without end, from step `start` on.

    A batch is {name of the stream: tree of arrays [batch_size, ...]}, split as `sharding` says. The
    batch of a step is the same for any number of processes; each process reads its own rows.
    """
    iterators = {
        name: _local_batches(stream, rng.seed(seed, name), start)
        for name, stream in streams.items()
    }
    while True:
        local = {name: next(iterator) for name, iterator in iterators.items()}
        yield jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), local)


def fingerprint(streams: dict[str, Stream], *, seed: int) -> str:
    """Returns a digest of what the batches depend on: seed, sizes, and a sample of each source."""
    digest = hashlib.sha256(str(seed).encode())
    for name, (source, batch_size) in sorted(streams.items()):
        rows = [source[i] for i in np.linspace(0, len(source) - 1, 16).astype(int)]
        digest.update(f"{name} {batch_size} {len(source)}".encode())
        digest.update(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(rows)))
    return digest.hexdigest()[:16]


def _local_batches(stream, seed, start):
    processes = jax.process_count()
    process = jax.process_index()
    dataset = grain.MapDataset.source(stream.source).seed(seed).shuffle().repeat(None)
    dataset = dataset.batch(stream.batch_size // processes, drop_remainder=True)
    dataset = dataset[process + start * processes :: processes]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
