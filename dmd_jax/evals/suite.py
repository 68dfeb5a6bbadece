"""Measures sets of generated images against real ones, in one pass over each set."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from dmd_jax import features as features_lib
from dmd_jax import lookup, sharding
from dmd_jax.data import pixels
from dmd_jax.evals import (
    clip_score,
    drift,
    frechet,
    kid,
    precision_recall,
    protocols,
    result,
    retrieval,
)
from dmd_jax.evals import diversity as diversity_lib

LEAST = precision_recall.K_DENSITY + 1  # images of a set


class Suite(NamedTuple):
    """The networks that a protocol measures with.

    Attributes:
      protocol: the protocol.
      features: the space in which images are compared.
      parallel: the devices.
      clip: for the CLIP score; None for none.
      diversity: `(images, pairs, seed) -> mean distance by LPIPS`; None for none.
      digests: of the weights of the features, of CLIP and of LPIPS.
    """

    protocol: protocols.Protocol
    features: features_lib.Features
    parallel: sharding.Parallel
    clip: clip_score.ClipScore | None
    diversity: diversity_lib.Diversity | None
    digests: dict[str, str]


class Batch(NamedTuple):
    """Some images, one after another.

    Attributes:
      images: [N, H, W, C], bytes or floats in [-1, 1], as the protocol's features see them.
      labels: the classes that they should show, [N]; None without classes.
      texts: the N texts that they should show; None without texts.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    texts: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class Collected:
    """What is kept of a set of images.

    Attributes:
      count: number of the images; 0 where a file of statistics does not say it.
      moments: mean and covariance of all their features.
      features: those of some images, evenly spaced, [M, D]; None for statistics that came from
        elsewhere.
      colours: sums of brightness, saturation and contrast; None for statistics that came from
        elsewhere.
      agreement: the fraction of the images in which the features' classifier sees the class that
        they should show; None without a classifier, or without classes.
      texts: the scores by the texts; {} without texts.
      diversity: the mean distance of pairs by LPIPS; None where it is not measured.
      floor: the scores of one half of the images against the other; {} where nobody asked for them.
      origin: a digest of the images, or of the file of statistics; "" for generated images.
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
    """Builds the suite of a protocol.

    Args:
      protocol: the protocol, which has arguments of its features.
      parallel: the devices.
      features: the arguments that the protocol leaves open, such as the file of the weights.
      clip: directory of the CLIP model; "" = no CLIP score.
      lpips: file of LPIPS' weights; "" = no diversity.
      batch_size: images of CLIP and LPIPS, over all devices.

    Raises:
      ValueError: files are missing, damaged, or of another network than the protocol's.
    """
    settings = protocols.fill(protocol.features, features, "features")
    if "images" in settings:
        settings["images"] = lookup.open_source(settings["images"])
    network = lookup.find("features", settings.pop("name"))(parallel, **settings)
    digests = {network.name: network.digest}
    scorer = None
    if clip:
        scorer = _clip(protocol, parallel, clip, batch_size)
        digests[f"CLIP {scorer.name}"] = scorer.digest
    distance = None
    if lpips:
        size = protocol.diversity[2] or None
        distance = diversity_lib.make(parallel, batch_size=batch_size, weights=lpips, size=size)
        digests["LPIPS"] = distance.digest
    return Suite(protocol, network, parallel, scorer, distance, digests)


def _clip(protocol, parallel, checkpoint, batch_size):
    if not protocol.clip:
        raise ValueError(
            f"the protocol {protocol.name} has no CLIP score; leave the CLIP model out, or "
            "choose another protocol."
        )
    scorer = clip_score.make(
        parallel,
        batch_size=batch_size,
        checkpoint=checkpoint,
        prefix=protocol.prefix,
        crop_to=protocol.crop_to,
    )
    if scorer.name != protocol.clip:
        raise ValueError(
            f"{checkpoint} holds CLIP's {scorer.name}, but the protocol {protocol.name} has "
            f"{protocol.clip}; name that one."
        )
    return scorer


def evaluate(
    suite: Suite,
    real: Collected,
    models: Iterable[tuple[result.Row, Callable[[range], Iterable[Batch]]]],
    *,
    count: int,
    ranges: int,
    metrics: Sequence[Callable] = (),
    floor: Mapping[str, float] | None = None,
    asked: Mapping[str, Any] | None = None,
    keep: Callable[[Collected], None] = lambda collected: None,
) -> result.Result:
    """Measures sets of generated images, one after another.

    Args:
      suite: the networks to measure with.
      real: the real images.
      models: of each set a row without scores by images, and a function that gives the images of
        a range of seeds; scores that the row has already stay.
      count: images of a range.
      ranges: number of ranges.
      metrics: further metrics, `(real, generated) -> scores`.
      floor: the scores of real images.
      asked: what was to be measured.
      keep: a function that gets what was collected of every first range.

    Raises:
      FloatingPointError: images of a set are not finite.
    """
    rows = []
    for row, images in models:
        scores = []
        for r in range(ranges):
            batches = images(range(r * count, (r + 1) * count))
            try:
                fake = collect(suite, batches, count, name=row.name)
            except FloatingPointError as error:
                raise FloatingPointError(f"{row.name}: {error}") from error
            found = compare(suite, real, fake)
            for metric in metrics:
                found |= metric(real, fake)
            scores.append(suite.protocol.named(found, count))
            if r == 0:
                keep(fake)
        every = over_ranges(scores) | dict(row.scores)
        rows.append(dataclasses.replace(row, scores=every, seed_ranges=tuple(scores)))
    mesh = suite.parallel.mesh
    return result.Result(
        asked=asked or {},
        rows=tuple(rows),
        real=floor or {},
        reference={"count": real.count, "digest": real.origin, "agreement": real.agreement},
        networks=suite.digests,
        packages=result.packages(),
        device=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    )


def collect(
    suite: Suite, batches: Iterable[Batch], count: int, *, name: str = "", with_floor: bool = False
) -> Collected:
    """Goes through `count` images once.

    Args:
      suite: the networks to measure with.
      batches: the images, in batches of any sizes; the result does not depend on the sizes.
      count: number of the images.
      name: of the images, on the progress bar; "" for no bar.
      with_floor: also measure one half of the images against the other: those of even places
        against those of odd ones.

    Raises:
      ValueError: there is another number of images.
    """
    kept_of = _evenly(count, suite.protocol.neighbours)
    total = None
    start = 0
    with tqdm.tqdm(desc=name, total=count, unit="image", disable=None if name else True) as bar:
        for batch in batches:
            part = _measure(suite, batch, np.arange(start, start + len(batch.images)), kept_of)
            total = part if total is None else total + part
            start += len(batch.images)
            bar.update(len(batch.images))
    if start != count:
        raise ValueError(f"expected {count} images, got {start}.")
    features = np.concatenate(total.features)
    floor = {}
    if with_floor and count > 2 * precision_recall.K_DENSITY + 1:
        even = _half(total.even, features[::2], total.even_colours)
        odd = _half(total.odd, features[1::2], total.odd_colours)
        floor = compare(suite, even, odd)
    diversity = None
    if len(total.pictures) > 1:
        diversity = suite.diversity(np.stack(total.pictures), suite.protocol.diversity[1], 0)
    return Collected(
        count=count,
        moments=frechet.moments(total.even + total.odd),
        features=features,
        colours=total.even_colours + total.odd_colours,
        agreement=sum(total.agreeing) / count if total.agreeing else None,
        texts=_text_scores(suite, total) if total.texts else {},
        diversity=diversity,
        floor=floor,
    )


def _half(sums, features, colours):
    return Collected(sums.count, frechet.moments(sums), features, colours)


class _Part(NamedTuple):
    """What is kept of some images; the parts of a set add up."""

    even: frechet.Sums  # of the images at even places
    odd: frechet.Sums
    even_colours: drift.Sums
    odd_colours: drift.Sums
    features: list[np.ndarray]  # of some images
    agreeing: list[int]  # images that show their classes
    pictures: list[np.ndarray]  # for the diversity
    images: list[np.ndarray]  # by CLIP
    captions: list[np.ndarray]  # by CLIP
    texts: list[str]

    def __add__(self, other):
        return _Part(*(a + b for a, b in zip(self, other, strict=True)))


def _measure(suite, batch, places, kept_of):
    """Measures the images at these places; keeps the features of those at `kept_of`."""
    images = batch.images
    features = suite.features.extract(images)
    as_bytes = pixels.to_uint8(images)
    odd = places % 2 == 1
    part = _Part(
        even=frechet.sums(features[~odd]),
        odd=frechet.sums(features[odd]),
        even_colours=drift.sums(as_bytes[~odd]),
        odd_colours=drift.sums(as_bytes[odd]),
        features=[features[np.isin(places, kept_of)]],
        agreeing=[],
        pictures=[],
        images=[],
        captions=[],
        texts=[],
    )
    if suite.features.predict and batch.labels is not None:
        part.agreeing.append(int((suite.features.predict(images) == batch.labels).sum()))
    if suite.diversity:
        part.pictures.extend(images[places < suite.protocol.diversity[0]])
    if suite.clip and batch.texts is not None:
        part.images.append(suite.clip.images(images))
        part.captions.append(suite.clip.texts(list(batch.texts)))
        part.texts.extend(batch.texts)
    return part


def _evenly(count, wanted):
    """Returns the places of `wanted` of `count` images."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int))


def _text_scores(suite, total):
    images = np.concatenate(total.images)
    captions = np.concatenate(total.captions)
    recall = retrieval.recall(images, total.texts, captions, total.texts)
    scores = {f"CLIP-{suite.clip.name}": clip_score.score(images, captions)}
    return scores | {f"{k} of captions": value for k, value in recall.items()}


def over_ranges(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combines the scores of several ranges of seeds.

    Of the Frechet distance, which comes first, these are the minimum, as EDM reports it, and the
    mean; of every other score the mean.
    """
    means = {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}
    if len(scores) == 1:
        return means
    distance = next(iter(means))
    lowest = min(s[distance] for s in scores)
    return means | {distance: lowest, f"{distance} mean": means[distance]}


def distances(suite: Suite, real: Collected) -> list[str]:
    """Lists the scores of `compare` that are the lower the better."""
    kernel = [suite.features.kernel] if real.features is not None else []
    return [suite.features.frechet, *kernel]


def compare(suite: Suite, real: Collected, fake: Collected) -> dict[str, float]:
    """Scores generated images; leaves out the scores that need what is not there.

    Returns:
      The Frechet and the kernel distance (lower is better), precision, recall, density and
      coverage, colours, the agreement with the classes, the scores by texts, the diversity.

    Raises:
      ValueError: `real` has features of another size.
    """
    if real.moments.mean.shape != fake.moments.mean.shape:
        raise ValueError(
            f"the reference statistics have {len(real.moments.mean)} dimensions, "
            f"{suite.features.name} has {len(fake.moments.mean)}: "
            "they are of another feature network."
        )
    scores = {suite.features.frechet: frechet.frechet_distance(real.moments, fake.moments)}
    if real.features is not None:
        distance = kid.kernel_distance(real.features, fake.features, suite.parallel)
        scores[suite.features.kernel] = distance
        scores |= precision_recall.precision_recall(real.features, fake.features, suite.parallel)
    if real.colours is not None and fake.colours is not None:
        scores |= drift.drift(real.colours, fake.colours)
    if fake.agreement is not None:
        scores["agreement"] = fake.agreement
    scores |= fake.texts
    if fake.diversity is not None:
        scores["pairwise LPIPS"] = fake.diversity
    return scores
