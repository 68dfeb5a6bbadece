"""Builds what an evaluation measures with: protocol, features, real images, conditions.

See dmd_jax/evals/protocols.py. Every function gets the `Stage` of an evaluation, which a training
stage with scores or previews has as `stage.evaluation`.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from dmd_jax import data, lookup, sharding
from dmd_jax.evals import protocols, references
from dmd_jax.evals import suite as suite_lib
from dmd_jax.experiment import build
from dmd_jax.runtime import storage


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
    """Scores real images as if they were generated: see `references.floor`."""
    settings = filled(stage, suite.protocol, "floor")
    source = build.checked_source(stage, settings, workdir) if settings else None
    return references.floor(suite, real, source, workdir)


def conditions(stage: build.Stage, workdir: storage.Path, protocol: str = "") -> data.Source:
    """Opens the data source of what generated images are to show.

    Args:
      stage: the evaluation.
      workdir: of the run.
      protocol: by whose name; the evaluation's own if not given.
    """
    settings = filled(stage, protocols.find(protocol or stage.settings.protocol), "conditions")
    return build.checked_source(stage, settings, workdir)


def metrics(stage: build.Stage) -> list[Callable]:
    """Finds the further metrics of an evaluation."""
    return [lookup.find("evals", metric) for metric in stage.settings.metrics]


def batches(
    stage: build.Stage, protocol: protocols.Protocol, draw: Callable, conditions: data.Source
) -> Callable[[range], Iterator[suite_lib.Batch]]:
    """Returns a function that makes the images of a range of seeds, as a protocol sees them.

    Args:
      stage: the evaluation.
      protocol: which says how images become bytes.
      draw: `inputs -> images`.
      conditions: what the images are to show.
    """
    texts = data.texts(conditions)
    batch_size = stage.settings.batch_size

    def images(indices):
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            inputs = build.inputs(stage, chosen, conditions)
            labels = inputs["cond"] if np.ndim(inputs["cond"]) == 1 else None
            described = [texts[i % len(texts)] for i in chosen] if texts else None
            yield suite_lib.Batch(protocol.bytes(draw(inputs)), labels, described)

    return images


def digest_of(source: data.Source) -> str:
    """Returns a fingerprint of conditions: of their texts if they have any."""
    if texts := data.texts(source):
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    return references.content(source)
