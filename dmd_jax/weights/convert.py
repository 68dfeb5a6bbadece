"""Checkpoints of PyTorch modules, both ways. Attribute names are equal, so the kind of leaf decides its name and its transpose."""

from collections.abc import Mapping

import numpy as np
from flax import traverse_util

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}  # flax's name: PyTorch's


def from_torch(tensors: Mapping[str, np.ndarray], abstract: dict) -> dict:
    """Parameters with the structure of `abstract` out of a PyTorch state dict.

    Raises:
      ValueError: names or shapes differ; lists everything left over on both sides.
    """
    flat, left = {}, dict(tensors)
    problems = []
    for path, leaf in traverse_util.flatten_dict(abstract).items():
        name, axes = _torch_leaf(path, len(leaf.shape))
        if name not in left:
            problems.append(f"missing {name}")
            continue
        array, expected = np.asarray(left.pop(name)), tuple(leaf.shape[axis] for axis in axes)
        if array.shape != expected:
            problems.append(f"{name} has shape {array.shape}, expected {expected}")
            continue
        flat[path] = np.transpose(array, np.argsort(axes)).astype(leaf.dtype)
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


def _torch_leaf(path, ndim):
    """PyTorch's name of a leaf, and the axes that transpose it to PyTorch's order."""
    *module, leaf = path
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}[ndim] if leaf == "kernel" else tuple(range(ndim))  # HWIO -> OIHW, [in, out] -> [out, in]
    return ".".join([*module, LEAVES.get(leaf, leaf)]), axes
