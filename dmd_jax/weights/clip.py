"""Directories of CLIP, as Hugging Face's transformers or as OpenCLIP lays them out; tensors have
transformers' names.

    transformers   config.json, preprocessor_config.json, and model.safetensors, whole or in shards, or pytorch_model.bin
    OpenCLIP       open_clip_config.json, and open_clip_model.safetensors or open_clip_pytorch_model.bin

LAION's directories are both at once; there, safetensors come before pickles, and transformers'
before OpenCLIP's.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping

import numpy as np
import safetensors

from dmd_jax.runtime import storage
from dmd_jax.weights import diffusers_files, pickles, published

HUGGING_FACE, OPEN_CLIP = "config.json", "open_clip_config.json"
LAYOUTS = (
    (HUGGING_FACE, "model.safetensors"),
    (HUGGING_FACE, "model.safetensors.index.json"),
    (OPEN_CLIP, "open_clip_model.safetensors"),
    (OPEN_CLIP, "open_clip_pytorch_model.bin"),
    (HUGGING_FACE, "pytorch_model.bin"),
)

# transformers' settings: {theirs: (ours, what it is where config.json does not say)}
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

# OpenCLIP's: {theirs: what it is where the file does not say}; other keys must have the value in
# OPEN_FIXED, or none
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
    "resample": 3,
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
}

# (a regex of OpenCLIP's whole name, transformers'), each applied to what those before it have made.
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
    """Tensors under other names, made of those of `source` when they are asked for.

    Attributes:
      source: tensors by their old names.
      places: by the new name, the old one and what makes the tensor.
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
    """A CLIP: `name` and arguments of its maker in `models`, and its tensors for
    `convert.from_torch`.

    Tensors of safetensors are read one by one; a .bin, in which nothing is run, is held whole.

    Args:
      directory: such as CLIP-ViT-g-14-laion2B-s12B-b42K.

    Raises:
      ValueError: there is none, with what it should hold and where it is published; a file is
        damaged or not the published one; or it is another kind of network, with all that is not
        supported.
    """
    directory, config, weights = _layout(directory)
    path = directory / weights
    if path.suffix == ".bin":
        tensors = pickles.read(published.find(path))
    else:
        tensors = _safetensors(
            diffusers_files.weight_files(directory)[1] if path.suffix == ".json" else [path]
        )
    if config == OPEN_CLIP:
        tensors = Renamed(tensors, {new: place for name in tensors for new, place in _places(name)})
    else:
        tensors = Renamed(
            tensors,
            {name: (name, np.asarray) for name in tensors if not name.endswith(".position_ids")},
        )
    return _settings(directory, config), tensors


def normalisation(directory: str | os.PathLike) -> tuple[tuple, tuple]:
    """The mean and the standard deviation of images in [0, 1] that their channels are normalised
    by.

    Raises:
      ValueError: as `read`; or images are prepared in another way than CLIP's: resized bicubically
        and cropped to the network's size.
    """
    directory, config, _ = _layout(directory)
    if config == OPEN_CLIP:
        found, expected, names = (
            diffusers_files.read_json(directory / config).get("preprocess_cfg") or {},
            PREPARATION,
            ("mean", "std"),
        )
    else:
        found = diffusers_files.read_json(directory / "preprocessor_config.json")
        size = _settings(directory, config)["vision"]["image_size"]
        found |= {key: _one(found[key]) for key in ("size", "crop_size") if key in found}
        expected, names = PROCESSOR | {"size": size, "crop_size": size}, ("image_mean", "image_std")
    problems = [
        f"{key} is {found[key]!r}, expected {value!r}"
        for key, value in expected.items()
        if found.get(key, value) != value
    ]
    _refuse(
        directory,
        problems
        + [f"{key} of its images is missing" for key in names if len(found.get(key) or ()) != 3],
    )
    return tuple(tuple(found[key]) for key in names)


def _layout(directory):
    """The directory, and the names of its config and of its weights."""
    path = storage.path(directory)
    there = {file.name for file in path.iterdir()} if path.is_dir() else set()
    for config, weights in LAYOUTS:
        if {config, weights} <= there:
            return path, config, weights
    choices = ", or ".join(f"{config} and {weights}" for config, weights in LAYOUTS)
    raise ValueError(
        f"{path} is no directory of a CLIP: expected {choices}; there is "
        f"{', '.join(sorted(there)) or 'nothing'}. "
        f"Nothing is downloaded by itself{published.published(path)}."
    )


def _safetensors(paths):
    places = {}
    for path in paths:
        local = published.find(path)
        try:
            with safetensors.safe_open(local, framework="np") as opened:
                places |= {key: (local, key) for key in opened.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own, and those of the system
            raise ValueError(
                f"{path} is truncated or not a .safetensors file ({error}); get it again."
            ) from error
    return diffusers_files.Tensors(places)


def _settings(directory, config):
    found = diffusers_files.read_json(directory / config)
    settings, problems = (_open_clip if config == OPEN_CLIP else _hugging_face)(found)
    _refuse(directory, problems)
    return {"name": "clip.clip"} | settings


def _hugging_face(config):
    problems = (
        []
        if config.get("model_type") == "clip"
        else [f"model_type is {config.get('model_type')!r}, expected 'clip'"]
    )
    settings = {"projection_dim": config.get("projection_dim", 512)}
    for tower, keys in (("text", TEXT), ("vision", VISION)):
        # Old files have both.
        found = (config.get(f"{tower}_config") or {}) | (config.get(f"{tower}_config_dict") or {})
        settings[tower] = {
            ours: found.get(theirs, absent) for theirs, (ours, absent) in keys.items()
        }
        problems += [
            f"{tower}'s {key} is {found[key]!r}, expected {value!r}"
            for key, value in FIXED.items()
            if found.get(key, value) != value
        ]
    return settings, problems


def _open_clip(config):
    model, problems = _filled("model_cfg", config.get("model_cfg") or {}, OPEN_MODEL, {})
    text, more = _filled("text_cfg", model["text_cfg"], OPEN_TEXT, OPEN_TEXT_FIXED)
    vision, others = _filled("vision_cfg", model["vision_cfg"], OPEN_VISION, OPEN_VISION_FIXED)
    vision["heads"] = vision["width"] // vision["head_width"]
    settings = {"projection_dim": model["embed_dim"]}
    for tower, found in (("text", text), ("vision", vision)):
        settings[tower] = {
            "act": "quick_gelu" if model["quick_gelu"] else "gelu",
            "hidden_size": found["width"],
        }
        settings[tower] |= {"num_layers": found["layers"], "num_heads": found["heads"]}
        settings[tower]["intermediate_size"] = int(found["width"] * found["mlp_ratio"])
    settings["text"] |= {"vocab_size": text["vocab_size"], "max_length": text["context_length"]}
    settings["vision"] |= {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    return settings, problems + more + others


def _filled(name, found, absent, fixed):
    """With what it does not say, and what is not supported in it."""
    others = {
        key: value
        for key, value in found.items()
        if key not in absent and value and fixed.get(key) != value
    }
    return absent | found, [
        f"{name}'s {key} is {value!r}, expected {fixed.get(key)!r}" for key, value in others.items()
    ]


def _places(name):
    """What becomes of one of OpenCLIP's tensors: [(new name, (name, what makes it))]."""
    new = name
    for theirs, ours in KEYS:
        new = re.sub(f"^{theirs}$", ours, new)
    if ".in_proj_" in new:
        return [
            (new.replace("in_proj_", f"{part}_proj."), (name, _third(i)))
            for i, part in enumerate("qkv")
        ]
    return [
        (new, (name, np.transpose if name in ("visual.proj", "text_projection") else np.asarray))
    ]


def _third(i):
    return lambda tensor: tensor[i * len(tensor) // 3 : (i + 1) * len(tensor) // 3]


def _one(size):
    """A number, out of what transformers has written over the years."""
    sizes = set(size.values()) if isinstance(size, dict) else {size}
    return sizes.pop() if len(sizes) == 1 else size


def _refuse(directory, problems):
    if problems:
        raise ValueError(
            f"{directory}: its CLIP is not supported: {'; '.join(problems)}; use another model."
        )
