"""Checkpoints of PyTorch modules, both ways.

Attribute names are equal, so the kind of leaf decides its name and its transpose.
"""

from collections.abc import Callable, Mapping

import numpy as np
from flax import traverse_util

# flax's name: PyTorch's
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def from_torch(
    tensors: Mapping[str, np.ndarray], abstract: dict, place: Callable | None = None
) -> dict:
    """Parameters with the structure of `abstract` out of a PyTorch state dict, which is read one
    tensor at a time.

    A linear layer of the one is a 1x1 convolution of the other where the shapes say so.

    Args:
      tensors: the state dict; its names come from iterating it.
      abstract: of the network.
      place: `(array, path) -> array`, puts a parameter where it belongs before the next one is
        read.

    Raises:
      ValueError: names or shapes differ; lists everything left over on both sides.
    """
    flat, left, problems = {}, dict.fromkeys(tensors), []
    for path, leaf in traverse_util.flatten_dict(abstract).items():
        name, axes = _torch_leaf(path, len(leaf.shape))
        if name not in left:
            problems.append(f"missing {name}")
            continue
        del left[name]
        array, expected = np.asarray(tensors[name]), tuple(leaf.shape[axis] for axis in axes)
        if path[-1] == "kernel" and (
            array.shape == expected + (1, 1) or array.shape + (1, 1) == expected
        ):
            array = array.reshape(expected)
        if array.shape != expected:
            problems.append(f"{name} has shape {array.shape}, expected {expected}")
        elif not problems:
            array = np.transpose(array, np.argsort(axes)).astype(leaf.dtype)
            flat[path] = place(array, path) if place else array
    problems += [f"unused {name}" for name in left]
    if problems:
        raise ValueError("the checkpoint does not fit the network: " + "; ".join(problems))
    return traverse_util.unflatten_dict(flat)


def to_torch(params: dict) -> dict[str, np.ndarray]:
    """The PyTorch state dict of `params`."""
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        name, axes = _torch_leaf(path, leaf.ndim)
        tensors[name] = np.transpose(np.asarray(leaf), axes)
    return tensors


def check_settings(found: Mapping, configured: Mapping):
    """Compares the settings of a network that a checkpoint and a config both state.

    Raises:
      ValueError: lists all that differs.
    """
    pairs = {
        key: (_plain(found[key]), _plain(configured[key])) for key in found if key in configured
    }
    differing = [
        f"{key} is {a!r} in the checkpoint, {b!r} in the config"
        for key, (a, b) in pairs.items()
        if a != b and None not in (a, b)
    ]
    if differing:
        raise ValueError("; ".join(differing))


def _plain(value):
    return list(value) if isinstance(value, tuple | list) else value


def _torch_leaf(path, ndim):
    """PyTorch's name of a leaf, and the axes that transpose it to PyTorch's order."""
    *module, leaf = path
    # HWIO -> OIHW, [in, out] -> [out, in].
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}[ndim] if leaf == "kernel" else tuple(range(ndim))
    return ".".join([*module, LEAVES.get(leaf, leaf)]), axes
