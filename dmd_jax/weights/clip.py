"""Directories of CLIP in the layout of Hugging Face's transformers or of OpenCLIP.

    transformers   config.json, preprocessor_config.json, and model.safetensors (one file or shards)
                   or pytorch_model.bin
    OpenCLIP       open_clip_config.json, and open_clip_model.safetensors or
                   open_clip_pytorch_model.bin

Tensors get transformers' names. LAION's directories have both layouts; there, safetensors come
before pickles, and transformers' files before OpenCLIP's.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors

from dmd_jax.runtime import storage
from dmd_jax.weights import diffusers_files, pickles, published

HUGGING_FACE = "config.json"
OPEN_CLIP = "open_clip_config.json"
LAYOUTS = (
    (HUGGING_FACE, "model.safetensors"),
    (HUGGING_FACE, "model.safetensors.index.json"),
    (OPEN_CLIP, "open_clip_model.safetensors"),
    (OPEN_CLIP, "open_clip_pytorch_model.bin"),
    (HUGGING_FACE, "pytorch_model.bin"),
)

# transformers' settings: {their name: (our name, the value where config.json does not state it)}
TOWER = {"hidden_act": ("act", "quick_gelu"), "num_hidden_layers": ("num_layers", 12)}
TEXT = TOWER | {
    "hidden_size": ("hidden_size", 512),
    "intermediate_size": ("intermediate_size", 2048),
    "vocab_size": ("vocab_size", 49408),
}
TEXT |= {"num_attention_heads": ("num_heads", 8), "max_position_embeddings": ("max_length", 77)}
VISION = TOWER | {
    "hidden_size": ("hidden_size", 768),
    "intermediate_size": ("intermediate_size", 3072),
}
VISION |= {
    "num_attention_heads": ("num_heads", 12),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
}
FIXED = {"layer_norm_eps": 1e-5, "num_channels": 3}

# OpenCLIP's settings: {their name: the value where the file does not state it}. Other keys must
# have the values in OPEN_TEXT_FIXED and OPEN_VISION_FIXED, or none.
OPEN_TEXT = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
OPEN_VISION = {
    "image_size": 224,
    "patch_size": 16,
    "width": 768,
    "head_width": 64,
    "layers": 12,
    "mlp_ratio": 4.0,
}
OPEN_MODEL = {"embed_dim": 512, "vision_cfg": {}, "text_cfg": {}, "quick_gelu": False}
OPEN_TEXT_FIXED = {"pool_type": "argmax", "proj_type": "linear"}
OPEN_VISION_FIXED = {"pool_type": "tok", "pos_embed_type": "learnable"}
PREPARATION = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}
# 3 = bicubic.
PROCESSOR = {
    "resample": 3,  # bicubic
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
}

# Rules (regex of OpenCLIP's full name, transformers' name), applied one after the other.
KEYS = (
    (r"visual\.(class_embedding)", r"vision_model.embeddings.\1"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.(weight)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"visual\.(transformer.*)", r"vision_model.\1"),
    (r"visual\.proj", "visual_projection.weight"),
    (r"text_projection", "text_projection.weight"),
    (r"token_embedding\.(weight)", r"text_model.embeddings.token_embedding.\1"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
    (r"(transformer.*)", r"text_model.\1"),
    (r"(.*\.)transformer\.resblocks\.(.*)", r"\1encoder.layers.\2"),
    (r"(.*\.layers\.\d+\.)ln_([12]\..*)", r"\1layer_norm\2"),
    (r"(.*\.layers\.\d+\.)attn\.(.*)", r"\1self_attn.\2"),
    (r"(.*\.layers\.\d+\.mlp\.)c_fc(\..*)", r"\1fc1\2"),
    (r"(.*\.layers\.\d+\.mlp\.)c_proj(\..*)", r"\1fc2\2"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Renamed(Mapping):
    """Tensors of `source` under other names; each is made when it is asked for.

    Attributes:
      source: tensors by their old names.
      places: by new name, the old name and the function that turns the old tensor into the new one.
    """

    source: Mapping[str, np.ndarray]
    places: dict[str, tuple[str, Callable]]

    def __getitem__(self, name: str) -> np.ndarray:
        old, change = self.places[name]
        return change(self.source[old])

    def __iter__(self):
        return iter(self.places)

    def __len__(self):
        return len(self.places)


def read(directory: str | os.PathLike) -> tuple[dict, Mapping[str, np.ndarray]]:
    """Reads a CLIP.

    Tensors of safetensors are read one by one. A .bin is read as a whole, without running anything
    in it.

    Args:
      directory: such as CLIP-ViT-g-14-laion2B-s12B-b42K.

    Returns:
      `name` and arguments of the function in `models` that makes the network, and its tensors for
      `state_dict.from_torch`.

    Raises:
      ValueError: there is no CLIP, with what it should hold and where it is published; a file is
        damaged or not the published one; or it is another kind of network, with a list of what is
        not supported.
    """
    directory, config, weights = _layout(directory)
    path = directory / weights
    tensors: Any
    if path.suffix == ".bin":
        tensors = pickles.read(published.find(path))
    else:
        files = [path]
        if path.suffix == ".json":
            _, files = diffusers_files.weight_files(directory)
        tensors = _safetensors(files)
    if config == OPEN_CLIP:
        places = {new: place for name in tensors for new, place in _places(name)}
    else:
        places = {
            name: (name, np.asarray) for name in tensors if not name.endswith(".position_ids")
        }
    return _settings(directory, config), Renamed(tensors, places)


def normalisation(directory: str | os.PathLike) -> tuple[tuple, tuple]:
    """Returns mean and standard deviation of the channels of images in [0, 1], to normalise them.

    Raises:
      ValueError: as in `read`; or images are prepared in another way than CLIP's, which resizes
        them bicubically and crops them to the network's size.
    """
    directory, config, _ = _layout(directory)
    if config == OPEN_CLIP:
        preparation = diffusers_files.read_json(directory / config).get("preprocess_cfg") or {}
        expected = PREPARATION
        names = ("mean", "std")
    else:
        preparation = diffusers_files.read_json(directory / "preprocessor_config.json")
        size = _settings(directory, config)["vision"]["image_size"]
        for key in ("size", "crop_size"):
            if key in preparation:
                preparation[key] = _one(preparation[key])
        expected = PROCESSOR | {"size": size, "crop_size": size}
        names = ("image_mean", "image_std")
    problems = _differences(preparation, expected)
    for key in names:
        if len(preparation.get(key) or ()) != 3:
            problems.append(f"{key} of its images is missing")
    _refuse(directory, problems)
    mean, std = (tuple(preparation[key]) for key in names)
    return mean, std


def _differences(content, expected):
    """Returns what differs from the expected values; missing keys do not count."""
    return [
        f"{key} is {content[key]!r}, expected {value!r}"
        for key, value in expected.items()
        if content.get(key, value) != value
    ]


def _layout(directory):
    """Returns the directory, and the names of its config and of its weights."""
    path = storage.path(directory)
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    for config, weights in LAYOUTS:
        if {config, weights} <= names:
            return path, config, weights
    choices = ", or ".join(f"{config} and {weights}" for config, weights in LAYOUTS)
    raise ValueError(
        f"{path} is no directory of a CLIP: expected {choices}; "
        f"there is {', '.join(sorted(names)) or 'nothing'}. "
        f"Nothing is downloaded by itself{published.published(path)}."
    )


def _safetensors(paths):
    places = {}
    for path in paths:
        local = published.find(path)
        try:
            with safetensors.safe_open(local, framework="np") as opened:
                places |= {key: (local, key) for key in opened.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has its own kinds of errors
            raise ValueError(
                f"{path} is truncated or not a .safetensors file ({error}); get it again."
            ) from error
    return diffusers_files.Tensors(places)


def _settings(directory, config):
    parse = _open_clip if config == OPEN_CLIP else _hugging_face
    settings, problems = parse(diffusers_files.read_json(directory / config))
    _refuse(directory, problems)
    return {"name": "clip.clip"} | settings


def _hugging_face(config):
    problems = []
    if config.get("model_type") != "clip":
        problems.append(f"model_type is {config.get('model_type')!r}, expected 'clip'")
    settings = {"projection_dim": config.get("projection_dim", 512)}
    for tower, keys in (("text", TEXT), ("vision", VISION)):
        content = config.get(f"{tower}_config") or {}
        content = content | (config.get(f"{tower}_config_dict") or {})  # old files have both
        settings[tower] = {
            ours: content.get(theirs, default) for theirs, (ours, default) in keys.items()
        }
        problems += [f"{tower}'s {problem}" for problem in _differences(content, FIXED)]
    return settings, problems


def _open_clip(config):
    model, problems = _filled("model_cfg", config.get("model_cfg") or {}, OPEN_MODEL, {})
    text, text_problems = _filled("text_cfg", model["text_cfg"], OPEN_TEXT, OPEN_TEXT_FIXED)
    vision, vision_problems = _filled(
        "vision_cfg", model["vision_cfg"], OPEN_VISION, OPEN_VISION_FIXED
    )
    vision["heads"] = vision["width"] // vision["head_width"]
    settings = {"projection_dim": model["embed_dim"]}
    for tower, content in (("text", text), ("vision", vision)):
        settings[tower] = {
            "act": "quick_gelu" if model["quick_gelu"] else "gelu",
            "hidden_size": content["width"],
            "num_layers": content["layers"],
            "num_heads": content["heads"],
            "intermediate_size": int(content["width"] * content["mlp_ratio"]),
        }
    settings["text"] |= {"vocab_size": text["vocab_size"], "max_length": text["context_length"]}
    settings["vision"] |= {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    return settings, problems + text_problems + vision_problems


def _filled(name, content, defaults, fixed):
    """Returns `content` with defaults for what it lacks, and what is not supported in it."""
    problems = [
        f"{name}'s {key} is {value!r}, expected {fixed.get(key)!r}"
        for key, value in content.items()
        if key not in defaults and value and fixed.get(key) != value
    ]
    return defaults | content, problems


def _places(name):
    """Returns the entries of `Renamed.places` that one of OpenCLIP's tensors becomes."""
    new = name
    for theirs, ours in KEYS:
        new = re.sub(f"^{theirs}$", ours, new)
    if ".in_proj_" in new:
        return [
            (new.replace("in_proj_", f"{part}_proj."), (name, _third(i)))
            for i, part in enumerate("qkv")
        ]
    change = np.transpose if name in ("visual.proj", "text_projection") else np.asarray
    return [(new, (name, change))]


def _third(i):
    return lambda tensor: tensor[i * len(tensor) // 3 : (i + 1) * len(tensor) // 3]


def _one(size):
    """Returns the one number of a size, which transformers has written in several ways."""
    sizes = set(size.values()) if isinstance(size, dict) else {size}
    return sizes.pop() if len(sizes) == 1 else size


def _refuse(directory, problems):
    if problems:
        raise ValueError(
            f"{directory}: its CLIP is not supported: {'; '.join(problems)}; use another model."
        )
