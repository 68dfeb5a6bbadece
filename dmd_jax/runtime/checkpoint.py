"""Checkpoints by Orbax, asynchronous and atomic: the last few and the best.

Each has a checksum of its state, because Orbax and TensorStore do not notice all damage, and the
checksum of its weights, which tells one result from another.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dmd_jax import state
from dmd_jax.runtime import checksum, distributed, storage

# Devices that have copies of an array share the work of saving it. For small arrays the cutting
# takes longer than the rest: 600 of 16 kB on 8 devices stopped a run for 0.9 s in place of 0.1.
LEAST_SHARE = 2**22  # bytes
# What TensorStore and Orbax say where a file's content is wrong, too short or gone.
DAMAGE = re.compile(r"\b(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION|INVALID_ARGUMENT)\b")


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
        # A score that is no number is the worst there is.
        metric = lambda metrics: np.nan_to_num(metrics.get(best, np.inf), nan=np.inf)
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
    metrics: dict[str, float],
):
    """Starts to write a checkpoint, without the frozen parameters.

    Args:
      manager: from `open_manager`.
      train_state: the state.
      step: its number.
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
        "weights": "params" if train_state.generator.ema is None else "ema",
        "content": checksum.of(train_state.generator.weights),
        "checksum": checksum.of(train_state),
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


def restore(manager: ocp.CheckpointManager, abstract: state.TrainState) -> state.TrainState | None:
    """Reads the newest checkpoint that is whole; returns None if there is no checkpoint.

    Damaged checkpoints are moved aside, with a warning. Process 0 says which one is the newest.

    Args:
      manager: from `open_manager`.
      abstract: the state's shapes, dtypes and shardings, without `frozen`.

    Raises:
      ValueError: there are checkpoints, but all are damaged.
      OSError: one cannot be read now; all stay as they are.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if jax.process_count() > 1:
        newest = _newest(manager.directory, steps)
        steps = [newest, *(step for step in steps if step < newest)] if newest >= 0 else []
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    for step in steps:
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(abstract, restore_args=restore_args),
            meta=ocp.args.JsonRestore(),
        )
        try:
            restored = manager.restore(step, args=arguments)
            _check(restored["state"], restored["meta"].get("checksum"))
        except Exception as error:  # Orbax and TensorStore raise all kinds
            reason = _reason(error)
            path = manager.directory / str(step)
            if not _is_damage(error, path):
                raise OSError(
                    f"checkpoint {step} in {manager.directory} cannot be read ({reason}); it is "
                    "not known to be damaged, and stays. Run the same command again."
                ) from error
            if jax.process_count() > 1:  # other processes may have read it, and wait for this one
                _move_aside(manager, [step] if step != steps[-1] else [])
                raise ValueError(
                    f"checkpoint {step} in {manager.directory} is damaged ({reason}); "
                    "run the same command again."
                ) from error
            logging.warning("checkpoint %d is damaged (%s); trying the one before.", step, reason)
            continue
        _move_aside(manager, [s for s in steps if s > step])
        return restored["state"]
    if steps:
        raise ValueError(
            f"all checkpoints in {manager.directory} are damaged (steps {steps}); "
            "move the directory away to start again."
        )
    return None


class _Damaged(Exception):
    """What was read is not what was written."""


def _check(tree, expected):
    if expected is None:
        raise ValueError("another version of dmd_jax wrote it, without a checksum")
    if checksum.of(tree) != expected:
        raise _Damaged("its checksum is wrong")


def _is_damage(error, path):
    """Whether an error says that files are not what was written, and not that reading failed."""
    if not (path / "state" / "_METADATA").exists():
        return True
    while error is not None:
        if isinstance(error, _Damaged | FileNotFoundError | json.JSONDecodeError):
            return True
        if DAMAGE.search(str(error)):
            return True
        error = error.__cause__
    return False


def _reason(error):
    """The innermost error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).split("\n")[0][:200]


def _newest(path, steps):
    """The newest step as process 0 sees it; -1 for none. Listings may be late elsewhere."""
    newest = distributed.first(max(steps, default=-1))
    if newest >= 0:
        storage.wait_for(path / str(newest))
    return newest


def content(directory: str | os.PathLike) -> str | None:
    """Returns what tells the newest weights of a stage from others; None if there are none.

    It is the step and the checksum of the weights.

    Raises:
      ValueError: the checkpoint is damaged.
    """
    steps = all_steps(directory)
    if not steps:
        return None
    path = storage.path(directory) / "checkpoints"
    try:
        return f"step {steps[-1]}, {_meta(path, steps[-1])['content']}"
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ValueError(
            f"checkpoint {steps[-1]} in {path} is damaged ({_reason(error)}); "
            f"move {path / str(steps[-1])} away and run the stage again."
        ) from error


def load_state(directory: str | os.PathLike, abstract: state.TrainState) -> state.TrainState:
    """Reads the newest state of a stage, without `frozen`, for another stage that continues it.

    Raises:
      ValueError: the stage has no checkpoint.
    """
    if not distributed.first(bool(all_steps(directory))):
        raise ValueError(
            f"no checkpoint in {directory}; run the stage {storage.path(directory).name!r} first."
        )
    with open_manager(directory, keep=1000) as manager:
        return restore(manager, abstract)


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
    if step is None and jax.process_count() > 1:
        step = _newest(path, steps)
        steps = [step] if step >= 0 else []
    if not steps or step not in (None, *steps):
        which = f"checkpoint of step {step}" if steps else "checkpoint"
        raise ValueError(f"no {which} in {path}; run the stage {path.parent.name!r} first.")
    if step is None:
        step = max(steps)
    try:
        meta = _meta(path, step)
        target = {"generator": {meta["weights"]: abstract}}
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        arguments = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        restored = ocp.PyTreeCheckpointer().restore(path / str(step) / "state", args=arguments)
        weights = restored["generator"][meta["weights"]]
        _check(weights, meta.get("content"))
        return weights
    except Exception as error:  # Orbax and TensorStore raise all kinds
        if not _is_damage(error, path / str(step)) and isinstance(error, OSError):
            raise OSError(
                f"checkpoint {step} in {path} cannot be read ({_reason(error)}); "
                "run the same command again."
            ) from error
        raise ValueError(
            f"checkpoint {step} in {path} is damaged or of another network ({_reason(error)}); "
            f"move {path / str(step)} away and run the stage again."
        ) from error


def _meta(path, step):
    return json.loads((path / str(step) / "meta" / "metadata").read_text())


def _move_aside(manager, steps):
    """Renames damaged checkpoints to names that nothing has yet."""
    for step in steps:
        path = storage.path(manager.directory)
        target = path.parent / f"unreadable_{step}"
        for i in itertools.count(2):
            if not target.exists():
                break
            target = path.parent / f"unreadable_{step}_{i}"
        with contextlib.suppress(FileNotFoundError):  # another process has moved it
            path.joinpath(str(step)).rename(target)
        logging.warning("checkpoint %d was moved to %s.", step, target)
    if steps and jax.process_count() == 1:
        manager.reload()
