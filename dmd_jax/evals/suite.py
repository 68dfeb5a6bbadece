"""The measurements of a set of generated images against a set of real ones, in one pass over each."""

import dataclasses
import os
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from dmd_jax import distributed, storage
from dmd_jax.data import captions, pipeline
from dmd_jax.evals import features as features_lib
from dmd_jax.evals import frechet, kid, precision_recall


class Collected(NamedTuple):
    """What is kept of a set of images.

    Attributes:
      count: of the images.
      moments: of all their features.
      features: of the first ones, [M, D], for what needs single images; None for statistics that came as a file.
      agreement: the fraction that the features' classifier gives the label they were made for; None without a classifier.
      skipped: how many images could not be read.
    """

    count: int
    moments: frechet.Moments
    features: np.ndarray | None
    agreement: float | None = None
    skipped: int = 0


def scores(features: features_lib.Features) -> tuple[str, ...]:
    """Names of what `compare` returns, lower is better for the first two."""
    names = (features.frechet, features.kernel, "precision", "recall", "coverage")
    return (*names, "agreement") if features.predict else names


def collect(features: features_lib.Features, batches: Iterable[tuple[np.ndarray, np.ndarray]], neighbours: int) -> Collected:
    """Goes through batches of (images [N, H, W, C], labels [N]) and keeps the features of the first `neighbours` images."""
    sums, kept, agreeing = None, [], 0
    for images, cond in batches:
        extracted = features.extract(images)
        kept.append(extracted[: max(neighbours - sum(map(len, kept)), 0)])
        sums = frechet.sums(extracted) if sums is None else sums + frechet.sums(extracted)
        agreeing += (features.predict(images) == cond).sum() if features.predict else 0
    return Collected(sums.count, frechet.moments(sums), np.concatenate(kept), agreeing / sums.count if features.predict else None)


def collect_source(features: features_lib.Features, source, neighbours: int, directory: str | os.PathLike) -> Collected:
    """As `collect`, for a whole data source; kept in a file of `directory`, by the features' and the content's digests.

    Raises:
      ValueError: more than a few rows cannot be read.
    """
    content = pipeline.fingerprint({"": pipeline.Stream(_Lenient(source), 1)}, seed=neighbours)
    path = storage.path(directory) / f"reference-{features.digest}-{content}.npz"
    if not distributed.gather(path.exists()).all():
        skipped = []
        real = collect(features, _batches(source, skipped), neighbours)
        if skipped:
            warnings.warn(f"{len(skipped)} of {len(source)} images were left out: {'; '.join(skipped[:3])}", stacklevel=2)
        if jax.process_index() == 0:
            _write(path, features, real._replace(skipped=len(skipped)))
        distributed.barrier(f"{path} is there")
    return read(path, features)


def _write(path, features, real):
    agreement = np.nan if real.agreement is None else real.agreement
    with storage.writing(path) as file:
        np.savez(file, mu=real.moments.mean, sigma=real.moments.covariance, kept=real.features, count=real.count,
                 agreement=agreement, features=features.digest, skipped=real.skipped)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Lenient:
    """A source that has None for a row that cannot be read."""

    source: object

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        rows, _ = captions.readable(self.source, [index])
        return rows.get(index)


def _batches(source, skipped):
    """Images and labels of the rows that can be read; why the others cannot is appended to `skipped`."""
    for start in range(0, len(source), 500):
        rows, bad = captions.readable(source, range(start, min(start + 500, len(source))))
        skipped += bad
        captions.refuse_if_many(skipped, len(source))
        if rows:
            yield np.stack([row["image"] for row in rows.values()]), np.stack([row.get("cond", 0) for row in rows.values()])


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
        count, agreement = int(arrays.get("count", 0)), float(arrays.get("agreement", np.nan))
        skipped = int(arrays.get("skipped", 0))
    except Exception as error:  # numpy, zipfile and zlib raise all kinds for damaged files
        raise ValueError(
            f"{path} holds no statistics ({error}); expected arrays mu [D] and sigma [D, D]. Delete it, or get it again."
        ) from error
    digest = str(arrays.get("features", features.digest))
    if digest != features.digest:
        raise ValueError(f"{path} was made with other features ({digest}) than {features.name} ({features.digest}); make it again.")
    return Collected(count, frechet.Moments(mean, covariance), arrays.get("kept"), None if np.isnan(agreement) else agreement, skipped)


def compare(features: features_lib.Features, real: Collected, fake: Collected) -> dict[str, float]:
    """Scores of generated images.

    Returns:
      The Frechet and the kernel distance (lower is better), precision, recall, coverage, and the agreement with the labels. Those that
      need single real images are left out where there are none.

    Raises:
      ValueError: `real` has features of another size.
    """
    if real.moments.mean.shape != fake.moments.mean.shape:
        raise ValueError(
            f"the reference statistics have {len(real.moments.mean)} dimensions, {features.name} has {len(fake.moments.mean)}: "
            "they are of another feature network."
        )
    result = {features.frechet: frechet.frechet_distance(real.moments, fake.moments)}
    if real.features is not None:
        result[features.kernel] = kid.kernel_distance(real.features, fake.features)
        result |= precision_recall.precision_recall(real.features, fake.features)
    return result if fake.agreement is None else result | {"agreement": fake.agreement}
