"""Adds what others have trained on top of a model to its weights, in float32.

    LoRA:      W += multiplier * (alpha / rank) * up @ down         arXiv 2106.09685, section 4.1
    transfer:  W += alpha * (W_custom - W_base)                     InstaFlow, arXiv 2309.06380

For a convolution, `down` has the kernel and `up` is 1x1; the product is the two in sequence
(LoCon). Tensors are PyTorch's, with the names that `diffusers_files` gives them; `state_dict` turns
our parameters into them and back. Another merge with -multiplier undoes a merge.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors

from dmd_jax.runtime import storage

NETWORKS = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "lora_te_": "text_encoder",
    "text_encoder.": "text_encoder",
}
START = re.compile(
    rf"(?:base_model\.model\.)?({'|'.join(map(re.escape, NETWORKS))})?(?:text_model[._])?"
)
ENDS = {  # of names by kohya, by PEFT, and by diffusers before PEFT
    f"{middle}.weight": side
    for side, middles in {
        "up": (".lora_up", ".lora_B", "_lora.up", ".lora.up", ".lora_linear_layer.up"),
        "down": (".lora_down", ".lora_A", "_lora.down", ".lora.down", ".lora_linear_layer.down"),
    }.items()
    for middle in middles
} | {".alpha": "alpha"}
OTHERS = {  # parts of names that are no such pair of factors
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon of three factors",
    "lora_embedding_": "LoRA of an embedding",
}
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings
SETTINGS = {  # by setting of PEFT, the supported values
    "use_dora": (False,),
    # Other ways to begin change W itself.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


class Factors(NamedTuple):
    """The factors of a change of low rank.

    Attributes:
      up: [outputs, rank], float32.
      down: [rank, inputs], float32; for a convolution [rank, inputs * height * width].
      scale: alpha / rank.
    """

    up: np.ndarray
    down: np.ndarray
    scale: float


def read(
    file: str | os.PathLike, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, dict[str, Factors]]:
    """Reads the factors in a .safetensors file of kohya's scripts, of PEFT or of diffusers.

    Args:
      file: alpha is in it, in its metadata, or in PEFT's adapter_config.json beside it; where there
        is none, alpha is the rank.
      shapes: by network ("unet", "text_encoder"), the shapes of its tensors by name.

    Returns:
      The factors, by network and by name of the tensor.

    Raises:
      ValueError: the file is damaged; or tensors are of another kind, not in the networks, not
        complete, or of another shape, with a list of all.
    """
    file = storage.path(file)
    tensors, metadata = _load(file)
    settings, problems = _settings(file, tensors, metadata)
    table = _table(shapes)
    parts_by_target = {}
    for key, tensor in tensors.items():
        target, side, problem = _resolve(key, table)
        if not problem and not np.isfinite(tensor).all():
            problem = "has values that are not finite"
        if not problem and side in parts_by_target.get(target, {}):
            problem = "comes twice, under two names"
        if problem:
            problems.append(f"{key} {problem}")
        else:
            parts_by_target.setdefault(target, {})[side] = tensor
    factors = {}
    for (network, name), parts in parts_by_target.items():
        problem = _misfit(parts, shapes[network][name])
        if problem:
            problems.append(f"{network}.{name} {problem}")
            continue
        up, down = (parts[side].reshape(len(parts[side]), -1) for side in ("up", "down"))
        scale = _scale(settings[network], name, parts.get("alpha"), len(down))
        factors.setdefault(network, {})[name] = Factors(up, down, scale)
    if problems or not factors:
        raise ValueError(
            f"{file} is no LoRA for this model: {'; '.join(problems) or 'it is empty'}; "
            "use one that was made for it."
        )
    return factors


def merge(
    tensors: Mapping[str, np.ndarray], factors: Mapping[str, Factors], multiplier: float = 1.0
) -> dict[str, np.ndarray]:
    """Returns `tensors` in float32, plus multiplier * scale * up @ down where there are factors.

    Raises:
      ValueError: a tensor is missing, or has another shape.
    """
    merged = {name: np.asarray(tensors[name], np.float32) for name in tensors}
    shapes = {
        name: (tensor.shape[0], tensor.size // tensor.shape[0])
        for name, tensor in merged.items()
        if tensor.ndim > 1
    }
    problems = [
        name
        for name, (up, down, _) in factors.items()
        if shapes.get(name) != (len(up), down.shape[1])
    ]
    if problems:
        raise ValueError(
            f"there are factors of {', '.join(problems)}, which these tensors lack or have in "
            "another shape; read them again."
        )
    for name, (up, down, scale) in factors.items():
        change = (up @ down).reshape(merged[name].shape)
        merged[name] = merged[name] + np.float32(multiplier * scale) * change
    return merged


def transfer(
    tensors: Mapping[str, np.ndarray],
    custom: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    alpha: float = 1.0,
) -> dict[str, np.ndarray]:
    """Returns `tensors` in float32, plus `alpha` times the change from `base` to `custom`.

    The change may be a DreamBooth, for example.

    Raises:
      ValueError: names or shapes differ; lists all differences.
    """
    result = {}
    problems = []
    for kind, model in (("custom", custom), ("base", base)):
        problems += [
            f"{name} is missing in the {kind} model" for name in tensors if name not in model
        ]
        problems += [f"{name} is only in the {kind} model" for name in model if name not in tensors]
    for name in tensors:
        if name not in custom or name not in base:
            continue
        w, w_custom, w_base = (
            np.asarray(part[name], np.float32) for part in (tensors, custom, base)
        )
        if not w.shape == w_custom.shape == w_base.shape:
            problems.append(
                f"{name} has shape {w.shape}, in the custom model {w_custom.shape}, "
                f"in the base model {w_base.shape}"
            )
        elif not problems:
            result[name] = w + np.float32(alpha) * (w_custom - w_base)
    if problems:
        raise ValueError(f"the three models are not of one architecture: {'; '.join(problems)}.")
    return result


def _load(file):
    """Returns all tensors in float32, and the metadata."""
    try:
        with safetensors.safe_open(storage.local(file), framework="np") as opened:
            keys = opened.keys()
            tensors = {key: opened.get_tensor(key).astype(np.float32) for key in keys}
            return tensors, opened.metadata() or {}
    except Exception as error:  # safetensors has its own kinds of errors
        raise ValueError(
            f"{file} is missing, truncated or not a .safetensors file ({error}); get it again."
        ) from error


def _settings(file, tensors, metadata):
    """Returns PEFT's settings by network, which may be empty, and what is not supported in them."""
    source = f"{METADATA} of {file}"
    text = metadata.get(METADATA, "{}")
    bare = any(key.startswith("base_model.model.") for key in tensors) and not any(
        key.endswith(".alpha") for key in tensors
    )
    try:
        if bare and METADATA not in metadata:
            source = file.parent / "adapter_config.json"
            text = source.read_text()
        content = dict(json.loads(text))
        own = {
            network: _of_network(content, network) for network in dict.fromkeys(NETWORKS.values())
        }
    except (OSError, ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(
            f"{source}, which has the alpha of the LoRA, is missing or damaged ({error}); "
            "get it again."
        ) from None
    problems = [
        f"{key} is {part[key]!r}, which is not supported"
        for part in own.values()
        for key, supported in SETTINGS.items()
        if part.get(key) not in (None, *supported)
    ]
    return own, list(dict.fromkeys(problems))  # once each


def _of_network(content, network):
    """Returns the settings of one network, with "alphas": a list of (regex of a path, alpha).

    The last one is for all paths.
    """
    own = {
        key.removeprefix(f"{network}."): value
        for key, value in content.items()
        if key.startswith(f"{network}.") or "." not in key
    }
    alphas = own.get("alpha_pattern") or {}
    if "lora_alpha" in own:
        alphas = alphas | {".*": own["lora_alpha"]}
    rules = [(re.compile(rf"(.*\.)?({key})$"), float(alpha)) for key, alpha in alphas.items()]
    return own | {"alphas": rules}


def _table(shapes):
    """Returns the network and the name of each weight, by its path with "_" for ".".

    Such a path cannot be turned back into a name.
    """
    table = {}
    for network, names in shapes.items():
        for name, shape in names.items():
            if name.endswith(".weight") and len(shape) in (2, 4):
                path = name.removesuffix(".weight").replace(".", "_")
                table.setdefault(path, []).append((network, name))
    return table


def _resolve(key, table):
    """Returns (network, name of the weight), side and problem of a key, or None for each."""
    end = next((end for end in ENDS if key.endswith(end)), None)
    if end is None:
        other = next((f"is of a {kind}, " for part, kind in OTHERS.items() if part in key), "")
        return None, None, f"{other or 'is '}not supported"
    start = START.match(key)
    path = key[start.end() :].removesuffix(end)
    path = re.sub(r"\.processor\.to_out$", ".to_out.0", path).replace(".processor.", ".")
    targets = [
        target
        for target in table.get(path.replace(".", "_"), [])
        if NETWORKS.get(start[1], target[0]) == target[0]
    ]
    if not targets:
        return None, None, "is of no module of these networks"
    if len(targets) > 1:
        return None, None, f"may be of {targets}"
    return targets[0], ENDS[end], None


def _misfit(parts, shape):
    """Returns what is wrong with the tensors of one weight, or None."""
    missing = [side for side in ("up", "down") if side not in parts]
    if missing:
        return f"has no {' and no '.join(missing)}"
    if "alpha" in parts and parts["alpha"].size != 1:
        return f"has an alpha of shape {parts['alpha'].shape}, expected one number"
    up = parts["up"].shape
    down = parts["down"].shape
    rank = down[0] if down else 0
    if not rank or _plain(up) != (shape[0], rank) or _plain(down) != _plain((rank, *shape[1:])):
        return (
            f"has factors of shapes {up} and {down}, "
            f"expected {(shape[0], 'rank')} and {('rank', *shape[1:])}"
        )
    return None


def _plain(shape):
    """Returns the shape of a 1x1 convolution as that of a linear layer."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _scale(settings, name, alpha, rank):
    if alpha is not None:
        return alpha.item() / rank
    path = f"text_model.{name.removesuffix('.weight')}"  # patterns may begin with text_model
    alpha = next((alpha for regex, alpha in settings["alphas"] if regex.match(path)), None)
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
