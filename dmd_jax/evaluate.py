"""The stage that measures the one-step generator against its teacher: evaluation.json and report.png in the workdir."""

import pathlib
import statistics
import time

import jax
import ml_collections

from dmd_jax import checkpoint, experiment, metrics, sampling
from dmd_jax.evals import report, suite


def done(config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path) -> bool:
    """Whether evaluation.json is about the checkpoints that are there now."""
    path = workdir / "evaluation.json"
    return path.exists() and metrics.read_json(path).get("protocol") == _protocol(config, stage, workdir)


def run(config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path):
    """Samples both models from the same noise and measures the images against the held-out real ones.

    Raises:
      ValueError: a checkpoint is missing, or the batch does not fit the devices.
    """
    settings = config[stage]
    z, cond = experiment.inputs(config, settings.count, workdir)
    classifier = experiment.make_classifier(config, workdir)
    train, held_out = (experiment.make_source(config.images[split], workdir) for split in ("train", "held_out"))

    images, seconds, nfe = {}, {}, {}
    for name in (settings.teacher, settings.student):
        parallel = experiment.make_parallel(config, stage)
        recipe = experiment.make_recipe(config, name, parallel)
        sample = sampling.make_sampler(recipe, parallel, settings.batch_size)
        params = experiment.load_params(config, f"{{workdir}}/{name}", workdir)
        images[name] = sample(params, z, cond)
        seconds[name] = _seconds_per_image(sample, params, z[: settings.batch_size], cond[: settings.batch_size], settings.timing_repeats)
        nfe[name] = recipe.nfe

    result = {
        "protocol": _protocol(config, stage, workdir),
        "real_train": suite.compare(classifier, held_out.image, train.image, train.cond),
        **{name: suite.compare(classifier, held_out.image, images[name], cond) for name in images},
        "classifier_accuracy": float((classifier.predict(held_out.image) == held_out.cond).mean()),
        "nfe": nfe,
        "seconds_per_image": seconds,
        "speedup": seconds[settings.teacher] / seconds[settings.student],
        "device": f"{parallel.mesh.size} x {jax.devices()[0].device_kind}",
    }
    if jax.process_index() == 0:
        curves = {name: metrics.read(workdir / name) for name in images}
        report.draw(workdir / "report.png", result, images, curves, teacher=settings.teacher, student=settings.student)
        metrics.write_json(workdir / "evaluation.json", result)
        print(report.table(result, settings.teacher, settings.student), f"\n{workdir / 'report.png'}")


def _protocol(config, stage, workdir):
    """Everything that the scores depend on."""
    settings = config[stage]
    return {
        "count": settings.count,
        "batch_size": settings.batch_size,
        "features": "last hidden layer of an MLP classifier of the training split",
        "reference": config.images.held_out.to_dict(),
        "steps": {name: max(checkpoint.all_steps(workdir / name), default=None) for name in (settings.teacher, settings.student)},
    }


def _seconds_per_image(sample, params, z, cond, repeats):
    """The median of `repeats` runs of one batch that is already compiled."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        sample(params, z, cond)
        times.append(time.perf_counter() - began)
    return statistics.median(times) / len(z)
