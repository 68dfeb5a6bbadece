"""The measurements of a set of generated images against a set of real ones by a protocol, in one
pass over each set.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from dmd_jax import features as features_lib
from dmd_jax import lookup, sharding
from dmd_jax.data import pixels
from dmd_jax.evals import clip_score, drift, frechet, kid, precision_recall, protocols, retrieval
from dmd_jax.evals import diversity as diversity_lib

LEAST = precision_recall.K_DENSITY + 1  # images of a set


class Suite(NamedTuple):
    """What a protocol measures with.

    Attributes:
      protocol: that it is of.
      features: the space in which images are compared.
      parallel: the devices.
      clip: of the CLIP score; None for none.
      diversity: `(images, pairs, seed) -> mean distance by LPIPS`; None for none.
      digests: of the weights of the features, of CLIP and of LPIPS.
    """

    protocol: protocols.Protocol
    features: features_lib.Features
    parallel: sharding.Parallel
    clip: clip_score.ClipScore | None
    diversity: Callable | None
    digests: dict[str, str]


class Batch(NamedTuple):
    """Some images, one after another.

    Attributes:
      images: [N, H, W, C], bytes or floats in [-1, 1], as the protocol's features see them.
      labels: that they were made for, [N]; None without classes.
      texts: that they were made for, N; None without texts.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    texts: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class Collected:
    """What is kept of a set of images.

    Attributes:
      count: of the images; 0 where a file of statistics does not say.
      moments: of all their features.
      features: of some of them, evenly spaced, [M, D]; None for statistics that came from
        elsewhere.
      colours: sums of brightness, saturation and contrast; None for statistics that came from
        elsewhere.
      agreement: the fraction that the features' classifier gives the label they were made for; None
        without a classifier, or labels.
      texts: scores of the texts they were made for; {} for none.
      diversity: mean distance of pairs by LPIPS; None where that is not measured.
      floor: scores of one half of the images against the other; {} where that was not asked for.
      origin: a digest of the images, or of the file of statistics; "" for generated ones.
    """

    count: int
    moments: frechet.Moments
    features: np.ndarray | None = None
    colours: drift.Sums | None = None
    agreement: float | None = None
    texts: dict[str, float] = dataclasses.field(default_factory=dict)
    diversity: float | None = None
    floor: dict[str, float] = dataclasses.field(default_factory=dict)
    origin: str = ""


def make(
    protocol: protocols.Protocol,
    parallel: sharding.Parallel,
    *,
    features: dict,
    clip: str,
    lpips: str,
    batch_size: int,
) -> Suite:
    """The suite of a protocol.

    Args:
      protocol: with its features' arguments.
      parallel: the devices.
      features: the arguments that the protocol leaves open, such as the file of the weights.
      clip: directory of the CLIP model; "" = no CLIP score.
      lpips: file of LPIPS' weights; "" = no diversity.
      batch_size: images, over all devices, of CLIP and LPIPS.

    Raises:
      ValueError: files are missing, damaged or of another network than the protocol's.
    """
    settings = protocols.fill(protocol.features, features, "features")
    if "images" in settings:
        settings["images"] = lookup.open_source(settings["images"])
    network = lookup.find("features", settings.pop("name"))(parallel, **settings)
    digests, scorer, distance = {network.name: network.digest}, None, None
    if clip:
        if not protocol.clip:
            raise ValueError(
                f"the protocol {protocol.name} has no CLIP score; leave the CLIP model out, or "
                "choose another protocol."
            )
        scorer = clip_score.make(
            parallel,
            batch_size=batch_size,
            checkpoint=clip,
            prefix=protocol.prefix,
            crop_to=protocol.crop_to,
        )
        if scorer.name != protocol.clip:
            raise ValueError(
                f"{clip} holds CLIP's {scorer.name}, but the protocol {protocol.name} has "
                f"{protocol.clip}; name that one."
            )
        digests[f"CLIP {scorer.name}"] = scorer.digest
    if lpips:
        distance = diversity_lib.make(
            parallel, batch_size=batch_size, weights=lpips, size=protocol.diversity[2] or None
        )
        digests["LPIPS"] = distance.digest
    return Suite(protocol, network, parallel, scorer, distance, digests)


def collect(
    suite: Suite, batches: Iterable[Batch], count: int, *, name: str = "", with_floor: bool = False
) -> Collected:
    """Goes through `count` images once.

    Args:
      suite: what to measure with.
      batches: of any sizes; the result does not depend on them.
      count: of the images of all batches.
      name: of the images, on the progress bar.
      with_floor: also measure one half of the images against the other: those of even places
        against those of odd ones.

    Raises:
      ValueError: there are too few images for what is measured.
    """
    diversity, total, start = suite.protocol.diversity, None, 0
    kept_of = _evenly(count, suite.protocol.neighbours)
    with tqdm.tqdm(desc=name, total=count, unit="image", disable=None if name else True) as bar:
        for batch in batches:
            part = _measure(suite, batch, np.arange(start, start + len(batch.images)), kept_of)
            total = part if total is None else total + part
            start += len(batch.images)
            bar.update(len(batch.images))
    if start != count:
        raise ValueError(f"expected {count} images, got {start}.")
    kept = np.concatenate(total.kept)
    floor = {}
    if with_floor and count > 2 * precision_recall.K_DENSITY + 1:
        even = Collected(
            total.even.count, frechet.moments(total.even), kept[::2], total.even_colours
        )
        odd = Collected(total.odd.count, frechet.moments(total.odd), kept[1::2], total.odd_colours)
        floor = compare(suite, even, odd)
    return Collected(
        count=count,
        moments=frechet.moments(total.even + total.odd),
        features=kept,
        colours=total.even_colours + total.odd_colours,
        agreement=sum(total.agreeing) / count if total.agreeing else None,
        texts=_of_texts(
            suite, np.concatenate(total.images), np.concatenate(total.captions), total.texts
        )
        if total.texts
        else {},
        diversity=suite.diversity(np.stack(total.pictures), diversity[1], 0)
        if len(total.pictures) > 1
        else None,
        floor=floor,
    )


class _Part(NamedTuple):
    """What is kept of some images; that of others is added to it."""

    even: frechet.Sums  # of the images at even places
    odd: frechet.Sums
    even_colours: drift.Sums
    odd_colours: drift.Sums
    kept: list[np.ndarray]  # features
    agreeing: list[int]  # images that show their labels
    pictures: list[np.ndarray]  # for the diversity
    images: list[np.ndarray]  # by CLIP
    captions: list[np.ndarray]  # by CLIP
    texts: list[str]

    def __add__(self, other):
        return _Part(*(a + b for a, b in zip(self, other, strict=True)))


def _measure(suite, batch, places, kept_of):
    """Of the images at these places; features of those at `kept_of` are kept."""
    protocol, features, images = suite.protocol, suite.features.extract(batch.images), batch.images
    as_bytes, odd = pixels.to_uint8(images), places % 2 == 1
    labelled, told = (
        suite.features.predict and batch.labels is not None,
        suite.clip and batch.texts is not None,
    )
    return _Part(
        even=frechet.sums(features[~odd]),
        odd=frechet.sums(features[odd]),
        even_colours=drift.sums(as_bytes[~odd]),
        odd_colours=drift.sums(as_bytes[odd]),
        kept=[features[np.isin(places, kept_of)]],
        agreeing=[int((suite.features.predict(images) == batch.labels).sum())] if labelled else [],
        pictures=list(images[places < protocol.diversity[0]]) if suite.diversity else [],
        images=[suite.clip.images(images)] if told else [],
        captions=[suite.clip.texts(list(batch.texts))] if told else [],
        texts=list(batch.texts) if told else [],
    )


def _evenly(count, wanted):
    """Places of `wanted` of `count` images."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int))


def _of_texts(suite, images, vectors, texts):
    found = retrieval.recall(images, texts, vectors, texts)
    return {f"CLIP-{suite.clip.name}": clip_score.score(images, vectors)} | {
        f"{k} of captions": value for k, value in found.items()
    }


def over_ranges(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of ranges of seeds, EDM reports the minimum of the Frechet distance; its mean stands beside
    it, and of the other scores the mean.
    """
    means, frechet = (
        {name: float(np.mean([s[name] for s in scores])) for name in scores[0]},
        next(iter(scores[0])),
    )
    return (
        means
        if len(scores) == 1
        else means | {frechet: min(s[frechet] for s in scores), f"{frechet} mean": means[frechet]}
    )


def distances(suite: Suite, real: Collected) -> dict[str, None]:
    """Names of what `compare` has that is the lower the better."""
    return dict.fromkeys(
        [suite.features.frechet] + [suite.features.kernel] * (real.features is not None)
    )


def compare(suite: Suite, real: Collected, fake: Collected) -> dict[str, float]:
    """Scores of generated images; those that need what is not there are left out.

    Returns:
      The Frechet and the kernel distance (lower is better), precision, recall, density and
      coverage, colours, the agreement with the labels, the scores of texts, the diversity.

    Raises:
      ValueError: `real` has features of another size.
    """
    if real.moments.mean.shape != fake.moments.mean.shape:
        raise ValueError(
            f"the reference statistics have {len(real.moments.mean)} dimensions, "
            f"{suite.features.name} has {len(fake.moments.mean)}: "
            "they are of another feature network."
        )
    result = {suite.features.frechet: frechet.frechet_distance(real.moments, fake.moments)}
    if real.features is not None:
        result[suite.features.kernel] = kid.kernel_distance(
            real.features, fake.features, suite.parallel
        )
        result |= precision_recall.precision_recall(real.features, fake.features, suite.parallel)
    if real.colours is not None and fake.colours is not None:
        result |= drift.drift(real.colours, fake.colours)
    if fake.agreement is not None:
        result["agreement"] = fake.agreement
    result |= fake.texts
    return result if fake.diversity is None else result | {"pairwise LPIPS": fake.diversity}
