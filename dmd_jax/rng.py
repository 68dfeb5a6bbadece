"""Random numbers by name: each use has a name, and unlike names have independent numbers.

So nobody has to know who else draws.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable

import jax


def seed(base: int, *names: str) -> int:
    """Returns the seed, below 2^32, of one use in a run whose seed is `base`."""
    digest = hashlib.sha256(json.dumps([base, *names]).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def keys(key: jax.Array, names: Iterable[str]) -> dict[str, jax.Array]:
    """Returns a key for each name; it does not depend on the other names.

    `key` itself is not to be used for anything else.
    """
    return {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in names}
