"""Finds configs by their names."""

import importlib.util
import pathlib

import ml_collections

from dmd_jax import lookup
from dmd_jax.experiment import settings

DIRECTORY = pathlib.Path(__file__).parents[2] / "configs"


def names() -> list[str]:
    """Lists the configs that the package has."""
    return sorted(path.stem for path in DIRECTORY.glob("*.py") if path.stem != "__init__")


def load(name: str) -> ml_collections.ConfigDict:
    """Loads a config, filled up with the defaults of what it does not say.

    Args:
      name: of one that the package has, such as "digits", or the path of a file with `get_config`; a
        word after a colon picks a variant.

    Raises:
      ValueError: there is no such config, or it has no such variant.
    """
    file, _, variant = name.partition(":")
    path = pathlib.Path(file if file.endswith(".py") else DIRECTORY / f"{file}.py")
    if not path.is_file():
        hint = lookup.nearest(path.stem, names())
        raise ValueError(f"no config {file}{hint}; there are: {', '.join(names())}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant) if variant else module.get_config()
    return settings.complete(config)
