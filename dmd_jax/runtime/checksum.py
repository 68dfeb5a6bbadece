"""Checksums of arrays, computed where they lie: a tree of any size costs one reading of memory."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np


def of(tree) -> str:
    """Returns the checksum of a tree of arrays: 16 hexadecimal digits.

    It follows from paths, types, shapes and bits alone, and not from how the arrays are spread over
    devices. It finds damage and tells results apart; it is no protection against forgery. All
    processes that have parts of the tree must call it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_sums(_integers(leaf)) for _, leaf in leaves])
    total = hashlib.sha256()
    for (path, leaf), values in zip(leaves, sums, strict=True):
        name = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}"
        total.update(name.encode() + np.stack(values).tobytes())
    return total.hexdigest()[:16]


def _integers(a):
    """The bits of a numpy array as integers; those of jax are read on the devices."""
    if isinstance(a, jax.Array):
        return a
    a = np.ascontiguousarray(a)
    return a.reshape(-1).view(f"u{min(a.dtype.itemsize, 4)}")


@jax.jit
def _sums(a):
    """Two sums modulo 2^32 over all bits, mixed with their places."""
    if a.dtype == bool:
        a = a.astype(jnp.uint8)
    if not jnp.issubdtype(a.dtype, jnp.unsignedinteger) or a.dtype.itemsize > 4:
        a = jax.lax.bitcast_convert_type(a, jnp.dtype(f"u{min(a.dtype.itemsize, 4)}"))
    bits = a.astype(jnp.uint32)
    places = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        places = places * np.uint32(size) + index
    first = _mixed(bits ^ _mixed(places + np.uint32(1)))
    second = _mixed(first + np.uint32(0x9E3779B9))
    return first.sum(dtype=jnp.uint32), second.sum(dtype=jnp.uint32)


def _mixed(h):
    """A permutation of 32 bits in which every bit counts (lowbias32 of hash-prospector)."""
    h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
    return h ^ (h >> 16)
