"""Real images and the statistics of their features: read, measured once, and kept."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent import futures

import jax
import numpy as np

from dmd_jax import data
from dmd_jax import features as features_lib
from dmd_jax.data import pipeline, pixels
from dmd_jax.evals import drift, frechet, protocols
from dmd_jax.evals import suite as suite_lib
from dmd_jax.runtime import distributed, storage
from dmd_jax.weights import published

READ = 500  # real images at a time


def reference(
    suite: suite_lib.Suite,
    source: data.Source | None,
    statistics: str,
    directory: str | os.PathLike,
) -> suite_lib.Collected:
    """Measures the real images, or reads their statistics.

    Args:
      suite: the networks to measure with.
      source: the real images; None for none.
      statistics: a file of the statistics of their features, which take the place of those of
        `source`; "" for none.
      directory: where statistics of sources are kept.

    Raises:
      ValueError: there are no real images, or another number than the protocol's; see
        `collect_source` and `read`.
    """
    protocol = suite.protocol
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
    given = read(published.find(statistics), suite.features) if statistics else None
    count = given.count if source is None else len(source)  # 0 if the file does not say
    if protocol.reference_count and count not in (0, protocol.reference_count):
        expected = f"that of the protocol {protocol.name} has {protocol.reference_count}"
        raise ValueError(f"the reference has {count} images, {expected}; give it all of them.")
    if given:
        given = dataclasses.replace(given, origin=published.sha256(statistics))
    if source is None:
        return given
    real = collect_source(suite, source, directory, with_floor=not protocol.floor)
    if given:
        origin = f"{given.origin} {real.origin}"
        return dataclasses.replace(real, moments=given.moments, floor={}, origin=origin)
    return real


def floor(
    suite: suite_lib.Suite,
    real: suite_lib.Collected,
    source: data.Source | None,
    directory: str | os.PathLike,
) -> dict[str, float]:
    """Scores real images as if they were generated; see `Protocol.floor`.

    Args:
      suite: the networks to measure with.
      real: the real images that the others are compared with.
      source: the others; None for one half of `real` against the other.
      directory: where statistics of sources are kept.

    Returns:
      The scores; {} where there are no single real images.
    """
    if source is None:
        return real.floor
    held_out = collect_source(suite, source, directory, name="floor")
    return suite_lib.compare(suite, real, held_out)


def collect_source(
    suite: suite_lib.Suite,
    source: data.Source,
    directory: str | os.PathLike,
    *,
    name: str = "reference",
    with_floor: bool = False,
) -> suite_lib.Collected:
    """Measures a whole data source as `suite.collect` does, and keeps what was collected.

    It lies in a file of `directory`, whose name has a digest of all that it follows from.

    Raises:
      ValueError: an image cannot be read.
    """
    protocol = suite.protocol
    count = len(source)
    origin = content(source)
    as_floats = protocol.quantisation == "none"
    wanted = f"{suite.features.digest} {as_floats} {protocol.neighbours} {with_floor} {origin}"
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:16]
    path = storage.path(directory) / f"reference-{digest}.npz"
    if not distributed.gather(path.exists()).all():
        images = batches(protocol, source, range(count))
        real = suite_lib.collect(suite, images, count, name=name, with_floor=with_floor)
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, suite, real)
        distributed.barrier(f"{path} is there")
    return dataclasses.replace(read(path, suite.features), origin=origin)


def content(source: data.Source) -> str:
    """Returns a digest of a source: of its whole content, or of its length and a sample."""
    streams = {"": pipeline.Stream(source, 1)}
    return data.digest(source) or pipeline.fingerprint(streams, seed=0)


def batches(
    protocol: protocols.Protocol, source: data.Source, indices: range
) -> Iterator[suite_lib.Batch]:
    """Yields the images of these rows of a data source, which came from bytes.

    Threads read them: Pillow decodes without Python's lock.
    """
    with futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(indices), READ):
            rows = list(pool.map(source.__getitem__, indices[start : start + READ]))
            images = np.stack([row["image"] for row in rows])
            if protocol.quantisation != "none":
                images = pixels.to_uint8(images)
            labels = np.stack([row["cond"] for row in rows]) if "cond" in rows[0] else None
            yield suite_lib.Batch(images, labels)


def write(path: str | os.PathLike, suite: suite_lib.Suite, collected: suite_lib.Collected):
    """Writes what was collected as an `.npz`.

    It has "mu" [D] and "sigma" [D, D], which pytorch-fid and EDM read as well, and more.
    """
    rest = {
        "features": suite.features.digest,
        "name": suite.features.name,
        "colours": collected.colours,
        "agreement": collected.agreement,
        "floor": collected.floor,
    }
    with storage.writing(path) as file:
        np.savez(
            file,
            mu=collected.moments.mean,
            sigma=collected.moments.covariance,
            count=collected.count,
            kept=collected.features,
            rest=json.dumps(rest),
        )


def read(path: str | os.PathLike, features: features_lib.Features) -> suite_lib.Collected:
    """Reads an `.npz` of "mu" [D] and "sigma" [D, D], of EDM, of pytorch-fid or of `write`.

    Raises:
      ValueError: the file is damaged, or of another feature network.
    """
    try:
        with np.load(storage.local(path)) as file:
            arrays = dict(file)
        mean, covariance = _moments(arrays)
        kept = arrays.get("kept")
        if kept is not None and kept.shape[1:] != mean.shape:
            raise ValueError(f"kept has shape {kept.shape}")
        count = int(arrays.get("count", 0))
        rest = json.loads(str(arrays.get("rest", "{}")))
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
    return suite_lib.Collected(
        count=count,
        moments=frechet.Moments(mean, covariance),
        features=kept,
        colours=sums,
        agreement=rest.get("agreement"),
        floor=rest.get("floor", {}),
    )


def _moments(arrays):
    if any(np.iscomplexobj(arrays[key]) for key in ("mu", "sigma")):
        raise ValueError("they are complex")
    mean = np.float64(arrays["mu"])
    covariance = np.float64(arrays["sigma"])
    if mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
        raise ValueError(f"mu has shape {np.shape(mean)} and sigma {np.shape(covariance)}")
    finite = np.isfinite(mean).all() and np.isfinite(covariance).all()
    if not finite or np.diag(covariance).min() < 0:
        raise ValueError("not all are finite, or variances below 0")
    return mean, covariance
