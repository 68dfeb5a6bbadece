"""What the evaluations of a config measure with: protocol, features, real images, conditions. See dmd_jax/evals/protocols.py."""

import hashlib
import importlib.metadata
from collections.abc import Callable

import ml_collections
import numpy as np

from dmd_jax import lookup, sharding
from dmd_jax.evals import protocols, references, suite
from dmd_jax.experiment import build
from dmd_jax.runtime import storage

PACKAGES = ("dmd_jax", "jax", "jaxlib", "flax", "numpy", "pillow")


def check(config: ml_collections.ConfigDict, name: str, count: int | None, where: str):
    """Raises ValueError if there is no protocol of that name, it is not for such images, or `config.evaluate` asks for something else.

    Args:
      config: of the run.
      name: of the protocol.
      count: images to be measured; None for the protocol's number.
      where: they stand in the config.
    """
    protocol, settings, size = protocols.find(name), config.evaluate, config.network.size
    features = protocols.fill(protocol.features, config.features.to_dict(), "features")
    lookup.check_arguments(
        lookup.find("features", features.pop("name")),
        features,
        f"features of the protocol {name}",
        None,
    )
    for key in ("reference", "floor", "conditions"):
        source = filled(config, protocol, key)
        if source or key == "conditions":
            make = lookup.find("data", source.pop("source", ""))
            lookup.check_arguments(
                make, source, f"evaluate.{key} with what the protocol {name} has"
            )
    if count is not None and count < suite.LEAST:
        raise ValueError(
            f"{where}.count is {count}; expected at least {suite.LEAST}, or in an evaluation None for {protocol.count}."
        )
    if "autoencoder" not in config and protocol.sizes and size not in protocol.sizes:
        expected = " or ".join(map(str, protocol.sizes))
        raise ValueError(
            f"{where}.protocol is {name}, expected one for {size} pixels, as network.size is; this one is for {expected}."
        )
    if settings.clip and not protocol.clip:
        raise ValueError(
            f"evaluate.clip is {settings.clip!r}, but the protocol {name} has no CLIP score; leave it out."
        )


def real_images(config: ml_collections.ConfigDict) -> list[dict]:
    """The data sources of real images that the evaluation wants: reference, floor."""
    protocol = protocols.find(config.evaluate.protocol)
    sources = [filled(config, protocol, key) for key in ("reference", "floor")]
    return [found for found in sources if found and found.get("path") != ""]


def filled(config: ml_collections.ConfigDict, protocol: protocols.Protocol, key: str) -> dict:
    """A data source of the protocol, its "reference", "floor" or "conditions", with what it leaves open to the evaluation's config."""
    return protocols.fill(getattr(protocol, key), config.evaluate[key].to_dict(), f"evaluate.{key}")


def make_suite(
    config: ml_collections.ConfigDict, name: str, workdir: storage.Path, parallel: sharding.Parallel
) -> suite.Suite:
    """The suite of the protocol of that name."""
    settings = config.evaluate
    given = build.located(config.features.to_dict(), workdir)
    others = {key: settings[key] for key in ("clip", "lpips", "batch_size")}
    return suite.make(protocols.find(name), parallel, features=given, **others)


def reference(
    config: ml_collections.ConfigDict, measure: suite.Suite, workdir: storage.Path
) -> suite.Collected:
    """The real images of the suite's protocol: see `references.reference`."""
    protocol, source = measure.protocol, None
    settings = filled(config, protocol, "reference")
    if settings and settings.get("path") != "":
        source = (
            build.open_source(settings, workdir)
            if protocol.crop_to
            else build.make_source(config, settings, workdir)
        )
    return references.reference(measure, source, config.evaluate.statistics, workdir)


def floor(
    config: ml_collections.ConfigDict,
    measure: suite.Suite,
    real: suite.Collected,
    workdir: storage.Path,
) -> dict[str, float]:
    """Scores of real images, as low as can be expected of generated ones: see `Protocol.floor`; {} where there are no single ones."""
    settings = filled(config, measure.protocol, "floor")
    if not settings:
        return real.floor
    held_out = references.collect_source(
        measure, build.make_source(config, settings, workdir), workdir, name="floor"
    )
    return suite.compare(measure, real, held_out)


def conditions(config: ml_collections.ConfigDict, workdir: storage.Path):
    """The data source of what generated images are to show, those of the evaluation's protocol."""
    settings = filled(config, protocols.find(config.evaluate.protocol), "conditions")
    return build.make_source(config, settings, workdir)


def score(
    config: ml_collections.ConfigDict,
    measure: suite.Suite,
    real: suite.Collected,
    draw: Callable,
    indices: range,
    conditions,
    name: str = "",
) -> dict[str, float]:
    """Scores of the generated images of these indices, by `draw(inputs)`; `name` stands on the progress bar."""
    fake = suite.collect(
        measure,
        _batches(config, measure.protocol, indices, draw, conditions),
        len(indices),
        name=name,
    )
    return measure.protocol.named(suite.compare(measure, real, fake), len(indices))


def _batches(config, protocol, indices, draw, conditions):
    """The images as the protocol sees them."""
    texts = getattr(conditions, "texts", None)
    for start in range(0, len(indices), config.evaluate.batch_size):
        chosen = indices[start : start + config.evaluate.batch_size]
        inputs = build.inputs(config, chosen, conditions)
        labels = inputs["cond"] if np.ndim(inputs["cond"]) == 1 else None
        yield suite.Batch(
            protocol.bytes(draw(inputs)), labels, texts and [texts[i % len(texts)] for i in chosen]
        )


def digest_of(source) -> str:
    """Of conditions: of their texts if they have any."""
    texts = getattr(source, "texts", None)
    return (
        hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
        if texts
        else references.content(source)
    )


def packages() -> dict[str, str]:
    """Versions of those that scores depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
