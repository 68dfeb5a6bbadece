"""The stage that measures the one-step generator against its teacher.

It writes evaluation.json and report.png into its directory of the workdir.

python -m dmd_jax score measures images in files; see dmd_jax/commands/score.py.
"""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import numpy as np

from dmd_jax import data, generate
from dmd_jax.data import captions
from dmd_jax.encoders import autoencoder as autoencoder_lib
from dmd_jax.evals import protocols, report, retrieval
from dmd_jax.evals import result as result_lib
from dmd_jax.evals import suite as suite_lib
from dmd_jax.experiment import build, evaluation
from dmd_jax.experiment import settings as settings_lib
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import log, storage, timing
from dmd_jax.weights import digests, published

SHOWN = 100  # images in the report
RESULT = "evaluation.json"  # in the directory of the stage
REPORT = "report.png"


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


def done(stage: build.Stage, workdir: storage.Path) -> bool:
    """Returns whether the result is of the checkpoints that are there, by the same protocol."""
    path = workdir / stage.name / RESULT
    written = path.exists() and (workdir / stage.name / REPORT).exists()
    if not written:
        return False
    values = storage.read_json(path)
    try:
        result = result_lib.Result.from_json(values)
    except ValueError:  # another version wrote it, so it is made again
        return False
    return result.asked == _asked(stage, workdir)


def run(stage: build.Stage, workdir: storage.Path):
    """Samples all models from the same seeds and measures the images against real ones.

    Raises:
      ValueError: a checkpoint or a file is missing, or the batch does not fit the devices.
    """
    settings = stage.settings
    parallel = build.parallel(stage)
    suite = evaluation.make_suite(stage, settings.protocol, workdir, parallel)
    asked = _asked(stage, workdir)
    real = evaluation.reference(stage, suite, workdir)
    conditions = evaluation.conditions(stage, workdir)
    decode = autoencoder_lib.make_decode(stage.run.autoencoder, parallel, settings.batch_size)
    retrieve = _retrieval(stage, suite.features, workdir) if settings.retrieval else None
    first = build.inputs(stage, range(settings.batch_size), conditions)
    # Rows of one stage follow one another.
    load = functools.lru_cache(1)(lambda name: _load(stage, name, workdir))
    images = {}
    captioned = {}

    def models():
        for name, model in _models(stage).items():
            params = load(model.stage)
            sample, nfe = _make_sample(stage, model, params, first, parallel, workdir)
            draw = lambda inputs, sample=sample: decode(sample(inputs))
            images[name] = draw(first)[:SHOWN]
            once = functools.partial(draw, first)
            seconds = timing.median_seconds(once, settings.timing_repeats)
            scores = {}
            if retrieve:
                scores, captioned[name] = retrieve(draw)
            row = result_lib.Row(
                name=name,
                scores=scores,
                stage=model.stage,
                nfe=nfe,
                seconds_per_image=seconds / settings.batch_size,
                training_seconds=log.seconds(workdir / model.stage),
            )
            yield row, evaluation.batches(stage, suite.protocol, draw, conditions)

    result = suite_lib.evaluate(
        suite,
        real,
        models(),
        count=asked["protocol"]["count"],
        ranges=suite.protocol.ranges,
        metrics=evaluation.metrics(stage),
        floor=evaluation.floor(stage, suite, real, workdir),
        asked=asked,
    )
    straightness = _straightness(stage, conditions, parallel, workdir)
    result = dataclasses.replace(result, straightness=straightness)
    if jax.process_index() == 0:
        _write(stage, workdir, result, images, captioned)


def _load(stage, name, workdir):
    return workdir_lib.load_params(stage.stages[name], workdir)


def _write(stage, workdir, result, images, captioned):
    """Writes the files, and prints the table."""
    teacher = stage.settings.teacher
    student = stage.settings.student
    directory = workdir / stage.name
    directory.mkdir(parents=True, exist_ok=True)
    curves = {name: log.read(workdir / name) for name in (teacher, student)}
    losses = {name: _losses(stage.stages[name]) for name in (teacher, student)}
    if captioned:
        with storage.writing(directory / "captions.png") as file:
            report.draw_captions(file, captioned, stage.settings.retrieval.credit)
    with storage.writing(directory / REPORT) as file:
        report.draw(file, result, images, curves, losses, teacher=teacher, student=student)
    storage.write_json(directory / RESULT, result.to_json())
    print(report.table(result, teacher, student), f"\n{directory / REPORT}")


def _losses(stage):
    """The names of the metrics that a report draws of a stage."""
    return build.method(stage).PLOTTED if stage.settings.program == "train" else ()


def _models(stage):
    """The models that are measured, by name; the teacher and the student may be one."""
    settings = stage.settings
    models = {}
    for name in (settings.teacher, settings.student):
        models[name] = Measured(name, dict(stage.stages[name].settings.sampler))
    order = stage.run.stages
    others = sorted(
        settings.others.items(),
        key=lambda item: (order.index(item[1].stage), item[1].sampler.get("num_steps", 0)),
    )
    for name, row in others:
        models[name] = Measured(row.stage, dict(row.sampler), row.quantize)
    return models


def _make_sample(stage, model, params, first, parallel, workdir):
    """`inputs -> images`, or latents, by a model, and the network calls for one.

    Where each image has its own number of calls, it is the mean over `first`.
    """
    trained = stage.stages[model.stage]
    batch_size = stage.settings.batch_size
    denoiser = trained.denoiser
    if model.quantize:
        denoiser, params = build.quantized(trained, params, first["cond"])
    null = build.null_for(model.sampler, stage.run, workdir)
    sampler = build.guided_sampler(denoiser, model.sampler, null, f"a sampler of {model.stage}")
    nfe = sampler.nfe
    if nfe is None:
        counting = sampler._replace(sample=sampler.count)
        calls = generate.make_sample(counting, parallel, batch_size)(params, first)
        nfe = float(calls.mean())
    return functools.partial(generate.make_sample(sampler, parallel, batch_size), params), nfe


def _straightness(stage, conditions, parallel, workdir):
    """The mean straightness of some stages' flows, whose noise is that of the images."""
    settings = stage.settings.straightness
    if not settings:
        return {}
    inputs = build.inputs(stage, range(settings.count), conditions)
    means = {}
    for name in settings.stages:
        straightness = build.straightness(stage.stages[name], workdir, settings.num_steps)
        measure = parallel.in_batches(
            "evaluation batch_size",
            lambda params, batch, f=straightness: f(params, batch["z"], batch["cond"]),
            stage.settings.batch_size,
        )
        means[name] = float(measure(_load(stage, name, workdir), inputs).mean())
    return means


def _retrieval(stage, features, workdir):
    """Returns a function that scores prompts of each kind.

    It is `(inputs -> images) -> (scores, {kind of prompt: (texts, real images, images)})`.
    """
    settings = stage.settings.retrieval
    gallery = build.open_source(settings.gallery, workdir)
    rows, skipped = captions.readable(gallery, range(len(gallery)))
    captions.refuse_if_many(skipped, len(gallery))
    texts = [row["text"] for row in rows.values()]
    real = np.stack([row["image"] for row in rows.values()])
    real_features = features.extract(real)

    def retrieve(sample):
        scores = {}
        shown = {}
        for kind, source in settings.prompts.items():
            prompts = build.checked_source(stage, source, workdir)
            places = np.linspace(0, len(prompts) - 1, min(len(prompts), settings.count))
            chosen = places.astype(int).tolist()
            wanted = np.array(prompts.texts)[chosen].tolist()
            batches = _inputs(stage, chosen, prompts)
            images = np.concatenate([sample(inputs) for inputs in batches])
            recall = retrieval.recall(features.extract(images), wanted, real_features, texts)
            scores |= {f"{name} {kind}": value for name, value in recall.items()}
            shown[kind] = wanted, real[[texts.index(text) for text in wanted]], images
        return scores, shown

    return retrieve


def _inputs(stage, indices, conditions):
    batch_size = stage.settings.batch_size
    for start in range(0, len(indices), batch_size):
        yield build.inputs(stage, indices[start : start + batch_size], conditions)


def _asked(stage, workdir):
    """Everything that the scores depend on, as it is read back."""
    settings = settings_lib.to_dict(stage.settings)
    autoencoder = stage.run.autoencoder
    protocol = protocols.find(stage.settings.protocol)
    models = _models(stage)
    straight = stage.settings.straightness.stages if stage.settings.straightness else ()
    names = dict.fromkeys(settings_lib.names_of_stages(stage.settings))
    extras = ("clip", "lpips", "metrics", "retrieval", "straightness")
    decoder = digests.of_params(autoencoder_lib.load(autoencoder)[1]) if autoencoder else None
    asked = {
        "protocol": dataclasses.asdict(protocol) | {"count": settings["count"] or protocol.count},
        "features": evaluation.features_of(stage),
        "conditions": evaluation.digest_of(evaluation.conditions(stage, workdir)),
        "reference": _content(evaluation.filled(stage, protocol, "reference"), workdir),
        "floor": _content(evaluation.filled(stage, protocol, "floor"), workdir),
        "teacher": stage.settings.teacher,
        "student": stage.settings.student,
        "files": _hashes(stage, workdir),
        "extras": {key: settings[key] for key in extras},
        "autoencoder": decoder,
        "seed": build.EVALUATION_SEED,
        "models": {name: model._asdict() for name, model in models.items()},
        "versions": {name: workdir_lib.content(workdir / name) for name in names},
        "guidance": {name: stage.stages[name].guidance_scale for name in straight},
    }
    return json.loads(json.dumps(asked))


def _content(settings, workdir):
    """What identifies a source: its content if it knows that, else its settings."""
    if not settings or settings.get("path") == "":
        return settings
    digest = data.digest(build.open_source(settings, workdir))
    return {"source": settings["source"], "digest": digest} if digest else settings


def _hashes(stage, workdir):
    """The hashes of the files that are named, as far as they are there."""
    features = build.located(evaluation.features_of(stage), workdir)
    named = {
        "statistics": stage.settings.statistics,
        "lpips": stage.settings.lpips,
        "weights": features.get("weights"),
        "path": features.get("path"),
    }
    paths = {key: storage.local(value) for key, value in named.items() if value}
    return {key: published.sha256(path) for key, path in paths.items() if path.is_file()}
