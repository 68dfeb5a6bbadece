"""Rows of arrays that a stage has made, as ArrayRecord shards and a manifest.

A record is the bytes of its arrays one after another, in the order of the manifest's "features".
The manifest also says how many "shards" there are, the "count" of rows once all are there, and what
made them: see dmd_jax/pairs.py and dmd_jax/embed.py.
"""

import json
import math
import os

import numpy as np
from array_record.python import array_record_module
from grain import sources

from dmd_jax.runtime import storage

CHOICES = ("read",)  # what a config may name

MANIFEST, TEXTS = "manifest.json", "texts.json"


def shard_paths(directory: str | os.PathLike, manifest: dict) -> list[storage.Path]:
    """Every shard that `manifest` asks for."""
    n = manifest["shards"]
    return [storage.path(directory) / f"shard-{i:05d}-of-{n:05d}.arrayrecord" for i in range(n)]


def missing_shards(directory: str | os.PathLike, manifest: dict) -> list[storage.Path]:
    """Those of them that are not there."""
    there = {path.name for path in storage.path(directory).iterdir()}
    return [path for path in shard_paths(directory, manifest) if path.name not in there]


def write_shard(path: storage.Path, arrays: dict[str, np.ndarray]):
    """Writes arrays of equal length as one shard; a shard that exists is whole."""
    with storage.writing(path) as file:
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        for row in zip(*arrays.values(), strict=True):
            writer.write(b"".join(np.ascontiguousarray(a).tobytes() for a in row))
        writer.close()


def read_manifest(directory: str | os.PathLike) -> dict:
    """Raises ValueError if there are no records, or the manifest is damaged."""
    path = storage.path(directory) / MANIFEST
    if not path.exists():
        raise ValueError(
            f"no records in {directory}: {path} does not exist; run the stage that makes them "
            "first."
        )
    return storage.read_json(path)


def claim(directory: storage.Path, manifest: dict):
    """Writes `manifest` where there is none; what another one has besides may differ.

    Raises:
      ValueError: there are records in `directory` that were made in another way.
    """
    manifest = json.loads(json.dumps(manifest))
    if (directory / MANIFEST).exists():
        found = read_manifest(directory)
        differing = [
            f"{key} is {found.get(key)}, expected {manifest[key]}"
            for key in manifest
            if found.get(key) != manifest[key]
        ]
        if differing:
            raise ValueError(
                f"{directory} holds others than the config asks for: {'; '.join(differing)}; use "
                "another workdir."
            )
    else:
        directory.mkdir(parents=True, exist_ok=True)
        storage.write_json(directory / MANIFEST, manifest)


class Records:
    """A source of {name: array} for the manifest's "features", or those of them that `fields`
    names, of all rows or the first `limit`.
    """

    def __init__(self, directory: str, fields: tuple[str, ...] = (), limit: int = 0):
        self.directory, self.manifest = str(directory), read_manifest(directory)
        features = self.manifest["features"]
        self._fields = tuple(fields) or tuple(features)
        if unknown := [name for name in self._fields if name not in features]:
            raise ValueError(
                f"the records in {directory} have no {', '.join(unknown)}; there are: "
                f"{', '.join(features)}."
            )
        for path in missing_shards(directory, self.manifest):
            raise ValueError(f"shard {path} is missing; run the stage that makes it again.")
        paths = shard_paths(storage.local(directory, ["*.arrayrecord"]), self.manifest)
        for path in paths:
            _check_shard(path)
        self._records = sources.ArrayRecordDataSource([str(path) for path in paths])
        count = len(self._records)
        if count != self.manifest.get("count"):
            raise ValueError(
                f"{directory} holds {count} records, its manifest says "
                f"{self.manifest.get('count')}; delete it and make them again."
            )
        if not 0 <= limit <= count:
            raise ValueError(
                f"{directory}: expected a limit of 1 to {count}, the records that there are, or 0 "
                f"for all, got {limit}."
            )
        self._count = limit or count

    @property
    def texts(self) -> list[str]:
        """Of each row, where the rows are of texts."""
        return storage.read_json(storage.path(self.directory) / TEXTS)["texts"][: self._count]

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        record, offset, row = self._records[index], 0, {}
        expected = sum(
            math.prod(f["shape"]) * np.dtype(f["dtype"]).itemsize
            for f in self.manifest["features"].values()
        )
        if len(record) != expected:
            raise ValueError(
                f"{self.directory}: record {index} has {len(record)} bytes, expected {expected} "
                "from the manifest's features; "
                "delete the directory and run the stage that makes it again."
            )
        for name, feature in self.manifest["features"].items():
            dtype, shape = np.dtype(feature["dtype"]), tuple(feature["shape"])
            n = math.prod(shape)
            row[name] = np.frombuffer(record, dtype, n, offset).reshape(shape)
            offset += n * dtype.itemsize
        return {name: row[name] for name in self._fields}

    def __repr__(self):
        return f"Records({json.dumps(self.manifest, sort_keys=True)}, {self._fields}, {self._count} rows)"


def read(*, directory: str, fields: tuple[str, ...] = (), limit: int = 0) -> Records:
    """The records in `directory`, or the first `limit`; of each row all that there is, or `fields`
    alone.
    """
    return Records(directory, fields, limit)


def _check_shard(path):
    """Raises ValueError unless the shard is whole."""
    try:
        array_record_module.ArrayRecordReader(str(path)).close()
    except RuntimeError as error:
        raise ValueError(
            f"shard {path} is truncated or corrupt; delete it and run the stage that makes it "
            "again."
        ) from error
