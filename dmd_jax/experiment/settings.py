"""What a config may say: the settings of a run, and of a stage by its `program`, with defaults.

A config (ml_collections) says what differs from these. `complete` fills it up, so that every key
can be overridden from the command line, and `read` turns it into frozen dataclasses, once.

A dict holds the arguments of a function that is named in it (`name`, or `source` for data); it is
checked against the signature of that function.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from dmd_jax import lookup

# Arguments of these names say where files of others lie. A later run may find them elsewhere: their
# content is compared by digests.
LOCATIONS = ("checkpoint", "weights", "annotations", "images", "path", "data_dir")
COSTS = ("remat",)  # arguments of a network that change its memory and its speed, and no result


def setting(
    default=dataclasses.MISSING, *, least=None, may_change=False, file=False, stage=False
) -> Any:
    """A field of settings.

    Args:
      default: its value where a config says nothing; none for a setting that is required.
      least: the lowest number that is allowed.
      may_change: whether a later run in the same workdir may have another value.
      file: whether it names a file or a directory of others, which is looked for at the start.
      stage: whether it names a stage, or several, whose results are read.
    """
    metadata = {"least": least, "may_change": may_change, "file": file, "stage": stage}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """The devices; see `sharding.make_mesh`."""

    data: int = setting(-1, may_change=True)  # devices that split the batch only; -1 = all
    # Devices that split the batch, the parameters and the optimizer's state.
    fsdp: int = setting(1, least=1, may_change=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What the stages of a run share."""

    # Their names, in the order in which they run; each is a key of its own.
    stages: tuple = setting()
    network: dict = setting()  # of a function in dmd_jax/models
    process: dict = setting()  # of a class in dmd_jax/process.py
    prediction: str = setting()  # what the network predicts, see dmd_jax/denoiser.py
    seed: int = setting(0, least=0)  # of everything
    mesh: Mesh = setting({}, may_change=True)
    # The label, or the file, that stands for no condition.
    null_cond: int | str | None = setting(None)
    features: dict = setting({}, may_change=True)  # what protocols leave open of their features
    text: dict | None = setting(None)  # of a function in dmd_jax/encoders; None without texts
    # {"checkpoint": a diffusers directory, ...}; None where networks see images.
    autoencoder: dict | None = setting(None)
    # Values to which several settings refer, such as the places of files.
    variables: dict = setting({}, may_change=True)
    # Packages of the user's own whose functions the config may name; see dmd_jax/lookup.py.
    plugins: tuple = setting((), may_change=True)
    # Seconds without a step, a preview or a score after which a run that trains ends; 0 = never.
    step_timeout: int = setting(3600, least=0, may_change=True)
    profile: str = setting("", may_change=True)  # the first and the last step to trace; "" = none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What every stage may say: a model of its own, in place of the run's."""

    program: str = setting()
    network: dict | None = setting(None)
    process: dict | None = setting(None)
    prediction: str | None = setting(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportWeights(Stage):
    """The settings of dmd_jax/stages/import_weights.py."""

    # EDM's file, or a diffusers directory.
    checkpoint: str = setting(may_change=True, file=True)
    sampler: dict = setting()  # of a function in dmd_jax/samplers.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embed(Stage):
    """The settings of dmd_jax/stages/embed.py."""

    captions: dict = setting()  # a data source
    latents: bool = setting(False)  # whether images are turned into latents, too
    dtype: str = setting("float16")  # of the embeddings
    shard_size: int = setting(10_000, least=1)  # rows
    # Images that are encoded at once, over all devices of a process; needed for latents.
    batch_size: int | None = setting(None, least=1, may_change=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(Stage):
    """The settings of dmd_jax/stages/pairs.py."""

    teacher: str = setting(stage=True)  # the stage whose sampler makes the images
    conditions: dict = setting()  # a data source
    count: int = setting(least=1)  # pairs
    shard_size: int = setting(1000, least=1)  # pairs
    # Pairs that are made at once, over all devices of a process.
    batch_size: int = setting(least=1, may_change=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """How a stage is measured while it trains."""

    every: int = setting(least=1)  # steps
    protocol: str = setting()  # of dmd_jax/evals/protocols.py
    count: int = setting(least=1)  # images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Stage):
    """The settings of dmd_jax/stages/train.py."""

    recipe: dict = setting()  # of a function in dmd_jax/recipes
    sampler: dict = setting()  # of a function in dmd_jax/samplers.py
    data: dict = setting()  # a data source for each stream; `batch_size` in one is its own
    batch_size: int = setting(least=1)  # of each stream, over all devices
    num_steps: int = setting(least=1, may_change=True)  # the last step
    # The stage whose weights it starts from; "" = random weights.
    init_from: str = setting("", stage=True)
    # The stage whose optimizers and critic it takes, and whose steps it counts on; "" = none.
    continues: str = setting("", stage=True)
    # Pieces that each device cuts its share of the batch into.
    accumulation: int = setting(1, least=1, may_change=True)
    log_every: int = setting(100, least=1, may_change=True)  # steps
    checkpoint_every: int = setting(1000, least=1, may_change=True)  # steps
    keep_checkpoints: int = setting(2, least=1, may_change=True)  # the newest ones
    # Updates that are skipped because a gradient is not finite.
    max_skipped_updates: int = setting(100, least=0, may_change=True)
    preview_every: int = setting(0, least=0, may_change=True)  # steps; 0 = never
    preview_images: int = setting(100, least=1, may_change=True)
    scores: Scores | None = setting(None)  # None = the stage is not measured while it trains
    best_metric: str = setting("")  # also keep the checkpoint that has the lowest; "" = none
    # The evaluation whose conditions and real images previews and scores use; "" = the first.
    evaluation: str = setting("", may_change=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Another model of an evaluation."""

    stage: str = setting(stage=True)
    sampler: dict = setting()
    quantize: str = setting("")  # "int8" for eight bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Straightness:
    """Which flows an evaluation measures; see `samplers.straightness`."""

    stages: tuple = setting(stage=True)
    num_steps: int = setting(least=1)
    count: int = setting(least=1)  # images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How well captions are found again among the images of all of them."""

    gallery: dict = setting()  # a data source of real images with their captions
    prompts: dict = setting()  # a data source for each kind of prompt
    count: int = setting(least=1)  # images of each kind
    credit: str = setting("")  # what the picture says of the real images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """The settings of dmd_jax/stages/evaluate.py; a later run may change all of them."""

    teacher: str = setting(may_change=True, stage=True)
    student: str = setting(may_change=True, stage=True)
    protocol: str = setting(may_change=True)  # of dmd_jax/evals/protocols.py
    count: int | None = setting(None, least=1, may_change=True)  # images; None = the protocol's
    # What the protocol leaves open of the real images, of those that are measured as if they were
    # generated, and of the conditions of generated ones.
    reference: dict = setting({}, may_change=True)
    floor: dict = setting({}, may_change=True)
    conditions: dict = setting({}, may_change=True)
    # What the protocol leaves open of its features; None = what the run says.
    features: dict | None = setting(None, may_change=True)
    # A file in place of the real images' statistics; "" = none.
    statistics: str = setting("", may_change=True, file=True)
    # The directory of the CLIP model; "" = no CLIP score.
    clip: str = setting("", may_change=True, file=True)
    # The file of LPIPS' weights; "" = no pairwise LPIPS.
    lpips: str = setting("", may_change=True, file=True)
    batch_size: int = setting(least=1, may_change=True)  # images, over all devices
    timing_repeats: int = setting(3, least=1, may_change=True)  # the median counts
    # Further metrics, `(real, generated) -> scores` of two `suite.Collected`, by dotted names.
    metrics: tuple = setting((), may_change=True)
    others: dict = setting({}, may_change=True)  # a `Row` for each further model
    straightness: Straightness | None = setting(None, may_change=True)
    retrieval: Retrieval | None = setting(None, may_change=True)


PROGRAMS = {
    "import_weights": ImportWeights,
    "embed": Embed,
    "pairs": Pairs,
    "train": Train,
    "evaluate": Evaluate,
}
NESTED = {("Evaluate", "others"): Row}  # dicts whose values are settings


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Fills up a config, in place, with the defaults of what it does not say; returns it.

    Raises:
      ValueError: a stage has no program; the rest is left to `read`.
    """
    with config.unlocked():
        _fill(config, Run)
        for name in stage_names(config):
            program = program_of(config, name)
            _fill(config[name], program)
    return config


def stage_names(config: Mapping) -> tuple[str, ...]:
    """Returns the names of the stages that run, in order, and of a config's other stages."""
    others = [key for key, value in config.items() if hasattr(value, "keys") and "program" in value]
    return tuple(dict.fromkeys((*config.get("stages", ()), *others)))


def program_of(config: Mapping, name: str) -> type:
    """Returns the class of the settings of the stage `name`.

    Raises:
      ValueError: there is no such key, or its program is none.
    """
    stage = config.get(name)
    program = stage.get("program") if hasattr(stage, "get") else None
    if program not in PROGRAMS:
        raise ValueError(
            f"stage {name!r} needs a key of that name with a program, "
            f"one of {', '.join(PROGRAMS)}; its program is {program!r}."
        )
    return PROGRAMS[program]


def read(config: Mapping) -> tuple[Run, dict[str, Stage]]:
    """Reads a config, given as plain dicts, as the settings of its run and of each of its stages.

    Raises:
      ValueError: keys are unknown or missing, or values have another type or are too low.
    """
    faults = []
    if not config.get("stages"):
        raise ValueError("stages is empty; name at least one.")
    names = stage_names(config)
    programs = {name: program_of(config, name) for name in names}
    top = {key: value for key, value in config.items() if key not in names}
    run = _read(Run, top, "", faults)
    stages = {name: _read(programs[name], config[name], name, faults) for name in names}
    if faults:
        raise ValueError(" ".join(faults))
    if not 0 <= run.seed < 2**32:
        raise ValueError(f"seed is {run.seed}; expected 0 to 2^32 - 1.")
    if run.mesh.data < 1 and run.mesh.data != -1:
        raise ValueError(
            f"mesh.data is {run.mesh.data}; expected at least 1, or -1 for all devices."
        )
    return run, stages


def to_dict(settings) -> Any:
    """Returns settings, or what is nested in them, as plain dicts, lists and values."""
    if dataclasses.is_dataclass(settings):
        fields = dataclasses.fields(settings)
        return {field.name: to_dict(getattr(settings, field.name)) for field in fields}
    if isinstance(settings, Mapping):
        return {key: to_dict(value) for key, value in settings.items()}
    return (
        [to_dict(value) for value in settings] if isinstance(settings, tuple | list) else settings
    )


def flat(tree, prefix: str = "") -> dict:
    """Returns nested dicts as one, with dots in its keys."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    rows = {}
    for key, value in tree.items():
        rows |= flat(value, f"{prefix}.{key}" if prefix else key)
    return rows


def may_change(config: Mapping, key: str) -> bool:
    """Returns whether a later run in one workdir may have another value for a key with dots."""
    first, *rest = key.split(".")
    kind = Run
    if first in stage_names(config):
        kind, first, *rest = program_of(config, first), *rest
    field = {field.name: field for field in dataclasses.fields(kind)}.get(first)
    if field is None:
        return False
    if field.metadata["may_change"]:
        return True
    if first == "network":
        return bool(rest) and rest[-1] in COSTS
    if first == "text" and rest == ["batch_size"]:
        return True
    return bool(rest) and rest[-1] in LOCATIONS


def shaping(settings) -> dict:
    """Returns the settings that shape a result: a later run may not have other ones."""
    fields = [f for f in dataclasses.fields(settings) if not f.metadata.get("may_change")]
    return {field.name: _without_places(to_dict(getattr(settings, field.name))) for field in fields}


def _without_places(tree):
    if not isinstance(tree, Mapping):
        return tree
    kept = {key: value for key, value in tree.items() if key not in (*LOCATIONS, *COSTS)}
    return {key: _without_places(value) for key, value in kept.items()}


def names_of_stages(settings) -> Iterator[str]:
    """Yields the names of the stages whose results a stage with these settings reads."""
    if dataclasses.is_dataclass(settings):
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if field.metadata["stage"]:
                yield from [value] * bool(value) if isinstance(value, str) else value
            else:
                yield from names_of_stages(value)
    elif isinstance(settings, Mapping):
        for value in settings.values():
            yield from names_of_stages(value)


def files(settings, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yields name and value of every setting that names a file or directory of others.

    Those of the settings themselves are marked; in arguments they are known by their names. Data
    sources look for their own files. `skip` names settings to be passed over.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in skip:
            continue
        if field.metadata["file"] and value:
            yield field.name, value
        if isinstance(value, Mapping):
            yield from of_arguments(value)


def of_arguments(arguments: Mapping) -> Iterator[tuple[str, str]]:
    """Yields name and value of the files that arguments of networks, distances or features name."""
    for key, value in arguments.items():
        if isinstance(value, Mapping) and "source" not in value:
            yield from of_arguments(value)
        elif key in ("checkpoint", "weights") and isinstance(value, str) and value:
            yield key, value


def sources(tree, name: str = "") -> Iterator[tuple[str, Mapping]]:
    """Yields the data sources in nested settings, with the keys under which they stand."""
    if isinstance(tree, Mapping):
        if "source" in tree:
            yield name, tree
        for key, value in tree.items():
            yield from sources(value, f"{name}.{key}" if name else key)


def _fill(config, kind):
    for field in dataclasses.fields(kind):
        default = _default(field)
        if field.name not in config and default is not dataclasses.MISSING:
            config[field.name] = default
        nested = _nested(field)
        if field.name in config and nested and hasattr(config[field.name], "keys"):
            _fill(config[field.name], nested)
        row = NESTED.get((kind.__name__, field.name))
        if row and hasattr(config[field.name], "values"):
            for value in config[field.name].values():
                if hasattr(value, "keys"):
                    _fill(value, row)


def _default(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _nested(field):
    """The class of settings that a field holds, if it holds such."""
    kinds = typing.get_args(field.type) or (field.type,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def _read(kind, values, where, faults):
    """The settings, or None where `faults` has something to say of them."""
    called = lambda name: f"{where}.{name}" if where else name
    if not isinstance(values, Mapping):
        faults.append(f"{where} is {values!r}; expected {', '.join(_names(kind))}.")
        return None
    before = len(faults)
    arguments = {}
    for key in values:
        if key not in _names(kind):
            hint = lookup.nearest(key, _names(kind))
            faults.append(
                f"{called(key)} is no setting{hint}; {where or 'the config'} may have: "
                f"{', '.join(_names(kind))}."
            )
    for field in dataclasses.fields(kind):
        if field.name not in values:
            if _default(field) is dataclasses.MISSING:
                faults.append(f"{called(field.name)} is missing; give it.")
            continue
        value = values[field.name]
        name = called(field.name)
        nested = _nested(field)
        row = NESTED.get((kind.__name__, field.name))
        if nested:
            optional = types.NoneType in typing.get_args(field.type)
            none = optional and (value is None or value == {})
            value = None if none else _read(nested, value, name, faults)
        elif row and isinstance(value, Mapping):
            value = {key: _read(row, v, f"{name}.{key}", faults) for key, v in value.items()}
        elif fault := _fault(field, value):
            faults.append(f"{name} is {value!r}; expected {fault}.")
        elif isinstance(value, list):
            value = tuple(value)
        arguments[field.name] = value
    return kind(**arguments) if len(faults) == before else None


def _names(kind):
    return [field.name for field in dataclasses.fields(kind)]


def _fault(field, value):
    """What was expected, if it is not what `value` is."""
    kinds = typing.get_args(field.type) or (field.type,)
    accepted = {int: (int,), float: (int, float), tuple: (tuple, list), dict: (Mapping,)}
    fits = any(
        isinstance(value, accepted.get(kind, (kind,)))
        and (kind is bool or not isinstance(value, bool))
        for kind in kinds
    )
    if not fits:
        names = ["None" if kind is types.NoneType else kind.__name__ for kind in kinds]
        return f"a value of type {' or '.join(names)}"
    least = field.metadata["least"]
    if least is not None and value is not None and not isinstance(value, str) and value < least:
        return f"at least {least}"
    return ""
