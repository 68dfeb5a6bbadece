"""EDM's checkpoints (Karras et al., arXiv 2206.00364).

NVIDIA's pickles are read; the same tensors as .safetensors or .npz are read and written.
"""

import json
import os
import re
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from dmd_jax.runtime import storage
from dmd_jax.weights import pickles, state_dict

SUFFIXES = (".pkl", ".safetensors", ".npz")
STATED = {  # EDM's name of a setting: ours
    "img_resolution": "size",
    "img_channels": "channels",
    "in_channels": "channels",
    "label_dim": "num_classes",
    "model_channels": "width",
    "channel_mult": "multipliers",
    "num_blocks": "num_blocks",
    "augment_dim": "augment_dim",
}
CLASSES = {  # our name of a network: EDM's
    "unet_edm.ddpmpp": "SongUNet",
    "unet_edm.ncsnpp": "SongUNet",
    "unet_edm.adm": "DhariwalUNet",
}


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """Reads the tensors of a checkpoint (.pkl, .safetensors or .npz) and its network's settings.

    Returns:
      The tensors by PyTorch's names without the leading "model.", and the arguments of the function
      that makes the network, with its `name`.

    Raises:
      ValueError: the file is damaged, holds no network of EDM, or its statements contradict its
        tensors.
    """
    path = storage.local(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")
    readers = {".pkl": _read_pickle, ".safetensors": _read_safetensors, ".npz": _read_npz}
    if path.suffix not in readers:
        raise ValueError(
            f"{path} ends in {path.suffix!r}, expected one of {', '.join(readers)}; "
            "rename it, or convert it."
        )
    try:
        tensors, stated = readers[path.suffix](path)
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        settings = settings_of(tensors, path)
        _check_statements(path, settings, stated)
    except ValueError:
        raise
    except Exception as error:  # the file has something else where a network has its parts
        raise ValueError(
            f"{path} holds no network of EDM ({type(error).__name__}: {str(error)[:200]}); "
            "download it again."
        ) from error
    return tensors, settings


def _check_statements(path, settings, stated):
    """Raises ValueError if what the file states of its network contradicts its tensors."""
    resolutions = [settings["size"] >> level for level in range(len(settings["multipliers"]))]
    name = settings["name"]
    class_name = stated.pop("class_name", CLASSES[name])
    if class_name != CLASSES[name]:
        raise ValueError(
            f"{path} holds a {class_name} with the tensors of {name}; download it again."
        )
    if stated.pop("sigma_data", 0.5) != 0.5:
        raise ValueError(
            f"{path} has another sigma_data than 0.5; only EDM's own preconditioning is supported."
        )
    # EDM's default also names resolutions that a network may not have.
    if isinstance(stated.get("attention"), list | tuple):
        stated["attention"] = [r for r in stated["attention"] if r in resolutions]
    try:
        state_dict.check_settings(settings, stated)
    except ValueError as error:
        raise ValueError(
            f"{path} contradicts its own tensors; download it again. ({error})"
        ) from None


def settings_of(
    tensors: Mapping[str, np.ndarray], path: str | os.PathLike = "the checkpoint"
) -> dict:
    """Returns the settings of a network, from the names and the shapes of its tensors.

    Raises:
      ValueError: they are not those of a network of EDM.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    blocks = {}  # resolution: {number of a decoder block: its output channels}
    for name, shape in shapes.items():
        match = re.fullmatch(r"dec\.(\d+)x\1_block(\d+)\.conv0\.weight", name)
        if match and len(shape) == 4:
            blocks.setdefault(int(match[1]), {})[int(match[2])] = shape[0]
    size = max(blocks, default=0)
    first = shapes.get(f"enc.{size}x{size}_conv.weight", ())
    mapping = shapes.get("map_layer0.weight", ())
    if len(first) != 4 or len(mapping) != 2 or 0 in (first + mapping):
        raise ValueError(
            f"{path} has no dec.*_block*, enc.*_conv and map_layer0; "
            "expected the tensors of one of EDM's UNets."
        )
    if "out_conv.weight" in shapes:
        name = "unet_edm.adm"
        width = mapping[1]
    else:
        name = "unet_edm.ddpmpp"
        width = first[0]
    if "map_noise.freqs" in shapes:
        name = "unet_edm.ncsnpp"
    resolutions = sorted(blocks, reverse=True)
    counts = {len(block) for block in blocks.values()}
    outputs = [{*blocks[r].values()} for r in resolutions]
    if resolutions != [size >> level for level in range(len(blocks))] or len(counts) != 1:
        numbers = ", ".join(f"{len(blocks[r])} at {r}x{r}" for r in resolutions)
        raise ValueError(
            f"{path} has these blocks: {numbers}; expected as many at each resolution, "
            "and each half the one before."
        )
    if any(len(output) != 1 or min(output) % width for output in outputs):
        raise ValueError(
            f"{path} has blocks of {outputs} channels, "
            f"expected one multiple of {width} per resolution."
        )
    return {
        "name": name,
        "size": size,
        "channels": first[1],
        "num_classes": _inputs(shapes.get("map_label.weight")),
        "width": width,
        "multipliers": tuple(min(output) // width for output in outputs),
        "num_blocks": counts.pop() - 1,  # the decoder has one more than the encoder
        "attention": tuple(
            r for r in resolutions if f"dec.{r}x{r}_block{max(blocks[r])}.qkv.weight" in shapes
        ),
        "augment_dim": _inputs(shapes.get("map_augment.weight")),
    }


def to_params(tensors: Mapping[str, np.ndarray], abstract: dict) -> dict:
    """Returns the parameters with the structure of `abstract`.

    Filters of resampling are dropped, because the network has its own.

    Raises:
      ValueError: names, shapes or filters differ, with a list of all; or values are not finite.
    """
    filters = _filters(tensors)
    wrong = [
        name
        for name, expected in filters.items()
        if name in tensors and not _equal(tensors[name], expected)
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint resamples with other filters than {_taps(tensors)}, "
            f"which is not supported: {', '.join(wrong)}"
        )
    poor = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype.kind not in "fV" or not np.isfinite(np.asarray(tensor, np.float32)).all()
    ]
    if poor:
        raise ValueError(
            "the checkpoint has values that are no finite numbers, "
            f"in {', '.join(poor[:5])}; get it again."
        )
    return state_dict.from_torch(
        {name: tensor for name, tensor in tensors.items() if name not in filters}, abstract
    )


def from_params(params: dict) -> dict[str, np.ndarray]:
    """Returns the tensors of EDM's checkpoint of `params`, with the leading "model."."""
    tensors = state_dict.to_torch(params)
    tensors |= _filters(tensors)
    return {f"model.{name}": np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def write(path: str | os.PathLike, params: dict, settings: Mapping):
    """Writes `params` as .safetensors with PyTorch's names, and the settings in its metadata.

    The file is written whole or not at all.
    """
    metadata = {"format": "pt", "config": json.dumps(dict(settings))}
    with storage.writing(path) as file:
        safetensors.numpy.save_file(from_params(params), file, metadata=metadata)


def _read_pickle(path):
    content = pickles.read(path)
    ema = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(ema, pickles.Stub) or not isinstance(ema.state, dict):
        raise ValueError(
            f"{path} has no network 'ema'; expected one of EDM's network snapshots "
            "(network-snapshot-*.pkl, edm-*.pkl)."
        )
    if ema.class_name != "EDMPrecond":
        raise ValueError(
            f"{path} holds the preconditioning {ema.class_name}, expected EDMPrecond; "
            "only EDM's own is supported."
        )
    tensors = pickles.state_dict(ema)
    model = ema.state["_modules"].get("model")
    if model is None or model.class_name not in CLASSES.values():
        raise ValueError(
            f"{path} holds a {getattr(model, 'class_name', None)}, "
            "expected SongUNet or DhariwalUNet."
        )
    statements = {}
    for source in (model.state.get("_init_kwargs"), ema.state):
        if isinstance(source, dict):
            for key in (*STATED, "attn_resolutions", "sigma_data"):
                if key in source:
                    statements[key] = source[key]
    stated = {STATED[key]: value for key, value in statements.items() if key in STATED}
    if "attn_resolutions" in statements:
        stated["attention"] = statements["attn_resolutions"]
    stated["class_name"] = model.class_name
    stated["sigma_data"] = statements.get("sigma_data", 0.5)
    return tensors, stated


def _read_safetensors(path):
    try:
        with safetensors.safe_open(path, framework="np") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            keys = file.keys()
            return {name: file.get_tensor(name) for name in keys}, dict(config)
    except Exception as error:  # safetensors raises its own, and those of its parser
        raise ValueError(
            f"{path} is missing, truncated or not a .safetensors file ({error}); download it again."
        ) from error


def _read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file), {}
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        raise ValueError(
            f"{path} is missing, truncated or not an .npz file ({error}); download it again."
        ) from error


def _filters(tensors):
    """Returns the filters of resampling that belong to `tensors`, by name."""
    taps = np.array(_taps(tensors), np.float32)
    kernel = np.outer(taps, taps)[None, None] / taps.sum() ** 2
    filters = {}
    for name in tensors:
        if match := re.match(r"((enc|dec)\.(\d+)x\3_(down|up))\.", name):
            for layer in ("conv0", "skip"):
                filters[f"{match[1]}.{layer}.resample_filter"] = kernel
        elif match := re.match(r"enc\.(\d+)x\1_aux_residual\.", name):
            filters[f"{match[0]}resample_filter"] = kernel
    return filters


def _taps(tensors):
    """Returns the filter along one axis; NCSN++ alone has the longer one."""
    return [1, 3, 3, 1] if "map_noise.freqs" in tensors else [1, 1]


def _inputs(shape):
    return shape[1] if shape and len(shape) == 2 else 0


def _equal(tensor, expected):
    return tensor.shape == expected.shape and np.array_equal(tensor, expected)
