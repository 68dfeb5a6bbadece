"""Runs the stages of a config in order, or the one named by --stage. The same command again goes on where it stopped.

python -m dmd_jax.main --config=configs/digits.py --workdir=/tmp/digits

Several processes, each with its own devices, run it together: started by srun, by mpirun or on a Cloud TPU they find one another;
elsewhere give each --coordinator_address=host:port --num_processes=2 --process_id=0, or 1. They share the workdir.
"""

import json
import pathlib
import sys
import time
import traceback
import zlib

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from dmd_jax import lookup, sharding
from dmd_jax.experiment import check
from dmd_jax.plan import machines, step
from dmd_jax.runtime import compilation_cache, distributed, preemption, storage
from dmd_jax.stages import embed, evaluate, import_weights, pairs, train

PROGRAMS = {  # each has done(config, stage, workdir) and run(config, stage, workdir)
    "import_weights": import_weights,
    "embed": embed,
    "pairs": pairs,
    "train": train,
    "evaluate": evaluate,
}

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; a word after a colon picks a variant.", lock_config=True
)
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


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected arguments {argv[1:]}; flags have two dashes, such as --config=configs/digits.py."
        )
    if PLAN.value is not None:
        return _plan()
    if not WORKDIR.value:
        raise app.UsageError("--workdir is empty; name a directory.")
    if PROFILE.value is not None:
        with CONFIG.value.unlocked():
            CONFIG.value.profile = PROFILE.value
    preemption.watch()
    compilation_cache.keep()
    code = 0
    try:
        address = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
        with distributed.started(
            *address, heartbeat_timeout=HEARTBEAT.value, initialization_timeout=MEETING.value
        ):
            try:
                run(CONFIG.value, storage.absolute(WORKDIR.value), STAGE.value, DRY_RUN.value)
            except preemption.Preempted as notice:  # in all processes
                code = preemption.EXIT_CODE
                if jax.process_index() == 0:
                    print(notice, file=sys.stderr)
    except BaseException as error:
        _fail(error)
    sys.exit(code)


def _plan():
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # programs for devices that are not there cannot be read back
    try:
        machine = machines.find(PLAN.value)  # before jax starts
        check.config(CONFIG.value)
        step.run(CONFIG.value, machine, STAGE.value)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _fail(error):
    """One line for what users can mend, and a traceback for the rest."""
    line, code = f"error: {error}", 1
    if "No space left on device" in str(error) and not storage.is_remote(WORKDIR.value):
        line = f"error: the disk of {WORKDIR.value} is full; make room and run the same command again: what is whole is kept."
    elif not isinstance(error, ValueError | OSError | FloatingPointError):
        if not jax.distributed.is_initialized():
            raise error
        traceback.print_exception(error)
        if isinstance(error, jax.errors.JaxRuntimeError):  # most likely another process is gone
            code = distributed.LOST
            time.sleep(3 * distributed.PERIOD)  # if it has said why, this one ends with that
        line = f"error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    distributed.leave(code, line)


def run(config, workdir: storage.Path, only: str | None = None, dry_run: bool = False):
    """Runs the stages that have no result in `workdir` yet.

    Raises:
      ValueError: there is no stage `only`, the workdir belongs to another config, or a stage refuses.
    """
    stages = (only,) if only else config.stages
    unknown = [stage for stage in stages if stage not in config.stages]
    if unknown:
        raise ValueError(
            f"no stage {unknown[0]!r}{lookup.nearest(unknown[0], list(config.stages))}; there are: {', '.join(config.stages)}."
        )
    check.config(config)
    _check_mesh(config)
    if jax.process_index() == 0:
        print(json.dumps(config.to_dict(), indent=2))
        if dry_run:
            print(
                f"would run in {workdir}: {', '.join(f'{stage} ({config[stage].program})' for stage in stages)}"
            )
    if dry_run:
        return
    check.files(config, stages, workdir)
    if len(set(distributed.gather(np.uint32(zlib.crc32(repr(tuple(stages)).encode()))))) > 1:
        raise ValueError(
            "the stages are not the same in all processes; give all of them the same flags."
        )
    with workdir.claimed(config, workdir):
        for stage in stages:
            program = PROGRAMS[config[stage].program]
            if distributed.gather(program.done(config, stage, workdir)).all():
                if jax.process_index() == 0:
                    print(f"{stage}: done already")
            else:
                program.run(config, stage, workdir)
                distributed.barrier(stage)


def _check_mesh(config):
    size, count = sharding.make_mesh(**config.mesh).size, jax.device_count()
    if jax.process_count() > 1 and size != count:
        raise ValueError(
            f"config.mesh has {size} devices, expected all {count} of the {jax.process_count()} processes; set mesh.data=-1."
        )


def cli():
    flags.mark_flags_as_required(["config"])
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=parse)


def parse(argv):
    """Flags; a config that cannot be read or overridden gives one line instead of a traceback."""
    for path in (
        a.removeprefix("--config=").split(":")[0] for a in argv if a.startswith("--config=")
    ):
        if not pathlib.Path(path).is_file():
            sys.exit(
                f"error: no config {path}; there are: {', '.join(map(str, sorted(pathlib.Path('configs').glob('*.py'))))}."
            )
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0]) if error.args else str(error)
        line = (
            " ".join(text.split())
            if isinstance(error, AttributeError | KeyError)
            else text.strip().splitlines()[-1].strip()
        )
        if isinstance(error, KeyError) and " " not in text:
            line = f"the config has no key {text!r} there"
        sys.exit(f"error: {line}")


if __name__ == "__main__":
    cli()
