"""Checkpoints of PyTorch modules, read and written.

Modules have equal names there and here, so the kind of leaf decides its name and its transpose.
"""

from collections.abc import Callable, Mapping

import numpy as np
from flax import traverse_util

LEAVES = {  # flax's name of a leaf: PyTorch's
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
    """Returns the parameters in a PyTorch state dict, with the structure of `abstract`.

    Tensors are read one at a time. A linear layer may be a 1x1 convolution on the other side.

    Args:
      tensors: the state dict; its names come from iterating it.
      abstract: of the network.
      place: `(array, path) -> array`, puts a parameter where it belongs before the next one is
        read.

    Raises:
      ValueError: names or shapes differ; lists all differences on both sides.
    """
    flat = {}
    unused = dict.fromkeys(tensors)
    problems = []
    for path, leaf in traverse_util.flatten_dict(abstract).items():
        name, axes = _torch_leaf(path, len(leaf.shape))
        if name not in unused:
            problems.append(f"missing {name}")
            continue
        del unused[name]
        array = np.asarray(tensors[name])
        expected = tuple(leaf.shape[axis] for axis in axes)
        pointwise = array.shape == expected + (1, 1) or array.shape + (1, 1) == expected
        if path[-1] == "kernel" and pointwise:
            array = array.reshape(expected)
        if array.shape != expected:
            problems.append(f"{name} has shape {array.shape}, expected {expected}")
        elif not problems:
            array = np.transpose(array, np.argsort(axes)).astype(leaf.dtype)
            flat[path] = place(array, path) if place else array
    problems += [f"unused {name}" for name in unused]
    if problems:
        raise ValueError("the checkpoint does not fit the network: " + "; ".join(problems))
    return traverse_util.unflatten_dict(flat)


def to_torch(params: dict) -> dict[str, np.ndarray]:
    """Returns the PyTorch state dict of `params`."""
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        name, axes = _torch_leaf(path, leaf.ndim)
        tensors[name] = np.transpose(np.asarray(leaf), axes)
    return tensors


def check_settings(of_checkpoint: Mapping, of_config: Mapping):
    """Compares the settings of a network that a checkpoint and a config both state.

    Raises:
      ValueError: they differ; lists all differences.
    """
    differences = []
    for key in of_checkpoint:
        if key not in of_config:
            continue
        a = _plain(of_checkpoint[key])
        b = _plain(of_config[key])
        if a != b and None not in (a, b):
            differences.append(f"{key} is {a!r} in the checkpoint, {b!r} in the config")
    if differences:
        raise ValueError("; ".join(differences))


def _plain(value):
    """Returns a tuple as a list, since JSON and configs do not keep them apart."""
    return list(value) if isinstance(value, tuple | list) else value


def _torch_leaf(path, ndim):
    """Returns PyTorch's name of a leaf, and the axes that transpose it to PyTorch's order."""
    *module, leaf = path
    axes = tuple(range(ndim))
    if leaf == "kernel":
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}[ndim]  # HWIO -> OIHW, [in, out] -> [out, in]
    return ".".join([*module, LEAVES.get(leaf, leaf)]), axes
