"""Pairs of noise and the image that the teacher's ODE makes of it: ArrayRecord shards and a manifest.

A record is the bytes of its arrays one after another, in the order of the manifest's "features". The manifest also holds what made the
pairs: "teacher" (a fingerprint of its parameters), "sampler", "count" and "shard_size".
"""

import json
import math
import os
import pathlib

import numpy as np
from array_record.python import array_record_module
from grain import sources

from dmd_jax import metrics

MANIFEST = "manifest.json"


def shard_paths(directory: str | os.PathLike, manifest: dict) -> list[pathlib.Path]:
    """Every shard that `manifest` asks for."""
    n = math.ceil(manifest["count"] / manifest["shard_size"])
    return [pathlib.Path(directory) / f"pairs-{i:05d}-of-{n:05d}.arrayrecord" for i in range(n)]


def write_shard(path: pathlib.Path, arrays: dict[str, np.ndarray]):
    """Writes arrays of equal length as one shard; a shard that exists is whole."""
    partial = path.with_suffix(".partial")
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
    for row in zip(*arrays.values(), strict=True):
        writer.write(b"".join(np.ascontiguousarray(a).tobytes() for a in row))
    writer.close()
    partial.rename(path)


def read_manifest(directory: str | os.PathLike) -> dict:
    """Raises ValueError if there are no pairs, or the manifest is damaged."""
    path = pathlib.Path(directory) / MANIFEST
    if not path.exists():
        raise ValueError(f"no pairs in {directory}: {path} does not exist; run the stage that makes them first.")
    return metrics.read_json(path)


class Pairs:
    """A source of {"noise": [H, W, C], "image": [H, W, C], "cond": ...}."""

    def __init__(self, directory: str):
        self.directory = str(directory)
        self.manifest = read_manifest(directory)
        paths = shard_paths(directory, self.manifest)
        for path in paths:
            _check_shard(path)
        self._records = sources.ArrayRecordDataSource([str(path) for path in paths])
        if len(self) != self.manifest["count"]:
            raise ValueError(
                f"{directory} holds {len(self)} pairs, its manifest says {self.manifest['count']}; delete it and make them again."
            )

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        record, offset, row = self._records[index], 0, {}
        for name, feature in self.manifest["features"].items():
            dtype, shape = np.dtype(feature["dtype"]), tuple(feature["shape"])
            n = math.prod(shape)
            row[name] = np.frombuffer(record, dtype, n, offset).reshape(shape)
            offset += n * dtype.itemsize
        return row

    def __repr__(self):
        return f"Pairs({json.dumps(self.manifest, sort_keys=True)})"


def read(*, directory: str) -> Pairs:
    """The pairs in `directory`."""
    return Pairs(directory)


def _check_shard(path):
    """Raises ValueError unless the shard is there and whole."""
    try:
        array_record_module.ArrayRecordReader(str(path)).close()
    except RuntimeError as error:
        what = "truncated or corrupt" if path.exists() else "missing"
        raise ValueError(f"pair shard {path} is {what}; delete it and run the stage that makes the pairs again.") from error
