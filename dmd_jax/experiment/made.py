"""What a stage was made from: written once beside what it made, and compared by one function.

`made.json` in a stage's directory holds all that its result follows from: the settings that shape
it, and the content of all that it reads, what other stages made among it. Whether a stage is done,
and whether it may go on, is the comparison of that file with what there is now. An evaluation holds
the same in its result.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator

import numpy as np

from dmd_jax.evals import references
from dmd_jax.experiment import build
from dmd_jax.experiment import settings as settings_lib
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import storage

FILE = "made.json"
WITHOUT_NULL = ("embed", "import_weights")  # programs to which `null_cond` means nothing
SHOWN = 5  # differences that an error names


def of(stage: build.Stage, workdir: storage.Path, **more) -> dict:
    """Returns all that the result of a stage follows from; None for what cannot be read now.

    Args:
      stage: whose result it is.
      workdir: of the run.
      **more: what the stage's program knows besides.
    """
    model = settings_lib.shaping(stage.model)
    made = settings_lib.shaping(stage.settings) | model | {"seed": stage.run.seed, **more}
    if stage.settings.program not in WITHOUT_NULL:
        made["content of null_cond"] = _read(lambda: _null(stage, workdir))
    for name in settings_lib.names_of_stages(stage.settings):
        made[f"content of {name}"] = workdir_lib.content(workdir / name)
        made[f"sampler of {name}"] = stage.stages[name].settings.sampler
    for key, source in settings_lib.sources(settings_lib.to_dict(stage.settings)):
        made[f"content of {key}"] = _read(functools.partial(_content, source, workdir))
    return json.loads(json.dumps(made))


def reads(stage: build.Stage) -> Iterator[str]:
    """Yields the names of the stages whose results a stage reads."""
    yield from settings_lib.names_of_stages(stage.settings)
    settings = settings_lib.to_dict(stage.settings)
    if stage.settings.program not in WITHOUT_NULL:
        settings["null_cond"] = stage.run.null_cond
    for value in settings_lib.flat(settings).values():
        if isinstance(value, str) and value.startswith("{workdir}/"):
            name = value.split("/")[1]
            if name in stage.stages:
                yield name


def claim(stage: build.Stage, workdir: storage.Path, made: dict, *, begun: bool):
    """Writes what a stage is made from, or compares it with what is written; by process 0.

    Args:
      stage: that is about to run.
      workdir: of the run.
      made: see `of`.
      begun: whether the stage has made something already.

    Raises:
      ValueError: what is there was made from other things.
    """
    if begun:
        check(stage, workdir, made)
        return
    path = workdir / stage.name / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, made)


def check(stage: build.Stage, workdir: storage.Path, made: dict):
    """Compares what a stage has made with what it would be made from now.

    Raises:
      ValueError: it was made from other things, or nobody knows from what.
    """
    path = workdir / stage.name / FILE
    if not path.exists():
        raise ValueError(
            f"{path.parent} has no {FILE}, which says from what it was made; use another workdir, "
            "or move it away to make it again."
        )
    if found := differences(storage.read_json(path), made):
        raise ValueError(
            f"{path.parent} was made from other things than there are now: "
            f"{'; '.join(found[:SHOWN])}; use another workdir, or move it and what was made from "
            "it away to make them again."
        )


def differences(then: dict, now: dict) -> list[str]:
    """Lists what differs, as far as it can be read now."""
    then, now = settings_lib.flat(then), settings_lib.flat(now)
    return [
        f"{key} is {value!r}, there {then.get(key)!r}"
        for key, value in now.items()
        if value is not None and then.get(key) != value
    ]


def digest(made: dict) -> str:
    """Returns what tells one result from others that were made from other things."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def _read(content: Callable[[], str]) -> str | None:
    """The content, or None where its files are gone, perhaps to make room."""
    try:
        return content()
    except (ValueError, FileNotFoundError):  # the code that needs it raises its own error
        return None


def _null(stage, workdir):
    null = np.asarray(build.null_cond(stage.run, workdir))
    return hashlib.sha256(null.tobytes()).hexdigest()[:16] if null.ndim else None


def _content(source, workdir):
    arguments = {name: value for name, value in source.items() if name != "batch_size"}
    return references.content(build.open_source(arguments, workdir))
