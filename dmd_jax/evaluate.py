"""The stage that measures the one-step generator against its teacher: evaluation.json and report.png in the workdir."""

import functools
import json
import statistics
import time
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from dmd_jax import checkpoint, experiment, latents, metrics, sampling, storage
from dmd_jax.data import captions
from dmd_jax.evals import report, retrieval, suite
from dmd_jax.weights import files

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
    """Whether evaluation.json is about the checkpoints that are there now."""
    path = workdir / "evaluation.json"
    return path.exists() and metrics.read_json(path).get("protocol") == _protocol(config, stage, workdir)


def run(config: ml_collections.ConfigDict, stage: str, workdir: storage.Path):
    """Samples all models from the same seeds and measures the images against real ones.

    Raises:
      ValueError: a checkpoint or a file is missing, or the batch does not fit the devices.
    """
    settings, protocol = config[stage], _protocol(config, stage, workdir)
    parallel = experiment.make_parallel(config, stage)
    features = experiment.make_features(config, workdir, parallel)
    real = _reference(config, settings, features, workdir)
    conditions = experiment.make_source(config, settings.conditions, workdir)
    decode = latents.make_decode(experiment.autoencoder(config), parallel, settings.batch_size)
    retrieve = _retrieval(config, settings, features, workdir) if settings.get("retrieval") else None

    models = _models(config, settings)
    scores, images, captioned, seconds, nfe = {}, {}, {}, {}, {}
    first = experiment.inputs(config, range(settings.batch_size), conditions)
    # Rows of one stage follow one another.
    load = functools.lru_cache(1)(lambda stage: experiment.load_params(config, f"{{workdir}}/{stage}", workdir))
    for name, model in models.items():
        sample, nfe[name] = _make_sample(config, model, load(model.stage), first, parallel, settings.batch_size, workdir)
        draw = lambda inputs, sample=sample: decode(sample(inputs))
        images[name], seconds[name] = draw(first)[:SHOWN], _seconds_per_image(draw, first, settings.timing_repeats)
        scores[name] = []
        for r in range(settings.seed_ranges):
            batches = _batches(config, settings, range(r * settings.count, (r + 1) * settings.count), draw, conditions)
            scores[name].append(suite.compare(features, real, suite.collect(features, batches, settings.neighbours)))
        if retrieve:
            retrieved, captioned[name] = retrieve(draw)
            scores[name] = [score | retrieved for score in scores[name]]

    result = {
        "protocol": protocol,
        "features": {"name": features.name, "digest": features.digest},
        "reference": {
            "count": real.count,
            "skipped": real.skipped,
            "agreement": real.agreement,
            "digest": checkpoint.digest({"mu": real.moments.mean, "sigma": real.moments.covariance}),
        },
        **{name: _over_ranges(scores[name], features.frechet) for name in scores},
        "straightness": _straightness(config, settings, conditions, parallel, workdir) if "straightness" in settings else {},
        "training_seconds": {name: metrics.seconds(workdir / name) for name in dict.fromkeys(model.stage for model in models.values())},
        "seed_ranges": scores,
        "nfe": nfe,
        "seconds_per_image": seconds,
        "speedup": seconds[settings.teacher] / seconds[settings.student],
        "device": f"{parallel.mesh.size} x {jax.devices()[0].device_kind}",
    }
    if settings.floor:
        floor = suite.collect_source(features, experiment.make_source(config, settings.floor, workdir), settings.neighbours, workdir)
        result["real"] = suite.compare(features, real, floor)
    if jax.process_index() == 0:
        curves = {name: metrics.read(workdir / name) for name in (settings.teacher, settings.student)}
        if captioned:
            with storage.writing(workdir / "captions.png") as file:
                report.draw_captions(file, captioned, settings.retrieval.credit)
        with storage.writing(workdir / "report.png") as file:
            report.draw(file, result, images, curves, teacher=settings.teacher, student=settings.student)
        metrics.write_json(workdir / "evaluation.json", result)
        print(report.table(result, settings.teacher, settings.student), f"\n{workdir / 'report.png'}")


def _models(config, settings):
    """What is measured, by name; the teacher and the student may be one."""
    models = {name: Measured(name, config[name].sampler.to_dict()) for name in (settings.teacher, settings.student)}
    others = {name: Measured(**row.to_dict()) for name, row in settings.get("others", {}).items()}
    in_order = sorted(others.items(), key=lambda item: (config.stages.index(item[1].stage), item[1].sampler.get("num_steps", 0)))
    return models | dict(in_order)


def _make_sample(config, model, params, first, parallel, batch_size, workdir):
    """`inputs -> images`, or latents, by a model, and the network calls for one; where each has its own number, the mean over `first`."""
    denoiser = experiment.make_denoiser(config, model.stage)
    if model.quantize:
        denoiser, params = experiment.quantized(config, model.stage, params, first["cond"])
    null = experiment.null_of(config, model.sampler, workdir)
    sampler = experiment.build_sampler(denoiser, model.sampler, null, f"a sampler of {model.stage}")
    nfe = sampler.nfe
    if nfe is None:
        nfe = float(sampling.make_sample(sampler._replace(sample=sampler.count), parallel, batch_size)(params, first).mean())
    return functools.partial(sampling.make_sample(sampler, parallel, batch_size), params), nfe


def _straightness(config, settings, conditions, parallel, workdir):
    """The mean straightness of some stages' flows, whose noise is that of the images."""
    of, found = settings.straightness, {}
    inputs = experiment.inputs(config, range(of.count), conditions)
    for stage in of.stages:
        straightness = experiment.make_straightness(config, stage, workdir, of.num_steps)
        measure = parallel.in_batches(
            "evaluation batch_size", lambda params, batch, f=straightness: f(params, batch["z"], batch["cond"]), settings.batch_size
        )
        found[stage] = float(measure(experiment.load_params(config, f"{{workdir}}/{stage}", workdir), inputs).mean())
    return found


def _reference(config, settings, features, workdir):
    """The real images; statistics from a file, if named, take the place of theirs."""
    real = None
    if settings.reference:
        real = suite.collect_source(features, experiment.make_source(config, settings.reference, workdir), settings.neighbours, workdir)
    if settings.statistics:
        given = suite.read(files.find(settings.statistics), features)
        real = given._replace(features=real.features, skipped=real.skipped) if real else given
    if real is None:
        raise ValueError("an evaluation needs a reference: name real images, or a file of their statistics.")
    return real


def _retrieval(config, settings, features, workdir):
    """`(inputs -> images) -> (scores, {kind of prompt: (texts, real images, images)})` for prompts of each kind."""
    gallery = experiment.open_source(settings.retrieval.gallery, workdir)
    rows, skipped = captions.readable(gallery, range(len(gallery)))
    captions.refuse_if_many(skipped, len(gallery))
    texts, real = [row["text"] for row in rows.values()], np.stack([row["image"] for row in rows.values()])
    real_features = features.extract(real)

    def retrieve(sample):
        scores, shown = {}, {}
        for kind, source in settings.retrieval.prompts.items():
            prompts = experiment.make_source(config, source, workdir)
            chosen = np.linspace(0, len(prompts) - 1, min(len(prompts), settings.retrieval.count)).astype(int).tolist()
            wanted = np.array(prompts.texts)[chosen].tolist()
            images = np.concatenate([sample(inputs) for inputs in _inputs(config, settings, chosen, prompts)])
            found = retrieval.recall(features.extract(images), wanted, real_features, texts)
            scores |= {f"{name} {kind}": value for name, value in found.items()}
            shown[kind] = wanted, real[[texts.index(text) for text in wanted]], images
        return scores, shown

    return retrieve


def _inputs(config, settings, indices, conditions):
    for start in range(0, len(indices), settings.batch_size):
        yield experiment.inputs(config, indices[start : start + settings.batch_size], conditions)


def _batches(config, settings, indices, sample, conditions):
    for inputs in _inputs(config, settings, indices, conditions):
        yield sample(inputs), inputs["cond"]


def _over_ranges(scores, frechet):
    """EDM reports the minimum of the Frechet distance; its mean stands beside it, and of the other scores there is the mean."""
    means = {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}
    return means if len(scores) == 1 else means | {frechet: min(s[frechet] for s in scores), f"{frechet} mean": means[frechet]}


def _protocol(config, stage, workdir):
    """Everything that the scores depend on, as it is read back."""
    settings, autoencoder = config[stage], experiment.autoencoder(config)
    models, straight = _models(config, settings), settings.get("straightness", {}).get("stages", ())
    stages = dict.fromkeys((*(model.stage for model in models.values()), *straight))
    keys = ("count", "seed_ranges", "neighbours", "conditions", "statistics", "retrieval", "straightness")
    protocol = {
        **{key: value for key, value in settings.to_dict().items() if key in keys},
        "reference": _reference_content(settings.reference.to_dict(), workdir),
        "autoencoder": checkpoint.digest(latents.load(autoencoder)[1]) if autoencoder else None,
        "seed": experiment.EVALUATION_SEED,
        "features": config.features.to_dict(),
        "quantisation": "trunc(127.5 x + 128), except for classifiers of the training images, which see floats",
        "models": {name: model._asdict() for name, model in models.items()},
        "statistics_sha256": files.sha256(files.find(settings.statistics)) if settings.statistics else None,
        "versions": {name: experiment.version(workdir / name) for name in stages},
        "guidance": {name: config[name].sampler.get("guidance_scale", 1.0) for name in straight},
    }
    return json.loads(json.dumps(protocol))


def _reference_content(settings, workdir):
    """Captions by what they are, wherever they lie; other sources by their settings."""
    if not settings.get("source", "").startswith("captions."):
        return settings
    return {"source": settings["source"], "digest": experiment.open_source(settings, workdir).digest}


def _seconds_per_image(sample, inputs, repeats):
    """The median of `repeats` runs of one batch that is already compiled."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        sample(inputs)
        times.append(time.perf_counter() - began)
    return statistics.median(times) / len(inputs["z"])
