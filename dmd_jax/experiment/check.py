"""Checks at the start whether a run can work, before anything is made."""

import json
from collections.abc import Iterable, Mapping

from dmd_jax import lookup, optim
from dmd_jax.experiment import build, evaluation
from dmd_jax.experiment import settings as settings_lib
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.models import quantize
from dmd_jax.runtime import profiling, storage
from dmd_jax.weights import published

OPENED = ("captions.", "folder.", "twemoji")  # data sources that lie in files of others


def stages(stages: Mapping[str, build.Stage]):
    """Checks that the stages of a run fit together and name things that exist; opens no file.

    Raises:
      ValueError: something does not fit.
    """
    run = next(iter(stages.values())).run
    classes = run.network.get("num_classes", 0)
    if classes and isinstance(run.null_cond, int) and not 0 <= run.null_cond <= classes:
        raise ValueError(
            f"null_cond is {run.null_cond}; expected {classes}, as network.num_classes, for no "
            "label, or a label below it."
        )
    for stage in (stages[name] for name in run.stages):
        for name, source in settings_lib.sources(settings_lib.to_dict(stage.settings)):
            try:
                lookup.find("data", source["source"])
            except ValueError as error:
                raise ValueError(f"{stage.name}.{name}: {error}") from error
        sampler = getattr(stage.settings, "sampler", None)
        if sampler is not None:
            process = stage.denoiser.process
            build.sampler_from_settings(sampler, None, process, f"{stage.name}.sampler")
        if stage.settings.program in CHECKS:
            CHECKS[stage.settings.program](stage)
    if run.profile:
        profiling.parse(run.profile)


def files(stages: Iterable[build.Stage], workdir: storage.Path):
    """Checks that the files of others are there that some stages still need.

    Raises:
      ValueError: files are missing; all of them, one a line, with where each is published.
    """
    missing = []
    sources = {}
    for stage in stages:
        for name, path in _files(stage, workdir):
            try:
                find = published.find if name in ("clip", "lpips") else build.find_files
                find(path)
            except ValueError as error:
                missing.append(str(error))
        for source in _sources(stage):
            sources[json.dumps(source)] = source
    for source in sources.values():
        try:
            build.open_source(source, workdir)
        except ValueError as error:
            missing.append(str(error))
    # COCO's captions without its images are part of those with them.
    lines = [
        line
        for line in dict.fromkeys(missing)
        if not any(line in other and line != other for other in missing)
    ]
    if lines:
        raise ValueError("\n".join(lines))


def _files(stage, workdir):
    """Names and paths of the files that a stage needs, but for those that are in the workdir."""
    imported = (workdir / stage.name / workdir_lib.SOURCE).exists()
    pairs = list(settings_lib.files(stage.settings, ("checkpoint",) if imported else ()))
    measured = _measured_by(stage)
    if measured:
        pairs += settings_lib.files(measured.settings)
        pairs += settings_lib.of_arguments(evaluation.features_of(measured))
    if stage.settings.program == "embed":
        pairs += settings_lib.of_arguments(stage.run.text)
    if _decodes(stage) and stage.run.autoencoder:
        pairs += settings_lib.of_arguments(stage.run.autoencoder)
    return [(name, path) for name, path in pairs if "{workdir}" not in path]


def _measured_by(stage):
    """The evaluation by which a stage measures images, if it does."""
    if stage.settings.program == "evaluate":
        return stage
    return stage.evaluation if getattr(stage.settings, "scores", None) else None


def _decodes(stage):
    """Whether a stage turns latents into images, or images into latents."""
    settings = stage.settings
    return (
        settings.program == "evaluate"
        or getattr(settings, "latents", False)
        or getattr(settings, "preview_every", 0) > 0
        or getattr(settings, "scores", None) is not None
    )


def _sources(stage):
    """The data sources of a stage that lie in files of others, not in the workdir."""
    sources = [source for _, source in settings_lib.sources(settings_lib.to_dict(stage.settings))]
    if measured := _measured_by(stage):
        sources += evaluation.real_images(measured)
    for source in sources:
        if source["source"].startswith(OPENED) and "{workdir}" not in json.dumps(source):
            yield {key: value for key, value in source.items() if key != "batch_size"}


def _check_pairs(stage):
    _check_sampled(stage, stage.settings.teacher, f"{stage.name}.teacher")


def _check_train(stage):
    settings = stage.settings
    _check_recipe(settings.recipe, f"{stage.name}.recipe")
    _check_start(stage)
    _check_scores(stage)
    distance = settings.recipe.get("distance", {"name": "squared_error"})
    if distance["name"] != "lpips":
        try:
            lookup.find("losses", distance["name"])
        except ValueError as error:
            raise ValueError(f"{stage.name}.recipe.distance: {error} Or use lpips.") from error
    elif not distance.get("weights"):
        raise ValueError(f"{stage.name}.recipe.distance 'lpips' needs a file of weights; name one.")


def _check_recipe(settings, name):
    arguments = {key: value for key, value in settings.items() if key != "name"}
    make = lookup.find("recipes", settings.get("name", ""))
    lookup.check_arguments(make, arguments | {"seed": 0, "null_cond": 0}, name, None, None)
    for key, value in arguments.items():
        if key.endswith("optimizer"):
            lookup.check_arguments(optim.adamw, value, f"{name}.{key}")


def _check_start(stage):
    """Checks that a stage can go on from what the ones before have learnt."""
    settings = stage.settings
    for key in ("init_from", "continues"):
        before = getattr(settings, key)
        if before:
            _check_sampled(stage, before, f"{stage.name}.{key}")
    if settings.continues:
        done = stage.stages[settings.continues].settings.num_steps
        if settings.num_steps <= done:
            raise ValueError(
                f"{stage.name}.num_steps is {settings.num_steps}, but {settings.continues}, "
                f"which it continues, has {done}; give it more."
            )
    if not settings.init_from:
        return
    before = stage.stages[settings.init_from]
    for key in ("size", "channels", "num_classes"):
        ours = stage.model.network.get(key)
        theirs = stage.run.network.get(key)
        if ours != theirs:
            raise ValueError(
                f"{stage.name}.network.{key} is {ours}, expected {theirs}, as network has it."
            )
    flows = [
        s.model.prediction for s in (stage, before) if s.model.process["name"] == "RectifiedFlow"
    ]
    if len(set(flows)) > 1:
        raise ValueError(
            f"{stage.name}.prediction is {flows[0]!r}, but it starts from {before.name}, "
            f"whose is {flows[1]!r}; give both the same."
        )


def _check_scores(stage):
    settings = stage.settings
    if (settings.scores or settings.preview_every) and stage.evaluation is None:
        named = settings.evaluation or "any"
        raise ValueError(
            f"{stage.name}: scores and previews use the conditions of an evaluation, but there is "
            f"no stage {named!r} with the program 'evaluate'; add one, or leave them out."
        )
    if not settings.scores:
        if settings.best_metric:
            raise ValueError(
                f"{stage.name}.best_metric {settings.best_metric!r} needs scores; "
                "name a protocol, or leave it out."
            )
        return
    scores = settings.scores
    evaluation.check(stage.evaluation, scores.protocol, scores.count, f"{stage.name}.scores")
    if settings.best_metric and settings.checkpoint_every % scores.every:
        raise ValueError(
            f"{stage.name}.best_metric {settings.best_metric!r} needs scores at every checkpoint, "
            f"but checkpoint_every {settings.checkpoint_every} is not a multiple of "
            f"{stage.name}.scores.every {scores.every}; change one of them."
        )


def _check_evaluation(stage):
    settings = stage.settings
    for role in ("teacher", "student"):
        _check_sampled(stage, getattr(settings, role), f"{stage.name}.{role}")
    evaluation.check(stage, settings.protocol, settings.count, stage.name)
    for metric in settings.metrics:
        lookup.check_arguments(lookup.find("evals", metric), {}, f"metric {metric}", None, None)
    for name, row in settings.others.items():
        where = f"{stage.name}.others.{name}"
        if name in ("real", settings.teacher, settings.student):
            raise ValueError(f"{where} has a name that is taken; choose another one.")
        _check_sampled(stage, row.stage, f"{where}.stage")
        if row.stage not in stage.run.stages:
            raise ValueError(
                f"{where}.stage {row.stage!r} is not among the stages: "
                f"{', '.join(stage.run.stages)}."
            )
        process = stage.stages[row.stage].denoiser.process
        build.sampler_from_settings(row.sampler, None, process, f"{where}.sampler")
        if row.quantize not in ("", "int8"):
            raise ValueError(f"{where}.quantize is {row.quantize!r}; expected 'int8' or nothing.")
        if row.quantize:
            quantize.require_qwix()
    if settings.straightness:
        for name in settings.straightness.stages:
            _check_sampled(stage, name, f"{stage.name}.straightness.stages: {name}")


def _check_sampled(stage, name, where):
    having = [s.name for s in stage.stages.values() if hasattr(s.settings, "sampler")]
    if name not in having:
        raise ValueError(
            f"{where} is {name!r}, which is no stage with a sampler"
            f"{lookup.nearest(name, having)}; there are: {', '.join(having)}."
        )


CHECKS = {
    "pairs": _check_pairs,
    "train": _check_train,
    "evaluate": _check_evaluation,
}
