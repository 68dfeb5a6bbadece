"""Rows of arrays that a stage has made, in ArrayRecord shards with a manifest.

A record is the bytes of its arrays one after another, in the order of the manifest's "features".
The manifest also has the number of "shards", the "count" of rows once all are written, and a digest
of what the rows were "made" from, see dmd_jax/experiment/made.py.
"""

import hashlib
import json
import math
import os

import jax
import numpy as np
from array_record.python import array_record_module
from grain import sources

from dmd_jax.runtime import storage

CHOICES = ("read",)  # what a config may name
MANIFEST = "manifest.json"
TEXTS = "texts.json"


def shard_paths(directory: str | os.PathLike, manifest: dict) -> list[storage.Path]:
    """Returns the path of every shard that `manifest` names."""
    n = manifest["shards"]
    return [storage.path(directory) / f"shard-{i:05d}-of-{n:05d}.arrayrecord" for i in range(n)]


def missing_shards(directory: str | os.PathLike, manifest: dict) -> list[storage.Path]:
    """Returns the paths of the shards that do not exist."""
    there = {path.name for path in storage.path(directory).iterdir()}
    return [path for path in shard_paths(directory, manifest) if path.name not in there]


def write_shard(path: storage.Path, arrays: dict[str, np.ndarray]):
    """Writes arrays of equal length as one shard; a shard that exists is complete."""
    with storage.writing(path) as file:
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        for row in zip(*arrays.values(), strict=True):
            writer.write(b"".join(np.ascontiguousarray(a).tobytes() for a in row))
        writer.close()


def read_manifest(directory: str | os.PathLike) -> dict:
    """Reads the manifest.

    Raises:
      ValueError: there are no records, or the manifest is damaged.
    """
    path = storage.path(directory) / MANIFEST
    if not path.exists():
        raise ValueError(
            f"no records in {directory}: {path} does not exist; "
            "run the stage that makes them first."
        )
    return storage.read_json(path)


def write_manifest(directory: storage.Path, manifest: dict):
    """Writes the manifest if there is none."""
    if not (directory / MANIFEST).exists():
        directory.mkdir(parents=True, exist_ok=True)
        storage.write_json(directory / MANIFEST, manifest)


class Records:
    """A source of rows {name: array} with the names of the manifest's "features"."""

    def __init__(self, directory: str, fields: tuple[str, ...] = (), limit: int = 0):
        """Opens the records and checks that all shards are complete.

        Args:
          directory: where the records are.
          fields: which features to read; () = all.
          limit: how many rows to keep, the first ones; 0 = all.

        Raises:
          ValueError: records are missing or damaged, or `fields` or `limit` do not fit them.
        """
        self.directory = str(directory)
        self.manifest = read_manifest(directory)
        features = self.manifest["features"]
        self._fields = tuple(fields) or tuple(features)
        if unknown := [name for name in self._fields if name not in features]:
            raise ValueError(
                f"the records in {directory} have no {', '.join(unknown)}; "
                f"there are: {', '.join(features)}."
            )
        for path in missing_shards(directory, self.manifest):
            if jax.process_index() > 0:  # process 0 has made it, or has ended the run
                storage.wait_for(path)
                continue
            raise ValueError(f"shard {path} is missing; run the stage that makes it again.")
        paths = shard_paths(storage.local(directory, ["*.arrayrecord"]), self.manifest)
        for path in paths:
            _check_shard(path)
        self._records = sources.ArrayRecordDataSource([str(path) for path in paths])
        count = len(self._records)
        if count != self.manifest.get("count"):
            raise ValueError(
                f"{directory} holds {count} records, but its manifest says "
                f"{self.manifest.get('count')}; delete it and make them again."
            )
        if not 0 <= limit <= count:
            raise ValueError(
                f"{directory}: expected a limit of 1 to {count}, the records that there are, or 0 "
                f"for all, got {limit}."
            )
        self._count = limit or count

    @property
    def digest(self) -> str:
        """Of what the records were made from, and of the fields and rows that are read."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def texts(self) -> list[str]:
        """The text of each row, if the rows were made from texts."""
        return storage.read_json(storage.path(self.directory) / TEXTS)["texts"][: self._count]

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        record = self._records[index]
        expected = sum(
            math.prod(f["shape"]) * np.dtype(f["dtype"]).itemsize
            for f in self.manifest["features"].values()
        )
        if len(record) != expected:
            raise ValueError(
                f"{self.directory}: record {index} has {len(record)} bytes, expected {expected} "
                "from the manifest's features; delete the directory and run the stage that makes "
                "it again."
            )
        row = {}
        offset = 0
        for name, feature in self.manifest["features"].items():
            dtype = np.dtype(feature["dtype"])
            shape = tuple(feature["shape"])
            n = math.prod(shape)
            row[name] = np.frombuffer(record, dtype, n, offset).reshape(shape)
            offset += n * dtype.itemsize
        return {name: row[name] for name in self._fields}

    def __repr__(self):
        manifest = json.dumps(self.manifest, sort_keys=True)
        return f"Records({manifest}, {self._fields}, {self._count} rows)"


def read(*, directory: str, fields: tuple[str, ...] = (), limit: int = 0) -> Records:
    """Returns the records in `directory`, as `Records` does."""
    return Records(directory, fields, limit)


def _check_shard(path):
    """Raises ValueError if the shard is not complete."""
    try:
        array_record_module.ArrayRecordReader(str(path)).close()
    except RuntimeError as error:
        raise ValueError(
            f"shard {path} is truncated or corrupt; "
            "delete it and run the stage that makes it again."
        ) from error
