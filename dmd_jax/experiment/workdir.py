"""The directory of a run: who may write to it, and what lies there."""

import contextlib
import fcntl
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from dmd_jax import lookup, sharding
from dmd_jax.experiment import build
from dmd_jax.models import layers
from dmd_jax.runtime import checkpoint, distributed, storage
from dmd_jax.weights import diffusers, edm, state_dict

WEIGHTS, SOURCE = (
    "weights.safetensors",
    "source.json",
)  # of a stage that imports them, and the file they came from


def read_run(
    workdir: storage.Path, stage: str = "", *, devices: int = 1
) -> tuple[ml_collections.ConfigDict, str]:
    """The config of a run, for use of what it has made on `devices` devices, and the stage; the evaluation's student if not given.

    Raises:
      ValueError: `workdir` is no run's, or the stage has trained and imported nothing.
    """
    path = workdir / "config.json"
    found = storage.read_json(path) if path.exists() else {}
    if "stages" not in found:
        raise ValueError(f"{workdir} is no run's directory: there is no {path} of one.")
    config = ml_collections.ConfigDict(found)
    stage = stage or config.evaluate.student
    having = [name for name in config.stages if "sampler" in config[name]]
    if stage not in having:
        raise ValueError(
            f"{stage!r} is no stage with a sampler in {workdir}{lookup.nearest(stage, having)}; there are: {', '.join(having)}."
        )
    config.mesh = dict(data=devices, fsdp=1)
    if teacher := teacher_directory(config, workdir):
        for settings in (config[key] for key in ("text", "autoencoder") if key in config):
            if settings.get("checkpoint") == config.checkpoint:
                settings.checkpoint = str(teacher)  # absolute
    return config, stage


def teacher_directory(
    config: ml_collections.ConfigDict, workdir: storage.Path
) -> storage.Path | None:
    """The diffusers directory that a run has started from, if it has."""
    for source in (workdir / stage / SOURCE for stage in config.stages):
        if source.exists() and (directory := storage.read_json(source).get("directory")):
            return storage.path(directory)
    return None


def load_params(
    config: ml_collections.ConfigDict,
    directory: str,
    workdir: storage.Path,
    step: int | None = None,
    *,
    shardings: Callable | None = None,
) -> dict:
    """What a stage has trained or imported; `directory` is named like the stage and may contain {workdir}.

    Args:
      config: of the run.
      directory: of the stage.
      workdir: of the run.
      step: of the checkpoint; the newest if not given.
      shardings: `tree -> shardings`; if not given, all devices have all of it.
    """
    directory = storage.path(directory.format(workdir=workdir))
    shardings = shardings or build.replicated(sharding.Parallel(sharding.make_mesh(**config.mesh)))
    network = build.make_network(config, directory.name)
    if (directory / SOURCE).exists() and (found := storage.read_json(directory / SOURCE)).get(
        "directory"
    ):
        return load_directory(network, found["directory"], shardings)
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
    """The UNet of a diffusers directory, placed as `shardings` says; read and placed one tensor at a time."""
    _, tensors = diffusers.unet(directory)
    return state_dict.from_torch(
        tensors, network.abstract, place=lambda array, path: sharding.place(array, shardings(array))
    )


def version(directory: storage.Path) -> int | str | None:
    """What tells one state of a stage from another: its last step, or the hash of the file that it has imported."""
    if (directory / SOURCE).exists():
        return storage.read_json(directory / SOURCE).get("sha256")
    return max(checkpoint.all_steps(directory), default=None)


LOCK = "lock"  # in the workdir


# What may change between two runs in one workdir: lengths, intervals, where it runs, further rows of an evaluation, and where files of
# others lie, whose content is compared by digests.
CHANGEABLE = re.compile(
    r"^mesh\.|^\w+\.(accumulation|remat|num_steps|log_every|preview_every|preview_images|checkpoint_every|keep_checkpoints"
    r"|max_skipped_updates|timing_repeats|checkpoint)$"
    r"|^(evaluate|features)\."
    r"|^(checkpoint|coco|taesd|prompts_file|profile)$|\bnetwork\.remat$"
    r"|(^|\.)(captions|reference|text|autoencoder|distance|decoder)\.(checkpoint|weights|annotations|images|path|data_dir)$"
)


@contextlib.contextmanager
def claimed(config, workdir: storage.Path):
    """Within, `workdir` is this run's alone, by a lock of process 0; see `claim`.

    Raises:
      ValueError: another run has it, the workdir belongs to another config, or the processes do not share it, or their config.
    """
    with contextlib.ExitStack() as stack:
        holder = 0
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            holder = zlib.crc32(stack.enter_context(_lock(workdir)))
            claim(config, workdir)
        holder = distributed.gather(np.uint32(holder))[0]
        if jax.process_index() > 0:
            _check_shared(config, workdir, holder)
        yield


@contextlib.contextmanager
def _lock(workdir):
    """Who holds it, in bytes. A bucket has no locks: who comes last holds it, and nobody is refused."""
    holder = f"process {os.getpid()} of {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode()
    if storage.is_remote(workdir):
        (workdir / LOCK).write_bytes(holder)
        yield holder
        return
    with (workdir / LOCK).open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"{workdir} is in use by another run, {file.read().decode()}; wait for its end, or stop it."
            ) from error
        file.truncate(0)
        file.write(holder)
        file.flush()
        yield holder


def _check_shared(config, workdir, holder):
    deadline = time.monotonic() + 10  # a network's file system may be late
    while not (path := workdir / LOCK).exists() or zlib.crc32(path.read_bytes()) != holder:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{workdir} is not the one of process 0, whose files are not there; give all processes one --workdir, on a file system "
                "that they share."
            )
        time.sleep(0.2)
    if storage.read_json(workdir / "config.json") != json.loads(config.to_json()):
        raise ValueError("the config is not that of process 0; give all processes the same flags.")


def claim(config, workdir: storage.Path):
    """Writes the config into `workdir`, or checks that it is the one found there.

    Raises:
      ValueError: the workdir belongs to a config that differs in more than lengths and intervals.
    """
    path = workdir / "config.json"
    ours = json.loads(config.to_json())
    found = storage.read_json(path) if path.exists() else {}
    if (
        any((workdir / stage).exists() for stage in {*config.stages, *found.get("stages", ())})
        and found
    ):
        theirs, mine = build.flat(found), build.flat(ours)
        keys = [
            k
            for k in sorted(theirs.keys() | mine.keys())
            if theirs.get(k) != mine.get(k) and not _changeable(config, k)
        ]
        if keys:
            differing = "; ".join(
                f"{k} is {mine.get(k)!r}, there {theirs.get(k)!r}" for k in keys[:5]
            )
            raise ValueError(
                f"{workdir} belongs to another config: {differing}; use another --workdir or the same settings."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, ours)


def _changeable(config, key):
    """Whether a key may change; a batch_size may where it costs memory and nothing else."""
    stage, _, setting = key.partition(".")
    if setting == "batch_size":
        return stage in ("text", "features") or config.get(stage, {}).get("program") in (
            "embed",
            "pairs",
            "evaluate",
        )
    return bool(CHANGEABLE.search(key))
