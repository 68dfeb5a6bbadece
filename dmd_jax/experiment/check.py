"""Whether a config can work, before anything is made of it."""

import json
import pathlib
import re
from collections.abc import Iterable

import ml_collections

from dmd_jax import lookup, optim
from dmd_jax.experiment import build, evaluation
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.models import quantize
from dmd_jax.runtime import profiling, storage
from dmd_jax.weights import published

PROGRAMS = ("import_weights", "embed", "train", "pairs", "evaluate")
POSITIVE = re.compile(
    r"(batch_size|num_steps|log_every|scores\.every|checkpoint_every|keep_checkpoints|accumulation|fsdp|count|shard_size|timing_repeats)$"
)
FILES = re.compile(
    r"(^|\.)(checkpoint|weights|statistics)$|^(clip|lpips)$"
)  # of others, wanted from the start even if used at the end


def config(config: ml_collections.ConfigDict):
    """Raises ValueError for a config that cannot work whatever the workdir."""
    for key, value in build.flat(config.to_dict()).items():
        if POSITIVE.search(key) and value is not None and value < 1:
            raise ValueError(f"{key} is {value}; expected at least 1.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed is {config.seed}; expected 0 to 2^32 - 1.")
    if config.mesh.data < 1 and config.mesh.data != -1:
        raise ValueError(
            f"mesh.data is {config.mesh.data}; expected at least 1, or -1 for all devices."
        )
    if not config.stages:
        raise ValueError("stages is empty; name at least one.")
    for stage in config.stages:
        if stage not in config or config[stage].get("program") not in PROGRAMS:
            raise ValueError(
                f"stage {stage!r} needs a key of that name with a program, one of {', '.join(PROGRAMS)}."
            )
        before = config[stage].get("continues")
        if before and config[stage].num_steps <= config[before].num_steps:
            done = config[before].num_steps
            raise ValueError(
                f"{stage}.num_steps is {config[stage].num_steps}, but {before}, which it continues, has {done}; give it more."
            )
    if "profile" in config:
        profiling.parse(config.profile)
    _names(config)


def files(config: ml_collections.ConfigDict, stages: Iterable[str], workdir: storage.Path):
    """Raises ValueError if files of others are missing, all of them at once, that a stage still needs."""
    missing, sources = [], []
    shared = [
        key
        for key in ("features", "text", "autoencoder")
        if key in config and any("recipe" not in config[s] for s in stages)
    ]
    for stage in (*stages, *shared):
        found = [
            source for _, source in build.sources(config[stage].to_dict())
        ]  # those of captions that no stage makes
        found += (
            evaluation.real_images(config)
            if config.get(stage, {}).get("program") == "evaluate"
            else []
        )
        sources += [
            s
            for s in found
            if s["source"].startswith(("captions.", "folder.", "twemoji"))
            and "{workdir}" not in json.dumps(s)
        ]
        for key, value in build.flat(config[stage].to_dict()).items():
            imported = key == "checkpoint" and (workdir / stage / workdir_lib.SOURCE).exists()
            if FILES.search(key) and value and "{workdir}" not in value and not imported:
                try:
                    find = published.find if key in ("clip", "lpips") else build.find_files
                    find(value)
                except ValueError as error:
                    missing.append(str(error))
    for settings in {json.dumps(source): source for source in sources}.values():
        try:
            build.open_source(settings, workdir)
        except ValueError as error:
            missing.append(str(error))
    if missing:  # COCO's captions without its images are part of those with them
        raise ValueError(
            " ".join(
                m
                for m in dict.fromkeys(missing)
                if not any(m in other and m != other for other in missing)
            )
        )


def _names(config: ml_collections.ConfigDict):
    """Raises ValueError if something that the config names does not exist; opens no file."""
    denoisers, made = {}, {}
    for stage in ("", *config.stages):
        settings = json.dumps(
            [build.of_stage(config, stage, key) for key in ("network", "process", "prediction")],
            default=dict,
        )
        try:
            denoisers[stage] = made[settings] = made.get(settings) or build.make_denoiser(
                config, stage
            )
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(
                f"network or process of {stage or 'the config'} does not fit ({error}); check names and values."
            ) from error
    for name, settings in build.sources(config.to_dict()):
        try:
            lookup.find("data", settings["source"])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for stage in config.stages:
        settings = config[stage]
        if "sampler" in settings:
            build.sampler_of(
                settings.sampler.to_dict(), None, denoisers[stage].process, f"{stage}.sampler"
            )
        if "recipe" in settings:
            _check_recipe(settings.recipe.to_dict(), f"{stage}.recipe")
            _check_start(config, stage)
            _check_scores(config, stage)
            distance = settings.recipe.get("distance", {"name": "squared_error"})
            if build.choose("distance", build.DISTANCES, distance["name"]) and not distance.get(
                "weights"
            ):
                raise ValueError(
                    f"{stage}.recipe.distance {distance['name']!r} needs a file of weights; name one."
                )
        for role in ("teacher", "student"):
            if role in settings:
                _check_sampled(config, settings[role], f"{stage}.{role}")
        if settings.program == "evaluate":
            evaluation.check(config, settings.protocol, settings.count, stage)
            _check_rows(config, stage, denoisers)


def _check_recipe(settings, name):
    make, optimizers = (
        lookup.find("recipes", settings.pop("name")),
        [key for key in settings if key.endswith("optimizer")],
    )
    lookup.check_arguments(make, settings | {"seed": 0, "null_cond": 0}, name, None, None)
    for key in optimizers:
        lookup.check_arguments(optim.adamw, settings[key], f"{name}.{key}")


def _check_start(config, stage):
    """Whether a stage can go on from what the one before has learnt."""
    before = pathlib.Path(config[stage].get("init_from", "")).name
    if before not in config.stages:
        return
    for key in ("size", "channels", "num_classes"):
        ours, theirs = build.of_stage(config, stage, "network").get(key), config.network.get(key)
        if ours != theirs:
            raise ValueError(
                f"{stage}.network.{key} is {ours}, expected {theirs}, as config.network has it."
            )
    flows = [
        build.of_stage(config, name, "prediction")
        for name in (stage, before)
        if build.of_stage(config, name, "process").name == "RectifiedFlow"
    ]
    if len(set(flows)) > 1:
        raise ValueError(
            f"{stage}.prediction is {flows[0]!r}, but it starts from {before}, whose is {flows[1]!r}; give both the same."
        )


def _check_scores(config, stage):
    scores, best = config[stage].get("scores"), config[stage].best_metric
    if not scores:
        if best:
            raise ValueError(
                f"{stage}.best_metric {best!r} needs scores; name a protocol, or leave it out."
            )
        return
    if set(scores.keys()) != {"every", "protocol", "count"}:
        raise ValueError(
            f"{stage}.scores is {scores.to_dict()}, expected every, protocol and count, or nothing at all."
        )
    evaluation.check(config, scores.protocol, scores.count, f"{stage}.scores")
    if best and config[stage].checkpoint_every % scores.every:
        raise ValueError(
            f"{stage}.best_metric {best!r} needs scores at every checkpoint, but checkpoint_every "
            f"{config[stage].checkpoint_every} is not a multiple of {stage}.scores.every {scores.every}; change one of them."
        )


def _check_sampled(config, stage, name):
    found = config.get(stage) if isinstance(stage, str) else None
    if not isinstance(found, ml_collections.ConfigDict) or "sampler" not in found:
        raise ValueError(f"{name} is {stage!r}, which is no stage with a sampler.")


def _check_rows(config, stage, denoisers):
    settings = config[stage].to_dict()
    for name, row in settings.get("others", {}).items():
        where = f"{stage}.others.{name}"
        if name in ("real", settings["teacher"], settings["student"]):
            raise ValueError(f"{where} has a name that is taken; choose another one.")
        if not isinstance(row, dict) or not {"stage", "sampler"} <= row.keys() <= {
            "stage",
            "sampler",
            "quantize",
        }:
            raise ValueError(
                f"{where} is {row!r}, expected stage, sampler and, if wanted, quantize."
            )
        _check_sampled(config, row["stage"], f"{where}.stage")
        if row["stage"] not in config.stages:
            raise ValueError(
                f"{where}.stage {row['stage']!r} is not among the stages: {', '.join(config.stages)}."
            )
        build.sampler_of(row["sampler"], None, denoisers[row["stage"]].process, f"{where}.sampler")
        if build.choose("quantize", {"": False, "int8": True}, row.get("quantize", "")):
            quantize.require_qwix()
    if straightness := settings.get("straightness"):
        if straightness.keys() != {"stages", "num_steps", "count"}:
            raise ValueError(
                f"{stage}.straightness is {straightness}, expected stages, num_steps and count."
            )
        for name in straightness["stages"]:
            _check_sampled(config, name, f"{stage}.straightness.stages: {name}")
