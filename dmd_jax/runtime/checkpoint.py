"""Checkpoints by Orbax, asynchronous and atomic: the last few and the best.

Each has the fingerprint of the data and the parameters with which it was trained.
"""

import contextlib
import dataclasses
import json
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dmd_jax import state
from dmd_jax.runtime import distributed, storage

# Devices that have copies of an array share the work of saving it. For small arrays the cutting
# takes longer than the rest: 600 of 16 kB on 8 devices stopped a run for 0.9 s in place of 0.1.
LEAST_SHARE = 2**22  # bytes


def open_manager(
    directory: str | os.PathLike, *, keep: int = 2, best: str = ""
) -> ocp.CheckpointManager:
    """Opens a manager of `directory`/checkpoints.

    Args:
      directory: of a stage.
      keep: number of last checkpoints that are kept.
      best: name of a metric; the checkpoint with its lowest value is kept, too. "" for none.
    """
    policies = [preservation_policy.LatestN(keep)]
    metric = None
    if best:
        metric = lambda metrics: metrics.get(best, np.inf)
        policies.append(
            preservation_policy.BestN(
                get_metric_fn=metric, reverse=True, n=1, keep_checkpoints_without_metrics=False
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        best_fn=metric,  # without it Orbax does not write metrics, and the next run has none
        best_mode="min",
        cleanup_tmp_directories=True,
    )
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_SHARE)
    handlers = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.CheckpointManager(
        storage.absolute(directory) / "checkpoints",
        options=options,
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=handlers),
            "meta": ocp.JsonCheckpointHandler(),
        },
    )


def save(
    manager: ocp.CheckpointManager,
    train_state: state.TrainState,
    step: int,
    *,
    fingerprint: str,
    metrics: dict[str, float],
):
    """Starts to write a checkpoint, without the frozen parameters.

    Args:
      manager: from `open_manager`.
      train_state: the state.
      step: its number.
      fingerprint: of the data and the parameters with which it was trained.
      metrics: scores at this step, for the metric `best` of the manager.

    Raises:
      ValueError: the disk has no room for it, or an earlier write failed.
    """
    train_state = dataclasses.replace(train_state, frozen=None)
    size = sum(a.nbytes for a in jax.tree.leaves(train_state))
    size += 2**20  # for Orbax's own files
    free = storage.free(manager.directory) if jax.process_index() == 0 else 0
    free = float(distributed.gather(np.float32(free))[0])  # all processes decide alike
    if free < size:
        raise ValueError(
            f"the checkpoint of step {step} needs {size / 1e6:.1f} MB, but {manager.directory} "
            f"has {free / 1e6:.1f} MB free; make room and run the same command again."
        )
    meta = {
        "fingerprint": fingerprint,
        "weights": "params" if train_state.generator.ema is None else "ema",
    }
    arguments = ocp.args.Composite(
        state=ocp.args.PyTreeSave(train_state), meta=ocp.args.JsonSave(meta)
    )
    with _clear_errors(manager):
        saved = manager.save(step, args=arguments, metrics=metrics or None, force=True)
    if not saved:
        raise ValueError(
            f"{manager.directory} already holds step {step} or a later one; use another workdir."
        )


def wait(manager: ocp.CheckpointManager):
    """Waits until all checkpoints are on the disk.

    Raises:
      ValueError: one cannot be written.
    """
    with _clear_errors(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def closing(manager: ocp.CheckpointManager):
    """Closes the manager at the end of the context, once all checkpoints are written."""
    try:
        yield
    except Exception:
        if jax.process_count() == 1:  # one process of several would wait for the others
            manager.close()
        raise
    manager.close()


@contextlib.contextmanager
def _clear_errors(manager):
    """Raises ValueError for any error of Orbax, also that of an earlier asynchronous write."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise all kinds
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = (lines or [type(error).__name__])[0][:300]
        raise ValueError(
            f"a checkpoint cannot be written to {manager.directory}: {reason}; earlier checkpoints "
            "are complete. Make room, or make it writable, and run the same command again."
        ) from error


def restore(
    manager: ocp.CheckpointManager, abstract: state.TrainState, *, fingerprint: str | None
) -> state.TrainState | None:
    """Reads the newest checkpoint that is complete; returns None if there is no checkpoint.

    Unreadable checkpoints are moved aside, with a warning.

    Args:
      manager: from `open_manager`.
      abstract: the state's shapes, dtypes and shardings, without `frozen`.
      fingerprint: of the data and the parameters that the run will use; None accepts any.

    Raises:
      ValueError: there are checkpoints, but none can be read; or it was trained on other data or
        from another teacher.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(abstract, restore_args=restore_args),
            meta=ocp.args.JsonRestore(),
        )
        try:
            restored = manager.restore(step, args=arguments)
        except Exception as error:  # Orbax and TensorStore raise all kinds for damaged files
            reason = str(error).split("\n")[0][:200]
            if jax.process_count() > 1:  # other processes may have read it, and wait for this one
                _move_aside(manager, [step] if step != steps[-1] else [])
                raise ValueError(
                    f"checkpoint {step} in {manager.directory} cannot be read ({reason}); "
                    "run the same command again."
                ) from error
            logging.warning(
                "checkpoint %d cannot be read (%s); trying the one before it.", step, reason
            )
            continue
        if fingerprint not in (None, restored["meta"]["fingerprint"]):
            raise ValueError(
                f"{manager.directory} was trained on other data, in another order or from another "
                f"teacher than now (fingerprint {restored['meta']['fingerprint']}, expected "
                f"{fingerprint}); use another workdir."
            )
        _move_aside(manager, [s for s in steps if s > step])
        return restored["state"]
    if steps:
        raise ValueError(
            f"no checkpoint in {manager.directory} can be read (steps {steps}); "
            "delete the directory to start again."
        )
    return None


def read_fingerprint(directory: str | os.PathLike) -> str | None:
    """Reads the fingerprint of the newest checkpoint, see `restore`; None if it is damaged."""
    path = storage.path(directory) / "checkpoints"
    try:
        return _meta(path, max(all_steps(directory)))["fingerprint"]
    except (OSError, ValueError, KeyError):  # the code that reads the state raises an error
        return None


def load_state(directory: str | os.PathLike, abstract: state.TrainState) -> state.TrainState:
    """Reads the newest state of a stage, without `frozen`, for another stage that continues it.

    Raises:
      ValueError: the stage has no checkpoint.
    """
    if not all_steps(directory):
        raise ValueError(
            f"no checkpoint in {directory}; run the stage {storage.path(directory).name!r} first."
        )
    with open_manager(directory, keep=1000) as manager:
        return restore(manager, abstract, fingerprint=None)


def all_steps(directory: str | os.PathLike) -> list[int]:
    """Lists the steps of a stage's complete checkpoints."""
    return sorted(ocp.utils.checkpoint_steps(storage.path(directory) / "checkpoints"))


def load_weights(directory: str | os.PathLike, abstract: dict, step: int | None = None) -> dict:
    """Reads the generator's `state.Net.weights` from a checkpoint of a stage.

    Args:
      directory: of the stage.
      abstract: the parameters' shapes, dtypes and shardings.
      step: of the checkpoint; None for the newest one.

    Raises:
      ValueError: there is no such checkpoint, it is damaged, or it holds another network.
    """
    steps = all_steps(directory)
    path = storage.absolute(directory) / "checkpoints"
    if not steps or step not in (None, *steps):
        which = f"checkpoint of step {step}" if steps else "checkpoint"
        raise ValueError(f"no {which} in {path}; run the stage {path.parent.name!r} first.")
    if step is None:
        step = max(steps)
    try:
        name = _meta(path, step)["weights"]
        target = {"generator": {name: abstract}}
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        arguments = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        restored = ocp.PyTreeCheckpointer().restore(path / str(step) / "state", args=arguments)
    except Exception as error:  # Orbax and TensorStore raise all kinds for damaged files
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"checkpoint {step} in {path} is damaged or of another network ({reason}); "
            f"delete {path / str(step)} and run the stage again."
        ) from error
    return restored["generator"][name]


def _meta(path, step):
    return json.loads((path / str(step) / "meta" / "metadata").read_text())


def _move_aside(manager, steps):
    for step in steps:
        path = storage.path(manager.directory)
        with contextlib.suppress(FileNotFoundError):  # another process has moved it
            path.joinpath(str(step)).rename(path.parent / f"unreadable_{step}")
        logging.warning("checkpoint %d was moved to %s.", step, path.parent / f"unreadable_{step}")
    if steps and jax.process_count() == 1:
        manager.reload()
