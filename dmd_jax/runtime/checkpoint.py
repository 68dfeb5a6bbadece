"""Checkpoints by Orbax: asynchronous, atomic, the last few and the best, each with the fingerprint of what it was trained on."""

import contextlib
import json
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dmd_jax import state
from dmd_jax.runtime import distributed, storage


def open_manager(
    directory: str | os.PathLike, *, keep: int = 2, best: str = ""
) -> ocp.CheckpointManager:
    """A manager of `directory`/checkpoints that keeps the last `keep` checkpoints and the one with the lowest metric `best`, if named."""
    policies, measure = [preservation_policy.LatestN(keep)], None
    if best:
        measure = lambda metrics: metrics.get(best, np.inf)
        best_one = dict(
            get_metric_fn=measure, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        policies.append(preservation_policy.BestN(**best_one))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        best_fn=measure,  # without it metrics are not written, and forgotten at the end
        best_mode="min",
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(storage.absolute(directory) / "checkpoints", options=options)


def save(
    manager: ocp.CheckpointManager,
    train_state: state.TrainState,
    step: int,
    *,
    fingerprint: str,
    metrics: dict[str, float],
):
    """Starts writing; the frozen teacher is left out.

    Raises:
      ValueError: the disk has no room for it, or an earlier write failed.
    """
    train_state = train_state.replace(frozen=None)
    needed = (
        sum(a.nbytes for a in jax.tree.leaves(train_state)) + 2**20
    )  # the arrays, and what Orbax writes about them
    free = storage.free(manager.directory) if jax.process_index() == 0 else 0
    free = float(distributed.gather(np.float32(free))[0])  # one verdict
    if free < needed:
        raise ValueError(
            f"the checkpoint of step {step} needs {needed / 1e6:.1f} MB, but {manager.directory} has {free / 1e6:.1f} MB free; "
            "make room and run the same command again."
        )
    meta = {
        "fingerprint": fingerprint,
        "weights": "params" if train_state.generator.ema is None else "ema",
    }
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(train_state), meta=ocp.args.JsonSave(meta)
    )
    with _told_clearly(manager):
        saved = manager.save(step, args=arguments, metrics=metrics or None, force=True)
    if not saved:
        raise ValueError(
            f"{manager.directory} already holds step {step} or a later one; use another workdir."
        )


def wait(manager: ocp.CheckpointManager):
    """Until what is being written is on the disk.

    Raises:
      ValueError: it cannot be written.
    """
    with _told_clearly(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def closing(manager: ocp.CheckpointManager):
    """Closes it at the end, once everything is written; after an error of one process among several it would wait for the others."""
    try:
        yield
    except Exception:
        if jax.process_count() == 1:
            manager.close()
        raise
    manager.close()


@contextlib.contextmanager
def _told_clearly(manager):
    """What an earlier asynchronous write has raised comes out here as well."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise all kinds
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )[:300]
        raise ValueError(
            f"a checkpoint cannot be written to {manager.directory}: {reason}; what was saved before is whole. Make room, or make it "
            "writable, and run the same command again."
        ) from error


def restore(
    manager: ocp.CheckpointManager, abstract: state.TrainState, *, fingerprint: str | None
) -> state.TrainState | None:
    """The newest checkpoint that is whole, or None if there is none at all; unreadable ones are put aside, and said so.

    Args:
      manager: from `open_manager`.
      abstract: the state's shapes, dtypes and shardings, without `frozen`.
      fingerprint: of the data and the teacher that the run is about to use; None for whatever it was.

    Raises:
      ValueError: there are checkpoints, but none can be read, or it was trained on other data or from another teacher.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
        )
        try:
            restored = manager.restore(step, args=arguments)
        except Exception as error:  # Orbax and TensorStore raise all kinds for damaged files
            reason = str(error).split("\n")[0][:200]
            if jax.process_count() > 1:  # the others may have read it, and wait for this one
                _put_aside(manager, [step] if step != steps[-1] else [])
                raise ValueError(
                    f"checkpoint {step} in {manager.directory} cannot be read ({reason}); run the same command again."
                ) from error
            logging.warning(
                "checkpoint %d cannot be read (%s); trying the one before it.", step, reason
            )
            continue
        if fingerprint not in (None, restored["meta"]["fingerprint"]):
            raise ValueError(
                f"{manager.directory} was trained on other data, in another order or from another teacher than now "
                f"(fingerprint {restored['meta']['fingerprint']}, expected {fingerprint}); use another workdir."
            )
        _put_aside(manager, [s for s in steps if s > step])
        return restored["state"]
    if steps:
        raise ValueError(
            f"no checkpoint in {manager.directory} can be read (steps {steps}); delete the directory to start again."
        )
    return None


def read_fingerprint(directory: str | os.PathLike) -> str | None:
    """That of the newest checkpoint, see `restore`; None if it is damaged."""
    path = storage.path(directory) / "checkpoints"
    try:
        return _meta(path, max(all_steps(directory)))["fingerprint"]
    except (OSError, ValueError, KeyError):  # whoever reads the state says so
        return None


def load_state(directory: str | os.PathLike, abstract: state.TrainState) -> state.TrainState:
    """The newest state of another stage, for one that goes on from it; without `frozen`.

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
    """The steps of a stage's checkpoints that were written to the end."""
    return sorted(ocp.utils.checkpoint_steps(storage.path(directory) / "checkpoints"))


def load_weights(directory: str | os.PathLike, abstract: dict, step: int | None = None) -> dict:
    """What the generator makes images with, in the newest (or the given) checkpoint of a stage: see `state.Net.weights`.

    Args:
      directory: of the stage.
      abstract: the parameters' shapes, dtypes and shardings.
      step: of the checkpoint.

    Raises:
      ValueError: there is no such checkpoint, it is damaged, or it holds another network.
    """
    steps = all_steps(directory)
    path = storage.absolute(directory) / "checkpoints"
    if not steps or step not in (None, *steps):
        raise ValueError(
            f"no checkpoint{f' of step {step}' if steps else ''} in {path}; run the stage {path.parent.name!r} first."
        )
    step = max(steps) if step is None else step
    try:
        name = _meta(path, step)["weights"]
        target = {"generator": {name: abstract}}
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        arguments = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        restored = ocp.PyTreeCheckpointer().restore(path / str(step) / "state", args=arguments)
    except Exception as error:  # Orbax and TensorStore raise all kinds for damaged files
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"checkpoint {step} in {path} is damaged or of another network ({reason}); delete {path / str(step)} and run the stage again."
        ) from error
    return restored["generator"][name]


def _meta(path, step):
    return json.loads((path / str(step) / "meta" / "metadata").read_text())


def _put_aside(manager, steps):
    for step in steps:
        path = storage.path(manager.directory)
        with contextlib.suppress(FileNotFoundError):  # another process was first
            path.joinpath(str(step)).rename(path.parent / f"unreadable_{step}")
        logging.warning("checkpoint %d was moved to %s.", step, path.parent / f"unreadable_{step}")
    if steps and jax.process_count() == 1:
        manager.reload()
