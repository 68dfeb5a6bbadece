"""Fingerprints of parameters."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def of_params(params: Any) -> str:
    """Returns a fingerprint of parameters. All processes must call it."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.Array):
            has_all = leaf.is_fully_addressable or leaf.is_fully_replicated
            if not has_all:
                leaf = multihost_utils.process_allgather(leaf, tiled=True)
        total.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()[:16]
