"""Reads datasets that tensorflow-datasets has prepared as ArrayRecord files.

TensorFlow is not needed.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow_datasets

from dmd_jax.data import images
from dmd_jax.runtime import storage

CHOICES = ("read",)  # what a config may name


class Examples:
    """The records of `images.Files`."""

    def __init__(self, examples, *, labelled: bool):
        self._examples = examples
        self._labelled = labelled

    def __len__(self):
        return len(self._examples)

    def name(self, index):
        return str(index)

    def read(self, index):
        example = self._examples[index]
        return example["image"], int(example["label"]) if self._labelled else 0


def read(*, name: str, split: str, data_dir: str, size: int | None = None, x_flips: bool = False):
    """Returns the features "image" and "label" of a prepared dataset.

    Without a feature "label", every cond is 0. Nothing is downloaded.

    Args:
      name: such as "cifar10" or "downsampled_imagenet/64x64"; ":3.0.2" at the end chooses among
        several versions.
      split: as tensorflow-datasets writes it, such as "train" or "train[:1000]".
      data_dir: the directory in which the dataset was prepared.
      size: height and width of the images; None = those of the first image.
      x_flips: whether to append the mirror images.

    Raises:
      ValueError: the dataset is not there as ArrayRecord files, or has no such split; or an image
        is unlike the others or corrupt.
    """
    examples, features, origin = open_split(name, split, data_dir)
    label = features.get("label")
    if label is not None and (label.shape or not np.issubdtype(label.np_dtype, np.integer)):
        raise ValueError(
            f'{origin}: expected a whole number as "label", got {label}; '
            "prepare it with class labels."
        )
    source = images.Files(Examples(examples, labelled=label is not None), origin=origin, size=size)
    return images.Flipped(source) if x_flips else source


def open_split(name: str, split: str, data_dir: str) -> tuple[Sequence[dict], dict, str]:
    """Opens a split of a prepared dataset of images; see `read` for the arguments.

    Returns:
      Its examples, whose images are not decoded; its features; and its name in errors.

    Raises:
      ValueError: the dataset is not there as ArrayRecord files, has no such split or no images.
    """
    builder = tensorflow_datasets.builder_from_directory(
        storage.local(_find(name, storage.path(data_dir)))
    )
    origin = f"{name} in {data_dir}"
    features = dict(builder.info.features.items())
    if not isinstance(features.get("image"), tensorflow_datasets.features.Image):
        raise ValueError(
            f'{origin}: expected a feature "image", got {", ".join(features)}; '
            "use a dataset of images."
        )
    try:
        examples = builder.as_data_source(
            split, decoders={"image": tensorflow_datasets.decode.SkipDecoding()}
        )
    except NotImplementedError as error:
        got = builder.info.file_format.value
        raise ValueError(
            f"{origin}: expected array_record files, got {got}; {_how(name, data_dir)}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{origin} has no split {split!r} ({error}); "
            f"there are: {', '.join(builder.info.splits)}."
        ) from error
    return examples, features, f"{origin}, {split}"


def _find(name, data_dir):
    """Returns the directory of the only version, or of the one in `name`."""
    directory = data_dir / name.replace(":", "/")
    if (directory / "features.json").exists():
        return directory
    versions = [
        path.parent
        for path in directory.glob("*/features.json")
        if tensorflow_datasets.core.Version.is_valid(path.parent.name)
    ]
    if not versions:
        raise ValueError(
            f"no {name} in {data_dir}: expected {directory}/<version>/features.json; "
            f"{_how(name, data_dir)}"
        )
    if len(versions) > 1:
        there = ", ".join(sorted(version.name for version in versions))
        raise ValueError(
            f"several versions of {name} in {data_dir}: {there}; "
            f"choose one with name='{name}:<version>'."
        )
    return versions[0]


def _how(name, data_dir):
    builder = f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
    return (
        'prepare it: python -c "import tensorflow_datasets as tfds; '
        f'{builder}.download_and_prepare()" (this needs: pip install importlib_resources; '
        "for some datasets, such as cifar10, also tensorflow)."
    )
