"""A network's folder in the layout of diffusers: config.json and .safetensors files, which may be
variants and shards.
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

STEM = {"text_encoder": "model"}  # how names of weight files begin; others:
DEFAULT_STEM = "diffusion_pytorch_model"
# Of a VAE's attention, in files of 2022.
OLD = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0", norm="group_norm")
OLD |= dict(q="to_q", k="to_k", v="to_v", proj_out="to_out.0")  # and in those made of older ones
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
    """What is in the folder `name` of `directory`, or in `directory` itself if it is a network's
    own.

    Args:
      directory: of the model.
      name: such as "unet".
      variant: of the weight files, such as "fp16"; None: those of no variant, or of the only one
        there.

    Returns:
      The content of config.json, and the tensors by today's names, read one by one, in their own
      dtypes.

    Raises:
      ValueError: something is missing, damaged, or pickled.
    """
    path = folder(directory, name)
    config = read_json(path / "config.json")
    chosen, files = weight_files(path, variant)
    places, copies = {}, {file: storage.local(file) for file in files}
    for file, copy in copies.items():
        try:
            with safetensors.safe_open(copy, framework="np") as opened:
                places |= {_today(key): (copy, key) for key in opened.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own, and those of the system
            raise ValueError(
                f"{file} is truncated or not a .safetensors file ({error}); get it again."
            ) from error
    promised = _weight_map(chosen) if chosen.suffix == ".json" else {}
    if missing := [
        key for key in promised if places.get(_today(key)) != (copies[path / promised[key]], key)
    ]:
        raise ValueError(
            f"{chosen} promises {', '.join(missing[:5])} ({len(missing)} in all), which its files "
            "do not hold; get them again."
        )
    return config, Tensors(
        {key: place for key, place in places.items() if key not in NO_PARAMETERS}
    )


def weight_files(
    path: storage.Path, variant: str | None = None
) -> tuple[storage.Path, list[storage.Path]]:
    """Of a network's folder: the file that stands for its weights, which may be an index, and the
    files that hold them.
    """
    stem, found = f"(?:{DEFAULT_STEM}|{'|'.join(STEM.values())})", {}
    for file in sorted(path.iterdir()):  # a single file comes before an index
        if match := re.fullmatch(
            rf"{stem}(?:\.(\w+))?\.safetensors|{stem}\.safetensors\.index(?:\.(\w+))?\.json",
            file.name,
        ):
            found.setdefault(match[1] or match[2], file)
    if not found and (pickled := sorted([*path.glob("*.bin"), *path.glob("*.ckpt")])):
        raise ValueError(
            f"{pickled[0]} is a pickle, which can run code when loaded; expected .safetensors. "
            "Where you trust it, convert it by "
            "from_pretrained(directory).save_pretrained(other, safe_serialization=True) of "
            "diffusers or transformers."
        )
    if variant is None and None not in found and len(found) == 1:
        variant = next(iter(found))
    if variant not in found:
        there = (
            ", ".join(f"variant {name!r}" if name else "no variant" for name in found)
            or "none at all"
        )
        raise ValueError(
            f"{path} has no weights of {f'variant {variant!r}' if variant else 'no variant'}, in "
            f".safetensors; there are: {there}."
        )
    chosen = found[variant]
    return chosen, [chosen] if chosen.suffix != ".json" else [
        path / name for name in sorted(set(_weight_map(chosen).values()))
    ]


def _weight_map(index):
    """Of an index of shards: by name, the file's name."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map; get it again.")
    for name in set(names.values()):
        if (
            not isinstance(name, str)
            or pathlib.Path(name).name != name
            or not (index.parent / name).is_file()
        ):
            raise ValueError(f"{index} names {name!r}, which is no file beside it; get it again.")
    return names


def folder(directory, name):
    directory = storage.path(directory)
    if (directory / name).is_dir():
        return directory / name
    if name != "scheduler" and (directory / "config.json").is_file():
        return directory
    there = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "nothing"
    raise ValueError(
        f"{directory} has no {name}/; expected a directory in the layout of diffusers, there is "
        f"{there}."
    )


def read_json(path):
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
    """What a tensor is called by the libraries of today; some omit "text_model."."""
    if found := re.fullmatch(r"((?:en|de)coder\.mid_block\.attentions\.0)\.(\w+)\.(\w+)", name):
        return f"{found[1]}.{OLD.get(found[2], found[2])}.{found[3]}"
    return name.removeprefix("text_model.")
