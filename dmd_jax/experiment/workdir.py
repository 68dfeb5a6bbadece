"""The directory of a run: who may write to it, and what lies there."""

import contextlib
import fcntl
import os
import socket
import time
import zlib
from collections.abc import Callable

import jax
import numpy as np

from dmd_jax import lookup, sharding
from dmd_jax.experiment import build
from dmd_jax.experiment import settings as settings_lib
from dmd_jax.models import layers
from dmd_jax.runtime import checkpoint, distributed, storage
from dmd_jax.weights import diffusers, edm, state_dict

# Of a stage that imports weights: these, and the file that they came from.
WEIGHTS = "weights.safetensors"
SOURCE = "source.json"
LOCK = "lock"  # in the workdir


def read_run(workdir: storage.Path, stage: str = "", *, dtype: str = "") -> build.Stage:
    """Reads a stage of a run, for use of what the run has made.

    Args:
      workdir: of the run.
      stage: its name; the student of the first evaluation if not given.
      dtype: of the networks; the config's if not given.

    Raises:
      ValueError: `workdir` is no run's, or the stage has trained and imported nothing.
    """
    path = workdir / "config.json"
    values = storage.read_json(path) if path.exists() else {}
    if "stages" not in values:
        raise ValueError(f"{workdir} is no run's directory: there is no {path} of one.")
    values["mesh"] = {"data": 1, "fsdp": 1}
    if dtype:
        for model in (values, *(values[name] for name in values["stages"])):
            if model.get("network"):
                model["network"]["dtype"] = dtype
    run, settings = settings_lib.read(_from_its_place(values, workdir))
    stages = build.from_settings(run, settings)
    evaluations = [s for s in stages.values() if s.settings.program == "evaluate"]
    stage = stage or (evaluations[0].settings.student if evaluations else "")
    having = [name for name in run.stages if hasattr(settings[name], "sampler")]
    if stage not in having:
        raise ValueError(
            f"{stage!r} is no stage with a sampler in {workdir}{lookup.nearest(stage, having)}; "
            f"there are: {', '.join(having)}."
        )
    return stages[stage]


def _from_its_place(values, workdir):
    """The text encoder and the autoencoder of a teacher are read from where it was found."""
    for stage in values["stages"]:
        if directory := read_source(workdir / stage).get("directory"):
            for settings in (values.get(key) or {} for key in ("text", "autoencoder")):
                if settings.get("checkpoint") == values[stage].get("checkpoint"):
                    settings["checkpoint"] = str(storage.path(directory))  # absolute
    return values


def teacher_directory(stage: build.Stage, workdir: storage.Path) -> storage.Path | None:
    """Returns the diffusers directory that a run has started from, if it has."""
    for name in stage.stages:
        if directory := read_source(workdir / name).get("directory"):
            return storage.path(directory)
    return None


def read_source(directory: storage.Path) -> dict:
    """Reads where a stage has its weights from; {} if it has imported none."""
    path = directory / SOURCE
    return storage.read_json(path) if path.exists() else {}


def load_params(
    stage: build.Stage,
    workdir: storage.Path,
    step: int | None = None,
    *,
    shardings: Callable | None = None,
) -> dict:
    """Loads what a stage has trained or imported.

    Args:
      stage: of the run.
      workdir: of the run.
      step: of the checkpoint; the newest if not given.
      shardings: `tree -> shardings`; if not given, all devices have all of it.
    """
    directory = workdir / stage.name
    network = stage.network
    shardings = shardings or build.replicated(build.parallel(stage))
    if teacher := read_source(directory).get("directory"):
        return load_directory(network, teacher, shardings)
    if (directory / WEIGHTS).exists():
        tensors, _ = edm.read(directory / WEIGHTS)
        params = edm.to_params(tensors, network.abstract)
        return sharding.place(params, shardings(params))
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        network.abstract,
        shardings(network.abstract),
    )
    return checkpoint.load_weights(directory, abstract, step)


def load_directory(
    network: layers.Network, directory: str | os.PathLike, shardings: Callable
) -> dict:
    """Loads the UNet of a diffusers directory, one tensor at a time, placed as `shardings` says."""
    _, tensors = diffusers.unet(directory)
    place = lambda array, path: sharding.place(array, shardings(array))
    return state_dict.from_torch(tensors, network.abstract, place=place)


def content(directory: storage.Path) -> str | None:
    """Returns what tells one result of a stage from another; None if there is none yet.

    It is the hash of the file that the stage has imported, or the last step with the checksum of
    its weights.
    """
    if source := read_source(directory):
        return source.get("sha256")
    return checkpoint.content(directory)


@contextlib.contextmanager
def claimed(values: dict, workdir: storage.Path):
    """Keeps `workdir` for this run alone, by a lock of process 0; see `claim`.

    Args:
      values: the config, as JSON has it.
      workdir: of the run.

    Raises:
      ValueError: another run has the workdir, it belongs to another config, or the processes do not
        share it, or their config.
    """
    with contextlib.ExitStack() as stack:
        holder = 0
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            holder = zlib.crc32(stack.enter_context(_lock(workdir)))
            claim(values, workdir)
        holder = distributed.gather(np.uint32(holder))[0]
        if jax.process_index() > 0:
            _check_shared(values, workdir, holder)
        yield


@contextlib.contextmanager
def _lock(workdir):
    """Yields who holds it, in bytes."""
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"process {os.getpid()} of {socket.gethostname()} since {began}".encode()
    if storage.is_remote(workdir):
        with storage.held(workdir / LOCK, holder):
            yield holder
        return
    with (workdir / LOCK).open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"{workdir} is in use by another run, {file.read().decode()}; "
                "wait for its end, or stop it."
            ) from error
        file.truncate(0)
        file.write(holder)
        file.flush()
        yield holder


def _check_shared(values, workdir, holder):
    deadline = time.monotonic() + 10  # a network's file system may be late
    while not (path := workdir / LOCK).exists() or zlib.crc32(path.read_bytes()) != holder:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{workdir} is not the one of process 0, whose files are not there; "
                "give all processes one --workdir, on a file system that they share."
            )
        time.sleep(0.2)
    if storage.read_json(workdir / "config.json") != values:
        raise ValueError("the config is not that of process 0; give all processes the same flags.")


def claim(values: dict, workdir: storage.Path):
    """Writes a config into `workdir`, or checks that it is the one that is there.

    Raises:
      ValueError: the workdir belongs to a config that differs in more than what may change.
    """
    path = workdir / "config.json"
    theirs = storage.read_json(path) if path.exists() else {}
    names = {*values["stages"], *theirs.get("stages", ())}
    if theirs and any((workdir / name).exists() for name in names):
        _refuse_another(workdir, settings_lib.flat(values), settings_lib.flat(theirs), values)
    workdir.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, values)


def _refuse_another(workdir, ours, theirs, values):
    keys = [
        key
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not settings_lib.may_change(values, key)
    ]
    if keys:
        differing = "; ".join(f"{k} is {ours.get(k)!r}, there {theirs.get(k)!r}" for k in keys[:5])
        raise ValueError(
            f"{workdir} belongs to another config: {differing}; "
            "use another --workdir or the same settings."
        )
