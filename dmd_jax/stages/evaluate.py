"""The stage that measures the one-step generator against its teacher: evaluation.json and report.png in the workdir.

As a command it measures images in files: python -m dmd_jax score --help, see evaluate_files.py.
"""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from dmd_jax import generate
from dmd_jax.data import captions
from dmd_jax.encoders import autoencoder as autoencoder_lib
from dmd_jax.evals import protocols, report, retrieval, suite
from dmd_jax.experiment import build, evaluation
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import log, storage, timing
from dmd_jax.weights import digests, published

SHOWN = 100  # images in the report


class Measured(NamedTuple):
    """A row of the evaluation.

    Attributes:
      stage: that has trained it.
      sampler: settings.
      quantize: "int8" for eight bits.
    """

    stage: str
    sampler: dict
    quantize: str = ""


def done(config: ml_collections.ConfigDict, stage: str, workdir: storage.Path) -> bool:
    """Whether evaluation.json is about the checkpoints that are there now, by the same protocol."""
    path = workdir / "evaluation.json"
    found = storage.read_json(path) if path.exists() and (workdir / "report.png").exists() else {}
    return all(found.get(key) == value for key, value in _asked(config, stage, workdir).items())


def run(config: ml_collections.ConfigDict, stage: str, workdir: storage.Path):
    """Samples all models from the same seeds and measures the images against real ones.

    Raises:
      ValueError: a checkpoint or a file is missing, or the batch does not fit the devices.
    """
    settings, parallel = config[stage], build.make_parallel(config, stage)
    measuring = evaluation.make_suite(config, settings.protocol, workdir, parallel)
    asked = _asked(config, stage, workdir)
    real, conditions, count = (
        evaluation.reference(config, measuring, workdir),
        evaluation.conditions(config, workdir),
        asked["protocol"]["count"],
    )
    decode = autoencoder_lib.make_decode(build.autoencoder(config), parallel, settings.batch_size)
    retrieve = (
        _retrieval(config, settings, measuring.features, workdir)
        if settings.get("retrieval")
        else None
    )

    models = _models(config, settings)
    scores, images, captioned, seconds, nfe = {}, {}, {}, {}, {}
    first = build.inputs(config, range(settings.batch_size), conditions)
    # Rows of one stage follow one another.
    load = functools.lru_cache(1)(
        lambda stage: workdir_lib.load_params(config, f"{{workdir}}/{stage}", workdir)
    )
    for name, model in models.items():
        sample, nfe[name] = _make_sample(
            config, model, load(model.stage), first, parallel, settings.batch_size, workdir
        )
        draw = lambda inputs, sample=sample: decode(sample(inputs))
        images[name] = draw(first)[:SHOWN]
        seconds[name] = (
            timing.median_seconds(functools.partial(draw, first), settings.timing_repeats)
            / settings.batch_size
        )
        ranges = [range(r * count, (r + 1) * count) for r in range(measuring.protocol.ranges)]
        scores[name] = [
            evaluation.score(config, measuring, real, draw, indices, conditions, name)
            for indices in ranges
        ]
        if retrieve:
            retrieved, captioned[name] = retrieve(draw)
            scores[name] = [score | retrieved for score in scores[name]]

    result = asked | {
        "networks": measuring.digests,
        "reference_count": real.count,
        "reference_digest": real.origin,
        "reference_agreement": real.agreement,
        "packages": evaluation.packages(),
        "scores": {name: suite.over_ranges(scores[name]) for name in scores},
        "straightness": _straightness(config, settings, conditions, parallel, workdir)
        if "straightness" in settings
        else {},
        "training_seconds": {
            name: log.seconds(workdir / name)
            for name in dict.fromkeys(model.stage for model in models.values())
        },
        "seed_ranges": scores,
        "nfe": nfe,
        "seconds_per_image": seconds,
        "speedup": seconds[settings.teacher] / seconds[settings.student],
        "device": f"{parallel.mesh.size} x {jax.devices()[0].device_kind}",
    }
    if floor := evaluation.floor(config, measuring, real, workdir):
        result["scores"]["real"] = floor
    if jax.process_index() == 0:
        _write(workdir, settings, result, images, captioned)


def _write(workdir, settings, result, images, captioned):
    """The files, and the table."""
    curves = {name: log.read(workdir / name) for name in (settings.teacher, settings.student)}
    if captioned:
        with storage.writing(workdir / "captions.png") as file:
            report.draw_captions(file, captioned, settings.retrieval.credit)
    with storage.writing(workdir / "report.png") as file:
        report.draw(
            file, result, images, curves, teacher=settings.teacher, student=settings.student
        )
    storage.write_json(workdir / "evaluation.json", result)
    print(report.table(result, settings.teacher, settings.student), f"\n{workdir / 'report.png'}")


def _models(config, settings):
    """What is measured, by name; the teacher and the student may be one."""
    models = {
        name: Measured(name, config[name].sampler.to_dict())
        for name in (settings.teacher, settings.student)
    }
    others = {name: Measured(**row.to_dict()) for name, row in settings.get("others", {}).items()}
    in_order = sorted(
        others.items(),
        key=lambda item: (config.stages.index(item[1].stage), item[1].sampler.get("num_steps", 0)),
    )
    return models | dict(in_order)


def _make_sample(config, model, params, first, parallel, batch_size, workdir):
    """`inputs -> images`, or latents, by a model, and the network calls for one; where each has its own number, the mean over `first`."""
    denoiser = build.make_denoiser(config, model.stage)
    if model.quantize:
        denoiser, params = build.quantized(config, model.stage, params, first["cond"])
    null = build.null_of(config, model.sampler, workdir)
    sampler = build.build_sampler(denoiser, model.sampler, null, f"a sampler of {model.stage}")
    nfe = sampler.nfe
    if nfe is None:
        nfe = float(
            generate.make_sample(sampler._replace(sample=sampler.count), parallel, batch_size)(
                params, first
            ).mean()
        )
    return functools.partial(generate.make_sample(sampler, parallel, batch_size), params), nfe


def _straightness(config, settings, conditions, parallel, workdir):
    """The mean straightness of some stages' flows, whose noise is that of the images."""
    of, found = settings.straightness, {}
    inputs = build.inputs(config, range(of.count), conditions)
    for stage in of.stages:
        straightness = build.make_straightness(config, stage, workdir, of.num_steps)
        measure = parallel.in_batches(
            "evaluation batch_size",
            lambda params, batch, f=straightness: f(params, batch["z"], batch["cond"]),
            settings.batch_size,
        )
        found[stage] = float(
            measure(workdir_lib.load_params(config, f"{{workdir}}/{stage}", workdir), inputs).mean()
        )
    return found


def _retrieval(config, settings, features, workdir):
    """`(inputs -> images) -> (scores, {kind of prompt: (texts, real images, images)})` for prompts of each kind."""
    gallery = build.open_source(settings.retrieval.gallery, workdir)
    rows, skipped = captions.readable(gallery, range(len(gallery)))
    captions.refuse_if_many(skipped, len(gallery))
    texts, real = (
        [row["text"] for row in rows.values()],
        np.stack([row["image"] for row in rows.values()]),
    )
    real_features = features.extract(real)

    def retrieve(sample):
        scores, shown = {}, {}
        for kind, source in settings.retrieval.prompts.items():
            prompts = build.make_source(config, source, workdir)
            chosen = (
                np.linspace(0, len(prompts) - 1, min(len(prompts), settings.retrieval.count))
                .astype(int)
                .tolist()
            )
            wanted = np.array(prompts.texts)[chosen].tolist()
            images = np.concatenate(
                [sample(inputs) for inputs in _inputs(config, settings, chosen, prompts)]
            )
            found = retrieval.recall(features.extract(images), wanted, real_features, texts)
            scores |= {f"{name} {kind}": value for name, value in found.items()}
            shown[kind] = wanted, real[[texts.index(text) for text in wanted]], images
        return scores, shown

    return retrieve


def _inputs(config, settings, indices, conditions):
    for start in range(0, len(indices), settings.batch_size):
        yield build.inputs(config, indices[start : start + settings.batch_size], conditions)


def _asked(config, stage, workdir):
    """Everything that the scores depend on, as it is read back."""
    settings, autoencoder = config[stage], build.autoencoder(config)
    protocol = protocols.find(settings.protocol)
    models, straight = _models(config, settings), settings.get("straightness", {}).get("stages", ())
    stages = dict.fromkeys((*(model.stage for model in models.values()), *straight))
    asked = {
        "protocol": dataclasses.asdict(protocol) | {"count": settings.count or protocol.count},
        "features": config.features.to_dict(),
        "conditions": evaluation.digest_of(evaluation.conditions(config, workdir)),
        "reference": _content(evaluation.filled(config, protocol, "reference"), workdir),
        "files": _hashes(config, settings, workdir),
        "extras": {
            key: settings.get(key) for key in ("clip", "lpips", "retrieval", "straightness")
        },
        "autoencoder": digests.of_params(autoencoder_lib.load(autoencoder)[1])
        if autoencoder
        else None,
        "seed": build.EVALUATION_SEED,
        "models": {name: model._asdict() for name, model in models.items()},
        "versions": {name: workdir_lib.version(workdir / name) for name in stages},
        "guidance": {name: config[name].sampler.get("guidance_scale", 1.0) for name in straight},
    }
    return json.loads(json.dumps(asked, default=lambda settings: settings.to_dict()))


def _content(settings, workdir):
    """Sources that know their content by that, wherever they lie; others by their settings."""
    source = (
        build.open_source(settings, workdir) if settings and settings.get("path") != "" else None
    )
    return (
        {"source": settings["source"], "digest": source.digest}
        if getattr(source, "digest", None)
        else settings
    )


def _hashes(config, settings, workdir):
    """Of the files that are named, as far as they are there."""
    features = build.located(config.features.to_dict(), workdir)
    named = {
        "statistics": settings.statistics,
        "lpips": settings.lpips,
        "weights": features.get("weights"),
        "path": features.get("path"),
    }
    paths = {key: storage.local(value) for key, value in named.items() if value}
    return {key: published.sha256(path) for key, path in paths.items() if path.is_file()}
