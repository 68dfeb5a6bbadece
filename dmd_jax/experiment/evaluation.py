"""Builds what an evaluation measures with: protocol, features, real images, conditions.

See dmd_jax/evals/protocols.py. Every function gets the `Stage` of an evaluation, which a training
stage with scores or previews has as `stage.evaluation`.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable

import numpy as np

from dmd_jax import lookup, sharding
from dmd_jax.evals import protocols, references
from dmd_jax.evals import suite as suite_lib
from dmd_jax.experiment import build
from dmd_jax.runtime import storage

PACKAGES = ("dmd_jax", "jax", "jaxlib", "flax", "numpy", "pillow")


def check(stage: build.Stage, name: str, count: int | None, where: str):
    """Checks that an evaluation can use a protocol.

    Args:
      stage: the evaluation.
      name: of the protocol.
      count: images to be measured; None for the protocol's number.
      where: they stand in the config.

    Raises:
      ValueError: there is no such protocol, it is not for such images, or the evaluation asks for
        something else.
    """
    protocol = protocols.find(name)
    settings = stage.settings
    size = stage.run.network["size"]
    features = protocols.fill(protocol.features, features_of(stage), "features")
    make = lookup.find("features", features.pop("name"))
    lookup.check_arguments(make, features, f"features of the protocol {name}", None)
    for key in ("reference", "floor", "conditions"):
        source = filled(stage, protocol, key)
        if source or key == "conditions":
            make = lookup.find("data", source.pop("source", ""))
            where_from = f"{stage.name}.{key} with what the protocol {name} has"
            lookup.check_arguments(make, source, where_from)
    if count is not None and count < suite_lib.LEAST:
        raise ValueError(
            f"{where}.count is {count}; expected at least {suite_lib.LEAST}, or in an evaluation "
            f"None for {protocol.count}."
        )
    if not stage.run.autoencoder and protocol.sizes and size not in protocol.sizes:
        expected = " or ".join(map(str, protocol.sizes))
        raise ValueError(
            f"{where}.protocol is {name}, expected one for {size} pixels, as network.size is; "
            f"this one is for {expected}."
        )
    if settings.clip and not protocol.clip:
        raise ValueError(
            f"{stage.name}.clip is {settings.clip!r}, but the protocol {name} has no CLIP score; "
            "leave it out."
        )


def features_of(stage: build.Stage) -> dict:
    """Returns what protocols leave open of their features: the evaluation's own, or the run's."""
    own = stage.settings.features
    return dict(stage.run.features if own is None else own)


def real_images(stage: build.Stage) -> list[dict]:
    """Returns the data sources of real images that an evaluation needs: reference, floor."""
    protocol = protocols.find(stage.settings.protocol)
    sources = [filled(stage, protocol, key) for key in ("reference", "floor")]
    return [source for source in sources if source and source.get("path") != ""]


def filled(stage: build.Stage, protocol: protocols.Protocol, key: str) -> dict:
    """Returns a data source of a protocol, with what it leaves open filled in by the evaluation.

    Args:
      stage: the evaluation.
      protocol: whose source it is.
      key: "reference", "floor" or "conditions".
    """
    open_settings = dict(getattr(stage.settings, key))
    return protocols.fill(getattr(protocol, key), open_settings, f"{stage.name}.{key}")


def make_suite(
    stage: build.Stage, name: str, workdir: storage.Path, parallel: sharding.Parallel
) -> suite_lib.Suite:
    """Builds the suite of the protocol `name`."""
    settings = stage.settings
    return suite_lib.make(
        protocols.find(name),
        parallel,
        features=build.located(features_of(stage), workdir),
        clip=settings.clip,
        lpips=settings.lpips,
        batch_size=settings.batch_size,
    )


def reference(
    stage: build.Stage, suite: suite_lib.Suite, workdir: storage.Path
) -> suite_lib.Collected:
    """Measures the real images of a suite's protocol: see `references.reference`."""
    source = None
    settings = filled(stage, suite.protocol, "reference")
    if settings and settings.get("path") != "":
        if suite.protocol.crop_to:
            source = build.open_source(settings, workdir)
        else:
            source = build.checked_source(stage, settings, workdir)
    return references.reference(suite, source, stage.settings.statistics, workdir)


def floor(
    stage: build.Stage, suite: suite_lib.Suite, real: suite_lib.Collected, workdir: storage.Path
) -> dict[str, float]:
    """Scores real images, as low as can be expected of generated ones: see `Protocol.floor`.

    Returns:
      The scores; {} where there are no single real images.
    """
    settings = filled(stage, suite.protocol, "floor")
    if not settings:
        return real.floor
    source = build.checked_source(stage, settings, workdir)
    held_out = references.collect_source(suite, source, workdir, name="floor")
    return suite_lib.compare(suite, real, held_out)


def conditions(stage: build.Stage, workdir: storage.Path):
    """Opens the data source of what generated images are to show, that of the evaluation's protocol."""
    settings = filled(stage, protocols.find(stage.settings.protocol), "conditions")
    return build.checked_source(stage, settings, workdir)


def score(
    stage: build.Stage,
    suite: suite_lib.Suite,
    real: suite_lib.Collected,
    draw: Callable,
    indices: range,
    conditions,
    name: str = "",
) -> dict[str, float]:
    """Scores the generated images of some indices.

    Args:
      stage: the evaluation.
      suite: what to measure with.
      real: the real images.
      draw: `inputs -> images`.
      indices: of the images.
      conditions: what they are to show.
      name: of the model, on the progress bar.
    """
    batches = _batches(stage, suite.protocol, indices, draw, conditions)
    fake = suite_lib.collect(suite, batches, len(indices), name=name)
    scores = suite_lib.compare(suite, real, fake)
    for metric in stage.settings.metrics:
        scores |= lookup.find("evals", metric)(real, fake)
    return suite.protocol.named(scores, len(indices))


def _batches(stage, protocol, indices, draw, conditions):
    """The images as the protocol sees them."""
    texts = getattr(conditions, "texts", None)
    batch_size = stage.settings.batch_size
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        inputs = build.inputs(stage, chosen, conditions)
        labels = inputs["cond"] if np.ndim(inputs["cond"]) == 1 else None
        described = [texts[i % len(texts)] for i in chosen] if texts else None
        yield suite_lib.Batch(protocol.bytes(draw(inputs)), labels, described)


def digest_of(source) -> str:
    """Returns a fingerprint of conditions: of their texts if they have any."""
    texts = getattr(source, "texts", None)
    if texts:
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    return references.content(source)


def packages() -> dict[str, str]:
    """Returns the versions of the packages that scores depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
