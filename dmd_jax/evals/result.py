"""The result of an evaluation: the scores of sets of images, and all that they follow from."""

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any

from dmd_jax.runtime import storage

PACKAGES = ("dmd_jax", "jax", "jaxlib", "flax", "numpy", "pillow")  # on which scores depend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The scores of one set of generated images, and what the images cost.

    Attributes:
      name: of the model that made them, or of the images.
      scores: by their names, over all ranges of seeds.
      seed_ranges: the scores of each range of seeds.
      stage: the stage that trained the model; "" for images in files.
      nfe: network calls for an image; None if nobody knows.
      seconds_per_image: None if nobody knows.
      training_seconds: how long the stage took; None if nobody knows.
    """

    name: str
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed_ranges: tuple[Mapping[str, float], ...] = ()
    stage: str = ""
    nfe: float | None = None
    seconds_per_image: float | None = None
    training_seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of an evaluation; `suite.evaluate` makes it.

    Attributes:
      asked: what was to be measured, as JSON has it: the protocol, the conditions, the checkpoints
        and whatever else the scores follow from.
      rows: the sets of generated images.
      real: the scores of real images that were measured as if they were generated; {} for none.
      reference: "count", "digest" and "agreement" of the real images.
      networks: digests of the weights of the networks that measured.
      straightness: of flows, by the names of their stages.
      packages: versions.
      device: how many of which kind.
    """

    asked: Mapping[str, Any]
    rows: tuple[Row, ...]
    real: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reference: Mapping[str, Any]
    networks: Mapping[str, str]
    straightness: Mapping[str, float] = dataclasses.field(default_factory=dict)
    packages: Mapping[str, str]
    device: str

    def row(self, name: str) -> Row:
        """Returns the row of that name.

        Raises:
          KeyError: there is none.
        """
        return {row.name: row for row in self.rows}[name]

    def speedup(self, teacher: str, student: str) -> float:
        """Returns how many times as fast as the teacher the student makes an image."""
        return self.row(teacher).seconds_per_image / self.row(student).seconds_per_image

    def to_json(self) -> dict:
        """Returns the result as JSON has it; `from_json` reads it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: dict) -> "Result":
        """Reads what `to_json` has returned.

        Raises:
          ValueError: something is missing or unknown, as in the result of another version.
        """
        try:
            for dicts in (values, *values["rows"]):
                for key in ("asked", "scores", "real", "reference"):
                    if not isinstance(dicts.get(key, {}), dict):
                        raise TypeError(f"{key} is {dicts[key]!r}")
            rows = tuple(
                Row(**row | {"seed_ranges": tuple(row["seed_ranges"])}) for row in values["rows"]
            )
            return cls(**values | {"rows": rows})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"this is no result of an evaluation by this version ({error}); evaluate again."
            ) from error


def read(path: str | os.PathLike) -> Result:
    """Reads the result in a JSON file.

    Raises:
      ValueError: the file is damaged, or another version wrote it.
    """
    values = storage.read_json(storage.path(path))
    try:
        return Result.from_json(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def packages() -> dict[str, str]:
    """Returns the versions of the packages on which scores depend."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
