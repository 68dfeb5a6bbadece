"""A network's folder in the layout of diffusers: config.json and .safetensors files.

The weight files may be variants and shards.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np
import safetensors

from dmd_jax.runtime import storage

STEM = {"text_encoder": "model"}  # the beginning of the names of weight files, by folder
DEFAULT_STEM = "diffusion_pytorch_model"
# Old names in the attention of a VAE: those of 2022, and those of files converted from older ones.
OLD = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0", norm="group_norm")
OLD |= dict(q="to_q", k="to_k", v="to_v", proj_out="to_out.0")
NO_PARAMETERS = ("embeddings.position_ids",)


@dataclasses.dataclass(frozen=True, eq=False)
class Tensors(Mapping):
    """Tensors that are read when they are asked for.

    Attributes:
      places: by name, the file and the name in it.
    """

    places: dict[str, tuple[pathlib.Path, str]]

    def __getitem__(self, name: str) -> np.ndarray:
        file, key = self.places[name]
        with safetensors.safe_open(file, framework="np") as opened:
            return opened.get_tensor(key)

    def shape(self, name: str) -> tuple[int, ...]:
        file, key = self.places[name]
        with safetensors.safe_open(file, framework="np") as opened:
            return tuple(opened.get_slice(key).get_shape())

    def __iter__(self):
        return iter(self.places)

    def __len__(self):
        return len(self.places)


def read(
    directory: str | os.PathLike, name: str, variant: str | None = None
) -> tuple[dict, Mapping[str, np.ndarray]]:
    """Reads the folder `name` of `directory`, or `directory` itself if it is a network's own.

    Args:
      directory: of the model.
      name: such as "unet".
      variant: of the weight files, such as "fp16". None reads those of no variant, or of the only
        variant if there is just one.

    Returns:
      The content of config.json, and the tensors by today's names, read one by one, in their own
      dtypes.

    Raises:
      ValueError: something is missing, damaged, or pickled.
    """
    path = folder(directory, name)
    config = read_json(path / "config.json")
    main_file, files = weight_files(path, variant)
    copies = {file: storage.local(file) for file in files}
    places = {}
    for file, copy in copies.items():
        try:
            with safetensors.safe_open(copy, framework="np") as opened:
                places |= {_today(key): (copy, key) for key in opened.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has its own kinds of errors
            raise ValueError(
                f"{file} is truncated or not a .safetensors file ({error}); get it again."
            ) from error
    promised = _weight_map(main_file) if main_file.suffix == ".json" else {}
    missing = [
        key
        for key, name in promised.items()
        if places.get(_today(key)) != (copies[path / name], key)
    ]
    if missing:
        raise ValueError(
            f"{main_file} promises {', '.join(missing[:5])} ({len(missing)} in all), "
            "which its files do not hold; get them again."
        )
    return config, Tensors(
        {key: place for key, place in places.items() if key not in NO_PARAMETERS}
    )


def weight_files(
    path: storage.Path, variant: str | None = None
) -> tuple[storage.Path, list[storage.Path]]:
    """Finds the weight files in a network's folder.

    Returns:
      The file that stands for the weights, which may be an index, and the files that hold them.

    Raises:
      ValueError: there are none of this variant, or pickles alone.
    """
    stem = f"(?:{DEFAULT_STEM}|{'|'.join(STEM.values())})"
    single_file = rf"{stem}(?:\.(\w+))?\.safetensors"
    index = rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json"
    variants = {}
    for file in sorted(path.iterdir()):  # a single file comes before an index
        if match := re.fullmatch(f"{single_file}|{index}", file.name):
            variants.setdefault(match[1] or match[2], file)
    pickled = sorted([*path.glob("*.bin"), *path.glob("*.ckpt")])
    if pickled and not variants:
        raise ValueError(
            f"{pickled[0]} is a pickle, which can run code when loaded; expected .safetensors. "
            "Where you trust it, convert it by "
            "from_pretrained(directory).save_pretrained(other, safe_serialization=True) "
            "of diffusers or transformers."
        )
    if variant is None and None not in variants and len(variants) == 1:
        variant = next(iter(variants))
    if variant not in variants:
        names = ", ".join(_variant_name(name) for name in variants) or "none at all"
        raise ValueError(
            f"{path} has no weights of {_variant_name(variant)}, in .safetensors; "
            f"there are: {names}."
        )
    main_file = variants[variant]
    if main_file.suffix != ".json":
        return main_file, [main_file]
    return main_file, [path / name for name in sorted(set(_weight_map(main_file).values()))]


def _variant_name(variant):
    return f"variant {variant!r}" if variant else "no variant"


def _weight_map(index):
    """Returns the name of its file for each tensor in an index of shards."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map; get it again.")
    for name in set(names.values()):
        is_plain_name = isinstance(name, str) and pathlib.Path(name).name == name
        if not is_plain_name or not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is no file beside it; get it again.")
    return names


def folder(directory: str | os.PathLike, name: str) -> storage.Path:
    """Returns the folder `name` of a model's directory, or the directory if it is a network's own.

    Raises:
      ValueError: there is no such folder.
    """
    directory = storage.path(directory)
    if (directory / name).is_dir():
        return directory / name
    if name != "scheduler" and (directory / "config.json").is_file():
        return directory
    content = "nothing"
    if directory.is_dir():
        content = sorted(path.name for path in directory.iterdir())
    raise ValueError(
        f"{directory} has no {name}/; expected a directory in the layout of diffusers, "
        f"there is {content}."
    )


def read_json(path: storage.Path) -> dict:
    """Reads a JSON file that holds a dict; lists in it become tuples.

    Raises:
      ValueError: the file is missing or damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); get it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict; get it again.")
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
    }


def _today(name):
    """Returns the name of a tensor in today's libraries, of which some omit "text_model."."""
    attention = r"((?:en|de)coder\.mid_block\.attentions\.0)\.(\w+)\.(\w+)"
    if match := re.fullmatch(attention, name):
        return f"{match[1]}.{OLD.get(match[2], match[2])}.{match[3]}"
    return name.removeprefix("text_model.")
