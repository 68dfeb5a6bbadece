"""The one training loop: it never asks which method it runs."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from dmd_jax import generate, lookup, recipes, sharding, state
from dmd_jax.data import pipeline, pixels
from dmd_jax.encoders import autoencoder
from dmd_jax.evals import result as result_lib
from dmd_jax.evals import suite as suite_lib
from dmd_jax.experiment import build, evaluation, made
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import (
    accelerators,
    checkpoint,
    distributed,
    flops,
    log,
    preemption,
    profiling,
    storage,
    watchdog,
)
from dmd_jax.weights import digests


class Step(NamedTuple):
    """A compiled step.

    Attributes:
      program: `(state, batch) -> (state, metrics)`.
      operations: of a call, on each device.
      seconds: that it took to be made; compiling takes almost none where programs are kept.
    """

    program: jax.stages.Compiled
    operations: float
    seconds: dict[str, float]


def done(stage: build.Stage, workdir: storage.Path) -> bool:
    """Returns whether the stage has its last checkpoint.

    Raises:
      ValueError: it was trained from other things than there are now, such as pairs that were made
        again by another teacher.
    """
    if max(checkpoint.all_steps(workdir / stage.name), default=0) < stage.settings.num_steps:
        return False
    made.check(stage, workdir, made.of(stage, workdir))
    return True


def run(stage: build.Stage, workdir: storage.Path):
    """Trains from the newest checkpoint, if there is one, to the last step.

    Raises:
      ValueError: something in the config, the data or the workdir does not fit.
      FloatingPointError: too many updates were not finite.
      Preempted: a machine is wanted back; the step is saved.
    """
    settings = stage.settings
    directory = workdir / stage.name
    parallel = build.parallel(stage)
    streams = build.streams(stage, workdir)
    for name, stream in streams.items():
        parallel.check_batch(f"{name} batch_size", stream.batch_size)
    recipe = build.recipe(stage, parallel, workdir)
    params = _first_params(stage, parallel, workdir)
    if jax.process_index() == 0:
        others = digests.of_params(recipe.others)
        everything = made.of(stage, workdir, others=others)
        made.claim(stage, workdir, everything, begun=bool(checkpoint.all_steps(directory)))
    distributed.barrier("claim")
    manager = checkpoint.open_manager(
        directory, keep=settings.keep_checkpoints, best=settings.best_metric
    )

    abstract, shardings = abstract_state(recipe, params, parallel)
    train_state = checkpoint.restore(manager, abstract)
    if train_state is None and settings.continues:
        train_state = checkpoint.load_state(workdir / settings.continues, abstract)
    train_state = first_state(recipe, params, shardings, train_state)
    del params  # the state has copies of its own
    start = int(train_state.step)
    loader = pipeline.batches(
        streams, seed=stage.seed("order"), start=start, sharding=parallel.batch_sharding
    )
    preview = _previews(stage, workdir, parallel)
    score = _scorer(stage, workdir, parallel)
    writer = log.Writer(directory, name=stage.name, start=start, num_steps=settings.num_steps)
    with contextlib.closing(writer), checkpoint.closing(manager):
        batch = next(loader)
        compiled = compile_step(recipe.train_step, train_state, batch, shardings)
        took = ", ".join(f"{what} in {s:.1f} s" for what, s in compiled.seconds.items())
        writer.note(f"{took}, starts at step {start}")
        watch = _Watch(settings.max_skipped_updates, writer, compiled.operations)
        agree = preemption.make_agreement(parallel.mesh)
        stop = False
        trace = profiling.Trace(stage.run.profile or None, directory / "profile")
        watching = watchdog.watching(stage.run.step_timeout, stage.name)
        with preemption.deferred() as notice, watching as alive:
            for step in range(start + 1, settings.num_steps + 1):
                with trace.step(step - start):
                    train_state, values = compiled.program(train_state, batch)
                trace.finish(step - start, values)
                if step == start + 1:
                    watch.first(values)
                stop = agree(notice.is_set())
                last = step == settings.num_steps
                if not (last or stop):
                    batch = next(loader)
                writer.advance(step)
                alive()
                scores = {}
                if step % settings.log_every == 0 or last:
                    watch.log(step, values)
                if preview and not stop and (step % settings.preview_every == 0 or last):
                    with _finite_or_said(writer, step):
                        writer.write_picture(step, preview(train_state.generator.weights))
                if score and not stop and (step % settings.scores.every == 0 or last):
                    try:
                        with _finite_or_said(writer, step):
                            scores = score(train_state.generator.weights, notice, agree, alive)
                            writer.write(step, scores)
                    except preemption.Stopping:
                        stop = True
                if step % settings.checkpoint_every == 0 or last or stop:
                    watch.flush()  # a run that is killed has all rows up to its last checkpoint
                    writer.flush()
                    checkpoint.save(manager, train_state, step, metrics=scores)
                if stop:
                    break
            watch.flush()
            checkpoint.wait(manager)
            if stop:
                raise preemption.Preempted(
                    f"{stage.name} was stopped at step {step}, which is saved; "
                    "run the same command again."
                )


@contextlib.contextmanager
def _finite_or_said(writer, step):
    """Looking at images that are not finite is left, with a line that says so."""
    try:
        yield
    except FloatingPointError as error:
        writer.note(f"step {step}: {error}")


def abstract_state(recipe: recipes.Recipe, params: dict, parallel: sharding.Parallel):
    """Returns shapes and shardings of what a checkpoint holds, and shardings of the whole state."""
    shapes = jax.eval_shape(recipe.init, params, recipe.others)
    shardings = parallel.state_shardings(shapes)
    kept = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )
    return kept.replace(frozen=None), shardings


def first_state(
    recipe: recipes.Recipe,
    params: dict,
    shardings: state.TrainState,
    restored: state.TrainState | None = None,
):
    """Returns the state at step 0, spread over the devices.

    Args:
      recipe: of the stage.
      params: the initial parameters; they and the recipe's others are the same in every process,
        or are on the devices already.
      shardings: of the state.
      restored: a checkpoint, to which only the frozen parameters are added; None for none.
    """
    if restored is None:
        return jax.jit(recipe.init, out_shardings=shardings)(params, recipe.others)
    frozen = jax.jit(lambda *args: recipe.init(*args).frozen, out_shardings=shardings.frozen)(
        params, recipe.others
    )
    return dataclasses.replace(restored, frozen=frozen)


def compile_step(train_step: Callable, train_state, batch, shardings) -> Step:
    """Compiles the step as one program over the mesh; its first argument is donated."""
    began = time.perf_counter()
    traced = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)).trace(
        train_state, batch
    )
    lowered = traced.lower()
    seconds = {"traced": time.perf_counter() - began}
    program = lowered.compile()
    seconds["compiled"] = time.perf_counter() - began - seconds["traced"]
    return Step(program, flops.of_program(traced, program), seconds)


def _first_params(stage, parallel, workdir):
    """The parameters of the stage `init_from`, or random ones.

    A network that is made of several of that stage's starts from copies of it.
    """
    network = stage.network
    start = stage.settings.init_from
    if not start:
        params = network.init(stage.seed("weights"))
        return sharding.place(params, parallel.state_shardings(params))
    before = stage.stages[start]
    params = workdir_lib.load_params(before, workdir, shardings=parallel.state_shardings)
    if network.grow and jax.tree.structure(params) != jax.tree.structure(network.abstract):
        return network.grow(params)
    shapes = _shapes(params)
    expected = _shapes(network.abstract)
    paths = shapes.keys() | expected.keys()
    differing = [path for path in paths if shapes.get(path) != expected.get(path)]
    if differing:
        raise ValueError(
            f"the network of {stage.name} does not fit what {start} has, which it starts from: "
            f"{len(differing)} parameters differ, such as {min(differing)}; give both the same "
            "settings."
        )
    return params


def _shapes(params):
    return {jax.tree_util.keystr(path): a.shape for path, a in jax.tree.leaves_with_path(params)}


def _previews(stage, workdir, parallel):
    """`params -> picture` from the same noise every time, or None if the stage wants none."""
    settings = stage.settings
    if not settings.preview_every:
        return None
    draw = _make_draw(stage, workdir, parallel, settings.preview_images)
    conditions = evaluation.conditions(stage.evaluation, workdir)
    inputs = build.inputs(stage, range(settings.preview_images), conditions)
    return lambda params: pixels.grid(draw(params, inputs)[:100])


def _make_draw(stage, workdir, parallel, batch_size):
    """`(params, inputs) -> images`"""
    parallel = sharding.Parallel(parallel.mesh)
    sampler = build.sampler_for_stage(stage, workdir)
    sample = generate.make_sample(sampler, parallel, batch_size)
    decode = autoencoder.make_decode(stage.run.autoencoder, parallel, batch_size)
    return lambda params, inputs: decode(sample(params, inputs))


def _scorer(stage, workdir, parallel):
    """`(params, notice, agree, alive) -> scores` by the protocol of the stage's scores, or None.

    Between batches the processes agree whether to stop; then it raises `preemption.Stopping`.
    """
    scores = stage.settings.scores
    if not scores:
        return None
    measured = stage.evaluation
    parallel = sharding.Parallel(parallel.mesh)
    suite = evaluation.make_suite(measured, scores.protocol, workdir, parallel)
    real = evaluation.reference(measured, suite, workdir)
    conditions = evaluation.conditions(measured, workdir, scores.protocol)
    distances = dict.fromkeys(suite_lib.distances(suite, real), 0.0)
    names = suite.protocol.named(distances, scores.count)
    best = stage.settings.best_metric
    if best not in ("", *names):
        raise ValueError(
            f"no distance {best!r} for best_metric, which keeps the lowest"
            f"{lookup.nearest(best, list(names))}; there are: {', '.join(names)}."
        )
    draw = _make_draw(stage, workdir, parallel, measured.settings.batch_size)

    metrics = evaluation.metrics(measured)

    def score(params, notice, agree, alive):
        def draw_unless_stopped(inputs):
            alive()
            if agree(notice.is_set()):
                raise preemption.Stopping
            return draw(params, inputs)

        images = evaluation.batches(measured, suite.protocol, draw_unless_stopped, conditions)
        models = [(result_lib.Row(name=""), images)]
        result = suite_lib.evaluate(
            suite, real, models, count=scores.count, ranges=1, metrics=metrics
        )
        return result.rows[0].scores

    return score


class _Watch:
    """Fetches metrics one interval late, so that the devices never wait for the host."""

    def __init__(self, max_skipped, writer, operations):
        self._max_skipped, self._writer, self._operations = max_skipped, writer, operations
        self._chip = accelerators.of(jax.devices()[0].device_kind)
        self._pending, self._clock, self._began = None, None, time.perf_counter()

    def first(self, values):
        """After the first step, which is waited for."""
        jax.block_until_ready(values)
        self._writer.note(f"first step in {time.perf_counter() - self._began:.1f} s")

    def log(self, step, values):
        """Keeps a row until the next one; its time is taken when the row before is there."""
        self.flush()
        self._pending = step, values, time.perf_counter()

    def flush(self):
        if self._pending is None:
            return
        step, values, now = self._pending
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        if self._clock:
            values["steps_per_second"] = (step - self._clock[0]) / (now - self._clock[1])
            # Of each device.
            values["tflops"] = self._operations * values["steps_per_second"] / 1e12
            if self._chip:
                # Of its peak in bfloat16.
                values["mfu"] = values["tflops"] * 1e12 / self._chip.flops
        self._clock, self._pending = (step, now), None
        self._writer.write(step, values)
        if values["skipped"] > self._max_skipped:
            raise FloatingPointError(
                f"{values['skipped']:.0f} updates up to step {step} had gradients that were not "
                "finite, more than max_skipped_updates = "
                f"{self._max_skipped}; lower the learning rate or use float32, and start again in "
                "another workdir."
            )
