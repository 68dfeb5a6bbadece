"""Runs the stages of a config in order, or the one named by --stage.

The same command again goes on where it stopped.

python -m dmd_jax.main --config=configs/digits.py --workdir=/tmp/digits

Several processes, each with its own devices, run it together. Started by srun, by mpirun or on a
Cloud TPU they find one another; elsewhere give each --coordinator_address=host:port
--num_processes=2 --process_id=0, or 1. They share the workdir.
"""

import json
import os
import sys
import time
import traceback
import zlib

import jax
import ml_collections
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from dmd_jax import lookup
from dmd_jax.experiment import build, check, configs, made
from dmd_jax.experiment import settings as settings_lib
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.plan import machines
from dmd_jax.plan import step as plan
from dmd_jax.runtime import compilation_cache, distributed, log, preemption, storage
from dmd_jax.stages import embed, evaluate, import_weights, pairs, train

PROGRAMS = {  # each has done(stage, workdir) and run(stage, workdir)
    "import_weights": import_weights,
    "embed": embed,
    "pairs": pairs,
    "train": train,
    "evaluate": evaluate,
}

CONFIG_HELP = "A name, such as digits, or a file; a word after a colon picks a variant."
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; everything it makes lies there."
)
STAGE = flags.DEFINE_string("stage", None, "The one stage to run; all of them if not given.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the resolved config and what would run, and stop."
)
PLAN = flags.DEFINE_string(
    "plan",
    None,
    "A machine, such as v5e-64: print what the training steps would take of it, and stop.",
)
PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "The first and the last step to trace for XProf, counted from the start, such as 10:20.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, where there are several and nobody says."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many there are, with --coordinator_address.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 30, "Seconds after which a silent process ends the others.", lower_bound=3
)
MEETING = flags.DEFINE_integer(
    "initialization_timeout",
    300,
    "Seconds to wait for the other processes at the start.",
    lower_bound=1,
)


def main(config: ml_collections.ConfigDict):
    """Runs what the flags say; ends the process."""
    if PLAN.value is not None:
        return _plan(config)
    if not WORKDIR.value:
        sys.exit("error: --workdir is missing; name a directory.")
    if PROFILE.value is not None:
        config.profile = PROFILE.value
    preemption.watch()
    compilation_cache.keep()
    code = 0
    try:
        address = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
        with distributed.started(
            *address, heartbeat_timeout=HEARTBEAT.value, initialization_timeout=MEETING.value
        ):
            try:
                run(config, storage.absolute(WORKDIR.value), STAGE.value, DRY_RUN.value)
            except preemption.Preempted as notice:  # in all processes
                code = notice.code
                if jax.process_index() == 0:
                    log.say(str(notice), error=True)
    except BaseException as error:
        _fail(error)
    _end_output()
    sys.exit(code)


def _end_output():
    """Without it Python ends with another code where the output cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _plan(config):
    # Cached programs for devices that are not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        machine = machines.find(PLAN.value)  # before jax starts
        stages = build.stages(config)
        check.stages(stages)
        plan.run(stages, machine, STAGE.value)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _fail(error):
    """One line for what users can mend, and a traceback for the rest."""
    line, code = f"error: {error}", 1
    if "No space left on device" in str(error) and not storage.is_remote(WORKDIR.value):
        line = (
            f"error: the disk of {WORKDIR.value} is full; make room and run the same command "
            "again: what is whole is kept."
        )
    elif not isinstance(error, ValueError | OSError | FloatingPointError):
        if not jax.distributed.is_initialized():
            raise error
        traceback.print_exception(error)
        if isinstance(error, jax.errors.JaxRuntimeError):  # most likely another process is gone
            code = distributed.LOST
            time.sleep(3 * distributed.PERIOD)  # if it has said why, this one ends with that
        line = f"error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    distributed.leave(code, line)


def run(
    config: ml_collections.ConfigDict,
    workdir: storage.Path,
    only: str | None = None,
    dry_run: bool = False,
):
    """Runs the stages that have no result in `workdir` yet.

    Args:
      config: what `get_config` of a config gives.
      workdir: the directory of the run.
      only: the one stage to run; None for all.
      dry_run: whether to print the whole config and what would run, and stop.

    Raises:
      ValueError: there is no stage `only`, the workdir belongs to another config, or a stage
        refuses.
    """
    config = settings_lib.complete(config.copy_and_resolve_references())
    lookup.admit(config.plugins)
    stages = build.from_settings(*settings_lib.read(config.to_dict()))
    if only and only not in config.stages:
        hint = lookup.nearest(only, list(config.stages))
        raise ValueError(f"no stage {only!r}{hint}; there are: {', '.join(config.stages)}.")
    chosen = [stages[name] for name in ([only] if only else config.stages)]
    check.stages(stages)
    _check_mesh(chosen[0])
    values = json.loads(config.to_json())
    if dry_run:
        if jax.process_index() == 0:
            print(json.dumps(values, indent=2))
            names = ", ".join(f"{stage.name} ({stage.settings.program})" for stage in chosen)
            print(f"would run in {workdir}: {names}")
        return
    check.files(chosen, workdir)
    names = repr([stage.name for stage in chosen])
    if len(set(distributed.gather(np.uint32(zlib.crc32(names.encode()))))) > 1:
        raise ValueError(
            "the stages are not the same in all processes; give all of them the same flags."
        )
    with workdir_lib.claimed(values, workdir):
        if jax.process_index() == 0:
            log.say(_summary(chosen, workdir))
        seen = set()  # the stages that are known to be done
        for stage in chosen:
            if _is_done(stage, workdir, seen):
                if jax.process_index() == 0:
                    log.say(f"{stage.name}: done already")
            else:
                PROGRAMS[stage.settings.program].run(stage, workdir)
                distributed.barrier(stage.name)
            seen.add(stage.name)


def _is_done(stage, workdir, seen):
    """Whether a stage has nothing to do, as process 0 sees it, and can do it if it has.

    Raises:
      ValueError: a stage that it reads from is not done.
    """
    is_done = lambda stage: PROGRAMS[stage.settings.program].done(stage, workdir)
    answer = False
    if jax.process_index() == 0:
        answer = is_done(stage)
        for name in [] if answer else dict.fromkeys(made.reads(stage)):
            if name not in seen and not is_done(stage.stages[name]):
                raise ValueError(
                    f"{stage.name} reads what {name} makes, which is not done: run the same "
                    f"command with --stage={name}, or give it fewer steps, first."
                )
    return bool(distributed.first(answer))


def _summary(stages, workdir):
    """What is about to run, in a few lines."""
    mesh = build.parallel(stages[0]).mesh
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    count = sum(a.size for a in jax.tree.leaves(stages[0].network.abstract))
    names = ", ".join(f"{stage.name} ({stage.settings.program})" for stage in stages)
    return (
        f"stages: {names}\n"
        f"devices: {devices} (data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']}), "
        f"{jax.process_count()} processes\n"
        f"network: {stages[0].model.network['name']}, {count:,} parameters\n"
        f"the whole config is in {workdir / 'config.json'}"
    )


def _check_mesh(stage):
    size = build.parallel(stage).mesh.size
    count = jax.device_count()
    if jax.process_count() > 1 and size != count:
        raise ValueError(
            f"config.mesh has {size} devices, expected all {count} of the {jax.process_count()} "
            "processes; set mesh.data=-1."
        )


def parse(argv: list[str]) -> ml_collections.ConfigDict:
    """Reads the flags, and the config with what they override; ends the process if they are wrong.

    The config is filled up with defaults first, so that every key can be overridden.
    """
    name, rest = _config_name(argv)
    if not name:
        sys.exit(
            f"error: --config is missing. {CONFIG_HELP} There are: {', '.join(configs.names())}."
        )
    try:
        config = settings_lib.complete(configs.load(name))
        if "config" in flags.FLAGS:
            delattr(flags.FLAGS, "config")
        holder = config_flags.DEFINE_config_dict("config", config, CONFIG_HELP, sys_argv=rest)
        unknown = flags.FLAGS(rest)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(f"error: {_line_of(error)}")
    if unknown:
        sys.exit(
            f"error: unexpected arguments {unknown}; flags have two dashes, such as "
            "--config=configs/digits.py."
        )
    return holder.value


def _config_name(argv):
    """The value of --config, and the other arguments."""
    rest = []
    name = ""
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            name = next(arguments, "")
        elif argument.startswith("--config="):
            name = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return name, rest


def _line_of(error):
    text = (str(error.args[0]) if error.args else str(error)).replace("\\n", " ")
    if isinstance(error, AttributeError | KeyError):
        return f"the config has no key {' '.join(text.split())}"
    return text.strip().splitlines()[-1].strip()


def cli():
    """Runs `main` with what the command line says."""
    logging.set_verbosity(logging.WARNING)
    main(parse(sys.argv))


if __name__ == "__main__":
    cli()
