"""Real images and the statistics of their features: read, measured once, and kept."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent import futures

import jax
import numpy as np

from dmd_jax import features as features_lib
from dmd_jax.data import pipeline, pixels
from dmd_jax.evals import drift, frechet, protocols, suite
from dmd_jax.runtime import distributed, storage
from dmd_jax.weights import published

READ = 500  # real images at a time


def reference(
    measuring: suite.Suite, source, statistics: str, directory: str | os.PathLike
) -> suite.Collected:
    """The real images to compare with.

    Args:
      measuring: what to measure with.
      source: of them; None for none.
      statistics: a file of their features' statistics, which take the place of those of `source`;
        "" for none.
      directory: where statistics of sources are kept.

    Raises:
      ValueError: there are none, or another number than the protocol's; see `collect_source` and
        `read`.
    """
    protocol = measuring.protocol
    if statistics and protocol.reference and not protocol.crop_to:
        raise ValueError(
            f"the protocol {protocol.name} has real images of its own, expected none, got "
            f"{statistics}; leave it out."
        )
    if source is None and not statistics:
        raise ValueError(
            f"the protocol {protocol.name} needs a reference; name real images, or a file of their "
            "statistics."
        )
    given = read(published.find(statistics), measuring.features) if statistics else None
    count = given.count if source is None else len(source)  # 0 if the file does not say
    if protocol.reference_count and count not in (0, protocol.reference_count):
        expected = f"that of the protocol {protocol.name} has {protocol.reference_count}"
        raise ValueError(f"the reference has {count} images, {expected}; give it all of them.")
    if given:
        given = dataclasses.replace(given, origin=published.sha256(statistics))
    if source is None:
        return given
    real = collect_source(measuring, source, directory, with_floor=not protocol.floor)
    return (
        dataclasses.replace(
            real, moments=given.moments, floor={}, origin=f"{given.origin} {real.origin}"
        )
        if given
        else real
    )


def collect_source(
    measuring: suite.Suite,
    source,
    directory: str | os.PathLike,
    *,
    name: str = "reference",
    with_floor: bool = False,
) -> suite.Collected:
    """As `suite.collect`, for a whole data source; kept in a file of `directory`, by the digests of
    all that it follows from.

    Raises:
      ValueError: an image cannot be read.
    """
    protocol, count, origin = measuring.protocol, len(source), content(source)
    wanted = f"{measuring.features.digest} {protocol.quantisation == 'none'} {protocol.neighbours} {with_floor} {origin}"
    path = (
        storage.path(directory)
        / f"reference-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.npz"
    )
    if not distributed.gather(path.exists()).all():
        real = suite.collect(
            measuring,
            batches(protocol, source, range(count)),
            count,
            name=name,
            with_floor=with_floor,
        )
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, measuring, real)
        distributed.barrier(f"{path} is there")
    return dataclasses.replace(read(path, measuring.features), origin=origin)


def content(source) -> str:
    """A digest of a source: of everything in it if it knows that, else of its length and a sample."""
    return getattr(source, "digest", None) or pipeline.fingerprint(
        {"": pipeline.Stream(source, 1)}, seed=0
    )


def batches(protocol: protocols.Protocol, source, indices: range) -> Iterator[suite.Batch]:
    """The images of these rows of a data source, whose bytes they are.

    Threads read them: Pillow decodes without Python's lock.
    """
    with futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(indices), READ):
            rows = list(pool.map(source.__getitem__, indices[start : start + READ]))
            images = np.stack([row["image"] for row in rows])
            labels = np.stack([row["cond"] for row in rows]) if "cond" in rows[0] else None
            yield suite.Batch(
                images if protocol.quantisation == "none" else pixels.to_uint8(images), labels
            )


def write(path: str | os.PathLike, measuring: suite.Suite, collected: suite.Collected):
    """Writes an `.npz` that pytorch-fid and EDM read as well: "mu" [D] and "sigma" [D, D], and what
    else was collected.
    """
    arrays = dict(
        mu=collected.moments.mean,
        sigma=collected.moments.covariance,
        count=collected.count,
        kept=collected.features,
    )
    rest = {"features": measuring.features.digest, "name": measuring.features.name}
    rest |= {
        "colours": collected.colours,
        "agreement": collected.agreement,
        "floor": collected.floor,
    }
    with storage.writing(path) as file:
        np.savez(file, **arrays, rest=json.dumps(rest))


def read(path: str | os.PathLike, features: features_lib.Features) -> suite.Collected:
    """Statistics from an `.npz` of "mu" [D] and "sigma" [D, D], as EDM and pytorch-fid have them,
    or one of our own.

    Raises:
      ValueError: the file is damaged, or of another feature network.
    """
    try:
        with np.load(storage.local(path)) as file:
            arrays = dict(file)
        if any(np.iscomplexobj(arrays[key]) for key in ("mu", "sigma")):
            raise ValueError("they are complex")
        mean, covariance = np.float64(arrays["mu"]), np.float64(arrays["sigma"])
        if mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
            raise ValueError(f"mu has shape {np.shape(mean)} and sigma {np.shape(covariance)}")
        if (
            not np.isfinite(mean).all()
            or not np.isfinite(covariance).all()
            or np.diag(covariance).min() < 0
        ):
            raise ValueError("not all are finite, or variances below 0")
        kept, count, rest = (
            arrays.get("kept"),
            int(arrays.get("count", 0)),
            json.loads(str(arrays.get("rest", "{}"))),
        )
        if kept is not None and kept.shape[1:] != mean.shape:
            raise ValueError(f"kept has shape {kept.shape}")
        sums = drift.Sums(*rest["colours"]) if rest else None
    except Exception as error:  # numpy, zipfile and zlib raise all kinds for damaged files
        raise ValueError(
            f"{path} holds no statistics ({error}); expected arrays mu [D] and sigma [D, D]. "
            "Delete it, or get it again."
        ) from error
    if rest.get("features", features.digest) != features.digest:
        raise ValueError(
            f"{path} was made with the features {rest['name']} ({rest['features']}), expected "
            f"{features.name} ({features.digest}); make it "
            "again, or choose the protocol that it is of."
        )
    return suite.Collected(
        count,
        frechet.Moments(mean, covariance),
        kept,
        sums,
        rest.get("agreement"),
        floor=rest.get("floor", {}),
    )
