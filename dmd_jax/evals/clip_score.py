"""The CLIP score (Hessel et al., arXiv 2104.08718) as DMD and InstaFlow report it: the mean cosine
of images and their own captions.

    score = mean_i <f(x_i), g("A photo depicts" + caption_i)>,   f and g CLIP's two towers, unit vectors

It is the bare cosine, of about 0.3: not times 100 or 2.5, nor cut off at 0.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import features, lookup, sharding
from dmd_jax.encoders import tokenizer
from dmd_jax.features import resize
from dmd_jax.weights import clip, state_dict

# (width, layers): OpenCLIP's letter.
SIZES = {
    (768, 12): "B",
    (1024, 24): "L",
    (1280, 32): "H",
    (1408, 40): "g",
    (1664, 48): "bigG",
}


class ClipScore(NamedTuple):
    """One CLIP.

    Attributes:
      name: OpenCLIP's name of the network, such as "ViT-g-14"; of one of OpenAI's such as
        "ViT-B-32-quickgelu".
      digest: of the parameters, of the tokenizer, and of what is done to images and captions
        before.
      images: bytes [N, H, W, 3] to unit vectors [N, D], float32, numpy.
      texts: N captions, a list of str, to unit vectors [N, D], float32, numpy.
    """

    name: str
    digest: str
    images: Callable
    texts: Callable


def make(
    parallel: sharding.Parallel,
    *,
    batch_size: int,
    checkpoint: str | os.PathLike,
    prefix: str = "A photo depicts",
    crop_to: int = 256,
) -> ClipScore:
    """The CLIP of a checkpoint, in float32.

    Images are cropped to the square in their middle and resized to `crop_to` by Lanczos' filter,
    then as the checkpoint wants it: to its own size bicubically, less its mean, over its deviation.
    Both times bytes come out, as from Pillow.

    Args:
      parallel: the devices.
      batch_size: images or captions, over all devices.
      checkpoint: a directory, see `weights.clip.read`, with the files of the tokenizer.
      prefix: whose tokens stand before those of each caption; what is longer than the network's
        texts is cut.
      crop_to: height and width, pixels; 0 leaves the checkpoint's own size alone, for square
        images.

    Raises:
      ValueError: files are missing, damaged or of another network; the devices cannot share a
        batch.
    """
    settings, tensors = clip.read(checkpoint)
    (mean, std), size = clip.normalisation(checkpoint), settings["vision"]["image_size"]
    tokens = tokenizer.load(checkpoint, length=settings["text"]["max_length"], prefix=prefix)
    network = lookup.find("models", settings["name"])(
        **{key: value for key, value in settings.items() if key != "name"}
    )
    params = state_dict.from_torch(tensors, network.abstract)
    digest = features.digest(params, sorted(settings.items()), mean, std, tokens.digest, crop_to)
    mean, std = (np.float32(a)[None, None, None] for a in (mean, std))

    def images(params, images):
        images = images.astype(jnp.float32)
        if crop_to:
            images = resize.bytes_resize(resize.center_crop(images), crop_to, "lanczos")
        images = resize.bytes_resize(images, size, "bicubic")
        with jax.default_matmul_precision("float32"):  # the defaults of some devices are shorter
            return network.bind(params).images((images / 255 - mean) / std)

    def texts(params, ids):
        with jax.default_matmul_precision("float32"):
            return network.bind(params).texts(ids)

    of_images, of_texts = (
        parallel.in_batches("clip batch_size", tower, batch_size) for tower in (images, texts)
    )
    params = sharding.place(params, parallel.replicated)

    def checked(pixels):
        if not crop_to and pixels.shape[1] != pixels.shape[2]:
            raise ValueError(
                f"images are {pixels.shape[1]} x {pixels.shape[2]}, expected square ones; set "
                "crop_to to crop them."
            )
        return of_images(params, pixels)

    return ClipScore(
        _name(settings), digest, checked, lambda captions: of_texts(params, tokens.ids(captions))
    )


def score(images: np.ndarray, texts: np.ndarray) -> float:
    """The mean cosine of unit vectors [N, D] and [N, D]: of each image and its own caption."""
    if images.shape != texts.shape:
        raise ValueError(
            f"there are {len(images)} images and {len(texts)} captions in vectors of "
            f"{images.shape[1]} and {texts.shape[1]};"
            " expected one caption for each image, of the same CLIP."
        )
    return float(np.einsum("nd,nd->n", images, texts, dtype=np.float64).mean())


def _name(settings):
    """OpenCLIP's; other sizes than its own are called by their numbers."""
    vision = settings["vision"]
    width, depth = vision["hidden_size"], vision["num_layers"]
    parts = ["ViT", SIZES.get((width, depth), f"{width}x{depth}"), str(vision["patch_size"])]
    parts += [str(vision["image_size"])] * (vision["image_size"] != 224) + ["quickgelu"] * (
        vision["act"] == "quick_gelu"
    )
    return "-".join(parts)
