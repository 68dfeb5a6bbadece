"""The CLIP score (Hessel et al., arXiv 2104.08718) as DMD and InstaFlow report it.

It is the mean cosine of images and their own captions,

    score = mean_i <f(x_i), g("A photo depicts" + caption_i)>,

where f and g are CLIP's two towers, which give unit vectors. The cosine, about 0.3, is not
multiplied by 100 or 2.5, and negative cosines are not replaced by 0.
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

# OpenCLIP's names of (width, layers).
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
      name: OpenCLIP's name of the network, such as "ViT-g-14", or "ViT-B-32-quickgelu" for a
        network of OpenAI.
      digest: the digest of parameters, tokenizer and preprocessing.
      images: `(bytes [N, H, W, 3]) -> unit vectors [N, D]`, float32, numpy.
      texts: `(list of N captions) -> unit vectors [N, D]`, float32, numpy.
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
    """Returns the CLIP of a checkpoint, in float32.

    Images are cropped to the square in their middle and resized to `crop_to` by Lanczos' filter.
    Then they are resized bicubically to the checkpoint's own size, and normalised by its mean and
    standard deviation. Both times the result is rounded to bytes, as in Pillow.

    Args:
      parallel: the devices.
      batch_size: images or captions in a batch, over all devices.
      checkpoint: a directory, see `weights.clip.read`, with the files of the tokenizer.
      prefix: text before each caption; texts that are too long for the network are cut.
      crop_to: height and width, in pixels; 0 = only the resize to the checkpoint's own size, for
        square images.

    Raises:
      ValueError: files are missing, damaged or of another network; the devices cannot share a
        batch.
    """
    settings, tensors = clip.read(checkpoint)
    mean, std = clip.normalisation(checkpoint)
    size = settings["vision"]["image_size"]
    tokens = tokenizer.load(checkpoint, length=settings["text"]["max_length"], prefix=prefix)
    arguments = {key: value for key, value in settings.items() if key != "name"}
    network = lookup.find("models", settings["name"])(**arguments)
    params = state_dict.from_torch(tensors, network.abstract)
    digest = features.digest(params, sorted(settings.items()), mean, std, tokens.digest, crop_to)
    mean, std = (np.array(a, np.float32)[None, None, None] for a in (mean, std))

    def images(params, images):
        images = images.astype(jnp.float32)
        if crop_to:
            images = resize.bytes_resize(resize.center_crop(images), crop_to, "lanczos")
        images = resize.bytes_resize(images, size, "bicubic")
        with jax.default_matmul_precision("float32"):  # some devices use less by default
            return network.bind(params).images((images / 255 - mean) / std)

    def texts(params, ids):
        with jax.default_matmul_precision("float32"):
            return network.bind(params).texts(ids)

    of_images = parallel.in_batches("clip batch_size", images, batch_size)
    of_texts = parallel.in_batches("clip batch_size", texts, batch_size)
    params = sharding.place(params, parallel.replicated)

    def vectors_of_images(pixels):
        if not crop_to and pixels.shape[1] != pixels.shape[2]:
            raise ValueError(
                f"images are {pixels.shape[1]} x {pixels.shape[2]}, expected square ones; set "
                "crop_to to crop them."
            )
        return of_images(params, pixels)

    def vectors_of_texts(captions):
        return of_texts(params, tokens.ids(captions))

    return ClipScore(_name(settings), digest, vectors_of_images, vectors_of_texts)


def score(images: np.ndarray, texts: np.ndarray) -> float:
    """Returns the mean cosine of each image and its own caption.

    Args:
      images: unit vectors [N, D].
      texts: unit vectors [N, D].

    Raises:
      ValueError: the shapes differ.
    """
    if images.shape != texts.shape:
        raise ValueError(
            f"there are {len(images)} images and {len(texts)} captions in vectors of "
            f"{images.shape[1]} and {texts.shape[1]}; "
            "expected one caption for each image, of the same CLIP."
        )
    return float(np.einsum("nd,nd->n", images, texts, dtype=np.float64).mean())


def _name(settings):
    """Returns OpenCLIP's name; a size that OpenCLIP does not have is named by its numbers."""
    vision = settings["vision"]
    width = vision["hidden_size"]
    depth = vision["num_layers"]
    parts = ["ViT", SIZES.get((width, depth), f"{width}x{depth}"), str(vision["patch_size"])]
    if vision["image_size"] != 224:
        parts.append(str(vision["image_size"]))
    if vision["act"] == "quick_gelu":
        parts.append("quickgelu")
    return "-".join(parts)
