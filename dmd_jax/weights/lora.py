"""What others have trained on top of a model, added to its weights, in float32.

    LoRA:      W += multiplier * (alpha / rank) * up @ down         arXiv 2106.09685, section 4.1
    transfer:  W += alpha * (W_custom - W_base)                     InstaFlow, arXiv 2309.06380

Of a convolution, `down` has the kernel and `up` is 1x1: the product is the two in sequence (LoCon).
Tensors are PyTorch's, by the names that `diffusers_files` gives them; parameters of ours get there
and back by `convert`. A merge is undone by another one with -multiplier.
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
ENDS = {  # kohya's, PEFT's, and those of diffusers before PEFT
    f"{middle}.weight": side
    for side, middles in {
        "up": (".lora_up", ".lora_B", "_lora.up", ".lora.up", ".lora_linear_layer.up"),
        "down": (".lora_down", ".lora_A", "_lora.down", ".lora.down", ".lora_linear_layer.down"),
    }.items()
    for middle in middles
} | {".alpha": "alpha"}
OTHERS = {  # what is no such pair of factors
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon of three factors",
    "lora_embedding_": "LoRA of an embedding",
}
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings
# Others change W when they begin.
SETTINGS = {
    "use_dora": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


class Factors(NamedTuple):
    """Of a change of low rank.

    Attributes:
      up: [outputs, rank], float32.
      down: [rank, inputs], float32; of a convolution [rank, inputs * height * width].
      scale: alpha / rank.
    """

    up: np.ndarray
    down: np.ndarray
    scale: float


def read(
    file: str | os.PathLike, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, dict[str, Factors]]:
    """The factors of a .safetensors file of kohya's scripts, of PEFT or of diffusers.

    Args:
      file: alpha is in it, in its metadata, or in PEFT's adapter_config.json beside it; where there
        is none, alpha is the rank.
      shapes: by network ("unet", "text_encoder"), the shapes of its tensors by name.

    Returns:
      By network and name of the tensor, its factors.

    Raises:
      ValueError: the file is damaged; or lists all that is of another kind, not in the networks,
        not whole, or of another shape.
    """
    file = storage.path(file)
    tensors, metadata = _load(file)
    settings, problems = _settings(file, tensors, metadata)
    table, found = _table(shapes), {}
    for key, tensor in tensors.items():
        target, side, problem = _resolve(key, table)
        if not problem and not np.isfinite(tensor).all():
            problem = "has values that are not finite"
        if not problem and side in found.get(target, {}):
            problem = "comes twice, under two names"
        if problem:
            problems.append(f"{key} {problem}")
        else:
            found.setdefault(target, {})[side] = tensor
    factors = {}
    for (network, name), parts in found.items():
        problem = _misfit(parts, shapes[network][name])
        if problem:
            problems.append(f"{network}.{name} {problem}")
            continue
        up, down = (parts[side].reshape(len(parts[side]), -1) for side in ("up", "down"))
        scale = _scale(settings[network], name, parts.get("alpha"), len(down))
        factors.setdefault(network, {})[name] = Factors(up, down, scale)
    if problems or not factors:
        raise ValueError(
            f"{file} is no LoRA for this model: {'; '.join(problems) or 'it is empty'}; use one "
            "that was made for it."
        )
    return factors


def merge(
    tensors: Mapping[str, np.ndarray], factors: Mapping[str, Factors], multiplier: float = 1.0
) -> dict[str, np.ndarray]:
    """All `tensors` in float32, those that have factors with multiplier * scale * up @ down added.

    Raises:
      ValueError: a tensor is missing, or has another shape.
    """
    merged = {name: np.asarray(tensors[name], np.float32) for name in tensors}
    shapes = {
        name: (tensor.shape[0], tensor.size // tensor.shape[0])
        for name, tensor in merged.items()
        if tensor.ndim > 1
    }
    if problems := [
        name
        for name, (up, down, _) in factors.items()
        if shapes.get(name) != (len(up), down.shape[1])
    ]:
        raise ValueError(
            f"there are factors of {', '.join(problems)}, which these tensors lack or have in "
            "another shape; read them again."
        )
    for name, (up, down, scale) in factors.items():
        merged[name] = merged[name] + np.float32(multiplier * scale) * (up @ down).reshape(
            merged[name].shape
        )
    return merged


def transfer(
    tensors: Mapping[str, np.ndarray],
    custom: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    alpha: float = 1.0,
) -> dict[str, np.ndarray]:
    """All `tensors` in float32, with what turned `base` into `custom`, such as DreamBooth, added
    `alpha` times.

    Raises:
      ValueError: names or shapes differ; lists all of them.
    """
    result, problems = {}, []
    for kind, others in (("custom", custom), ("base", base)):
        problems += [
            f"{name} is missing in the {kind} model" for name in tensors if name not in others
        ]
        problems += [
            f"{name} is only in the {kind} model" for name in others if name not in tensors
        ]
    for name in tensors:
        if name not in custom or name not in base:
            continue
        w, w_custom, w_base = (
            np.asarray(part[name], np.float32) for part in (tensors, custom, base)
        )
        if not w.shape == w_custom.shape == w_base.shape:
            problems.append(
                f"{name} has shape {w.shape}, in the custom model {w_custom.shape}, in the base "
                f"model {w_base.shape}"
            )
        elif not problems:
            result[name] = w + np.float32(alpha) * (w_custom - w_base)
    if problems:
        raise ValueError(f"the three models are not of one architecture: {'; '.join(problems)}.")
    return result


def _load(file):
    """All tensors in float32, and the metadata."""
    try:
        with safetensors.safe_open(storage.local(file), framework="np") as opened:
            keys = opened.keys()
            tensors = {key: opened.get_tensor(key).astype(np.float32) for key in keys}
            return tensors, opened.metadata() or {}
    except Exception as error:  # safetensors raises its own, and those of the system
        raise ValueError(
            f"{file} is missing, truncated or not a .safetensors file ({error}); get it again."
        ) from error


def _settings(file, tensors, metadata):
    """By network, PEFT's settings, as far as there are any; and what is not supported of them."""
    source, text = f"{METADATA} of {file}", metadata.get(METADATA, "{}")
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
            f"{source}, which has the alpha of the LoRA, is missing or damaged ({error}); get it "
            "again."
        ) from None
    found = [
        (key, part[key])
        for part in own.values()
        for key, allowed in SETTINGS.items()
        if part.get(key) not in (None, *allowed)
    ]
    return own, list(
        dict.fromkeys(f"{key} is {value!r}, which is not supported" for key, value in found)
    )


def _of_network(content, network):
    """The settings of one network, with "alphas": a list of (regex of a path, alpha), the last one
    for all.
    """
    own = {
        key.removeprefix(f"{network}."): value
        for key, value in content.items()
        if key.startswith(f"{network}.") or "." not in key
    }
    alphas = (own.get("alpha_pattern") or {}) | (
        {".*": own["lora_alpha"]} if "lora_alpha" in own else {}
    )
    return own | {
        "alphas": [(re.compile(rf"(.*\.)?({key})$"), float(alpha)) for key, alpha in alphas.items()]
    }


def _table(shapes):
    """By path with "_" for ".", which cannot be turned back: the network and the name of each
    weight.
    """
    table = {}
    for network, names in shapes.items():
        for name, shape in names.items():
            if name.endswith(".weight") and len(shape) in (2, 4):
                table.setdefault(name.removesuffix(".weight").replace(".", "_"), []).append(
                    (network, name)
                )
    return table


def _resolve(key, table):
    """(network, name of the weight), side, problem."""
    end = next((end for end in ENDS if key.endswith(end)), None)
    if end is None:
        other = next((f"is of a {kind}, " for part, kind in OTHERS.items() if part in key), "")
        return None, None, f"{other or 'is '}not supported"
    start = START.match(key)
    path = re.sub(
        r"\.processor\.to_out$", ".to_out.0", key[start.end() :].removesuffix(end)
    ).replace(".processor.", ".")
    targets = [
        target
        for target in table.get(path.replace(".", "_"), [])
        if NETWORKS.get(start[1], target[0]) == target[0]
    ]
    if len(targets) != 1:
        return (
            None,
            None,
            f"may be of {targets}" if targets else "is of no module of these networks",
        )
    return targets[0], ENDS[end], None


def _misfit(parts, shape):
    """What is wrong with the tensors of one weight."""
    if missing := [side for side in ("up", "down") if side not in parts]:
        return f"has no {' and no '.join(missing)}"
    if "alpha" in parts and parts["alpha"].size != 1:
        return f"has an alpha of shape {parts['alpha'].shape}, expected one number"
    up, down = parts["up"].shape, parts["down"].shape
    rank = down[0] if down else 0
    if not rank or _plain(up) != (shape[0], rank) or _plain(down) != _plain((rank, *shape[1:])):
        return f"has factors of shapes {up} and {down}, expected {(shape[0], 'rank')} and {('rank', *shape[1:])}"
    return None


def _plain(shape):
    """A 1x1 convolution's as that of a linear layer."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _scale(settings, name, alpha, rank):
    if alpha is not None:
        return alpha.item() / rank
    path = f"text_model.{name.removesuffix('.weight')}"  # which patterns may begin with
    alpha = next((alpha for regex, alpha in settings["alphas"] if regex.match(path)), None)
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
