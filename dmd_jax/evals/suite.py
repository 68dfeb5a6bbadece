"""The measurements of a set of generated images against a set of real ones by a protocol, in one pass over each set."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from dmd_jax import distributed, lookup, metrics, sharding, storage
from dmd_jax.data import pipeline
from dmd_jax.evals import clip_score, drift, frechet, kid, precision_recall, protocols, retrieval
from dmd_jax.evals import diversity as diversity_lib
from dmd_jax.evals import features as features_lib
from dmd_jax.weights import files

READ = 500  # real images at a time
PAIRWISE = "pairwise LPIPS"


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
      features: of some of them, evenly spaced, [M, D]; None for statistics that came from elsewhere.
      colours: sums of brightness, saturation and contrast; None for statistics that came from elsewhere.
      agreement: the fraction that the features' classifier gives the label they were made for; None without a classifier, or labels.
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


def make(protocol: protocols.Protocol, parallel: sharding.Parallel, *, features: dict, clip: str, lpips: str, batch_size: int) -> Suite:
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
    network = lookup.find("evals", settings.pop("name"))(parallel, **settings)
    digests, scorer, distance = {network.name: network.digest}, None, None
    if clip:
        if not protocol.clip:
            raise ValueError(f"the protocol {protocol.name} has no CLIP score; leave the CLIP model out, or choose another protocol.")
        scorer = clip_score.make(parallel, batch_size=batch_size, checkpoint=clip, prefix=protocol.prefix, crop_to=protocol.crop_to)
        if scorer.name != protocol.clip:
            raise ValueError(f"{clip} holds CLIP's {scorer.name}, but the protocol {protocol.name} has {protocol.clip}; name that one.")
        digests[f"CLIP {scorer.name}"] = scorer.digest
    if lpips:
        distance = diversity_lib.make(parallel, batch_size=batch_size, weights=lpips)
        digests["LPIPS"] = distance.digest
    return Suite(protocol, network, parallel, scorer, distance, digests)


def collect(suite: Suite, batches: Iterable[Batch], count: int, *, name: str = "", with_floor: bool = False) -> Collected:
    """Goes through `count` images once.

    Args:
      suite: what to measure with.
      batches: of any sizes; the result does not depend on them.
      count: of the images of all batches.
      name: of the images, on the progress bar.
      with_floor: also measure one half of the images against the other: those of even places against those of odd ones.

    Raises:
      ValueError: there are too few images for what is measured.
    """
    diversity, total, start = suite.protocol.diversity, None, 0
    with tqdm.tqdm(desc=name, total=count, unit="image", disable=None if name else True) as bar:
        for batch in batches:
            part = _measure(suite, batch, np.arange(start, start + len(batch.images)), count)
            total = part if total is None else total + part
            start += len(batch.images)
            bar.update(len(batch.images))
    if start != count:
        raise ValueError(f"expected {count} images, got {start}.")
    kept = np.concatenate(total.kept)
    floor = {}
    if with_floor and count > 2 * precision_recall.K_DENSITY + 1:
        even = Collected(total.even.count, frechet.moments(total.even), kept[::2], total.even_colours)
        odd = Collected(total.odd.count, frechet.moments(total.odd), kept[1::2], total.odd_colours)
        floor = compare(suite, even, odd)
    return Collected(
        count=count,
        moments=frechet.moments(total.even + total.odd),
        features=kept,
        colours=total.even_colours + total.odd_colours,
        agreement=sum(total.agreeing) / count if total.agreeing else None,
        texts=_of_texts(suite, np.concatenate(total.images), np.concatenate(total.captions), total.texts) if total.texts else {},
        diversity=suite.diversity(np.stack(total.pictures), diversity[1], 0) if len(total.pictures) > 1 else None,
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


def _measure(suite, batch, places, count):
    """Of the images at these places of `count`."""
    protocol, features, images = suite.protocol, suite.features.extract(batch.images), batch.images
    as_bytes, odd = images if images.dtype == np.uint8 else metrics.to_uint8(images), places % 2 == 1
    labelled, told = suite.features.predict and batch.labels is not None, suite.clip and batch.texts is not None
    return _Part(
        even=frechet.sums(features[~odd]),
        odd=frechet.sums(features[odd]),
        even_colours=drift.sums(as_bytes[~odd]),
        odd_colours=drift.sums(as_bytes[odd]),
        kept=[features[np.isin(places, _evenly(count, protocol.neighbours))]],
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
    return {f"CLIP-{suite.clip.name}": clip_score.score(images, vectors)} | {f"{k} of captions": value for k, value in found.items()}


def reference(suite: Suite, source, statistics: str, directory: str | os.PathLike) -> Collected:
    """The real images that a suite compares with.

    Args:
      suite: what to measure with.
      source: of them; None for none.
      statistics: a file of their features' statistics, which take the place of those of `source`; "" for none.
      directory: where statistics of sources are kept.

    Raises:
      ValueError: there are none, or another number than the protocol's; see `collect_source` and `read`.
    """
    protocol = suite.protocol
    if source is None and not statistics:
        raise ValueError(f"the protocol {protocol.name} needs a reference; name real images, or a file of their statistics.")
    given = read(files.find(statistics), suite.features) if statistics else None
    if given:
        given = dataclasses.replace(given, origin=files.sha256(statistics))
    if source is None:
        return given
    if protocol.reference_count not in (0, len(source)):
        expected = f"that of the protocol {protocol.name} has {protocol.reference_count}"
        raise ValueError(f"the reference has {len(source)} images, {expected}; give it all of them.")
    real = collect_source(suite, source, directory, with_floor=not protocol.floor)
    return dataclasses.replace(real, moments=given.moments, floor={}, origin=f"{given.origin} {real.origin}") if given else real


def collect_source(suite: Suite, source, directory: str | os.PathLike, *, name: str = "reference", with_floor: bool = False) -> Collected:
    """As `collect`, for a whole data source; kept in a file of `directory`, by the digests of all that it follows from.

    Raises:
      ValueError: an image cannot be read.
    """
    wanted, origin = f"{suite.protocol.quantisation == 'none'} {suite.protocol.neighbours} {with_floor}", content(source)
    key = hashlib.sha256(f"{suite.features.digest} {wanted} {origin}".encode()).hexdigest()[:16]
    path = storage.path(directory) / f"reference-{key}.npz"
    if not distributed.gather(path.exists()).all():
        real = collect(suite, batches(suite.protocol, source, range(len(source))), len(source), name=name, with_floor=with_floor)
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, suite, real)
        distributed.barrier(f"{path} is there")
    return dataclasses.replace(read(path, suite.features), origin=origin)


def content(source) -> str:
    """A digest of a source: of everything in it if it knows that, else of its length and a sample."""
    return getattr(source, "digest", None) or pipeline.fingerprint({"": pipeline.Stream(source, 1)}, seed=0)


def batches(protocol: protocols.Protocol, source, indices: range) -> Iterator[Batch]:
    """The images of these rows of a data source, whose bytes they are. Threads read them: Pillow decodes without Python's lock."""
    with futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(indices), READ):
            rows = list(pool.map(source.__getitem__, indices[start : start + READ]))
            images = np.stack([row["image"] for row in rows])
            labels = np.stack([row["cond"] for row in rows]) if "cond" in rows[0] else None
            yield Batch(images if protocol.quantisation == "none" else metrics.to_uint8(images), labels)


def over_ranges(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of ranges of seeds, EDM reports the minimum of the Frechet distance; its mean stands beside it, and of the other scores the mean."""
    means, frechet = {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}, next(iter(scores[0]))
    return means if len(scores) == 1 else means | {frechet: min(s[frechet] for s in scores), f"{frechet} mean": means[frechet]}


def write(path: str | os.PathLike, suite: Suite, collected: Collected):
    """Writes an `.npz` that pytorch-fid and EDM read as well: "mu" [D] and "sigma" [D, D], and what else was collected."""
    arrays = dict(mu=collected.moments.mean, sigma=collected.moments.covariance, count=collected.count, kept=collected.features)
    rest = {"features": suite.features.digest, "name": suite.features.name}
    rest |= {"colours": collected.colours, "agreement": collected.agreement, "floor": collected.floor}
    with storage.writing(path) as file:
        np.savez(file, **arrays, rest=json.dumps(rest))


def read(path: str | os.PathLike, features: features_lib.Features) -> Collected:
    """Statistics from an `.npz` of "mu" [D] and "sigma" [D, D], as EDM and pytorch-fid have them, or one of our own.

    Raises:
      ValueError: the file is damaged, or of another feature network.
    """
    try:
        with np.load(storage.local(path)) as file:
            arrays = dict(file)
        mean, covariance = np.float64(arrays["mu"]), np.float64(arrays["sigma"])
        if covariance.shape != 2 * mean.shape:
            raise ValueError(f"mu has shape {mean.shape} and sigma {covariance.shape}")
        if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
            raise ValueError("not all are finite")
        rest = json.loads(str(arrays.get("rest", "{}")))
        sums = drift.Sums(*rest["colours"]) if rest else None
    except Exception as error:  # numpy, zipfile and zlib raise all kinds for damaged files
        raise ValueError(
            f"{path} holds no statistics ({error}); expected arrays mu [D] and sigma [D, D]. Delete it, or get it again."
        ) from error
    if rest.get("features", features.digest) != features.digest:
        raise ValueError(
            f"{path} was made with the features {rest['name']} ({rest['features']}), expected {features.name} ({features.digest}); make it "
            "again, or choose the protocol that it is of."
        )
    moments, kept = frechet.Moments(mean, covariance), arrays.get("kept")
    return Collected(int(arrays.get("count", 0)), moments, kept, sums, rest.get("agreement"), floor=rest.get("floor", {}))


def names(suite: Suite, real: Collected) -> dict[str, None]:
    """Those of what `compare` has for images that are made for labels, or for texts."""
    found = [suite.features.frechet]
    if real.features is not None:
        found += [suite.features.kernel, *precision_recall.NAMES]
    if real.colours is not None:
        found += drift.drift(real.colours, real.colours)
    if suite.features.predict:
        found.append("agreement")
    if suite.clip:
        found += _of_texts(suite, *2 * [np.eye(2)], ["a", "b"])
    return dict.fromkeys([*found, PAIRWISE] if suite.diversity else found)


def compare(suite: Suite, real: Collected, fake: Collected) -> dict[str, float]:
    """Scores of generated images; those that need what is not there are left out.

    Returns:
      The Frechet and the kernel distance (lower is better), precision, recall, density and coverage, colours, the agreement with the
      labels, the scores of texts, the diversity.

    Raises:
      ValueError: `real` has features of another size.
    """
    if real.moments.mean.shape != fake.moments.mean.shape:
        raise ValueError(
            f"the reference statistics have {len(real.moments.mean)} dimensions, {suite.features.name} has {len(fake.moments.mean)}: "
            "they are of another feature network."
        )
    result = {suite.features.frechet: frechet.frechet_distance(real.moments, fake.moments)}
    if real.features is not None:
        result[suite.features.kernel] = kid.kernel_distance(real.features, fake.features, suite.parallel)
        result |= precision_recall.precision_recall(real.features, fake.features, suite.parallel)
    if real.colours is not None and fake.colours is not None:
        result |= drift.drift(real.colours, fake.colours)
    if fake.agreement is not None:
        result["agreement"] = fake.agreement
    result |= fake.texts
    return result if fake.diversity is None else result | {PAIRWISE: fake.diversity}
