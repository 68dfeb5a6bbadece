"""The one training loop: it never asks which method it runs."""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections

from dmd_jax import generate, lookup, recipes, sharding, state
from dmd_jax.data import pipeline, pixels
from dmd_jax.encoders import autoencoder
from dmd_jax.evals import suite
from dmd_jax.experiment import build, evaluation
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import accelerators, checkpoint, flops, log, preemption, profiling, storage
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


def done(config: ml_collections.ConfigDict, stage: str, workdir: storage.Path) -> bool:
    """Whether the stage has its last checkpoint.

    Raises:
      ValueError: it was trained on other data than there are now, such as pairs that were made again by another teacher.
    """
    if max(checkpoint.all_steps(workdir / stage), default=0) < config[stage].num_steps:
        return False
    try:
        streams = build.make_streams(config, stage, workdir)
    except (ValueError, OSError):  # gone, perhaps to make room
        return True
    found = checkpoint.read_fingerprint(workdir / stage)
    if found and not found.startswith(pipeline.fingerprint(streams, seed=config.seed)):
        raise ValueError(
            f"{workdir / stage} was trained on other data than its sources have now; use another workdir, or delete it and what was made "
            "from it to train it again."
        )
    return True


def run(config: ml_collections.ConfigDict, stage: str, workdir: storage.Path):
    """Trains `config[stage]` from its newest checkpoint, if any, to `num_steps`.

    Raises:
      ValueError: something in the config, the data or the workdir does not fit.
      FloatingPointError: too many updates were not finite.
      Preempted: a machine is wanted back; the step is saved.
    """
    settings, directory = config[stage], workdir / stage
    parallel = build.make_parallel(config, stage)
    streams = build.make_streams(config, stage, workdir)
    _check(settings, parallel, streams)
    recipe = build.make_recipe(config, stage, parallel, workdir)
    params = _first_params(config, stage, parallel, workdir)
    fingerprint = f"{pipeline.fingerprint(streams, seed=config.seed)}-{digests.of_params((params, recipe.others))}"
    manager = checkpoint.open_manager(
        directory, keep=settings.keep_checkpoints, best=settings.best_metric
    )

    abstract, shardings = abstract_state(recipe, params, parallel)
    train_state = checkpoint.restore(manager, abstract, fingerprint=fingerprint)
    if train_state is None and settings.get("continues"):
        train_state = checkpoint.load_state(workdir / settings.continues, abstract)
    train_state = first_state(recipe, params, shardings, train_state)
    del params  # the state has copies of its own
    start = int(train_state.step)
    loader = pipeline.batches(
        streams, seed=config.seed, start=start, sharding=parallel.batch_sharding
    )
    preview, score = (
        _previews(config, stage, workdir, parallel),
        _scorer(config, stage, workdir, parallel),
    )
    writer = log.Writer(directory, name=stage, start=start, num_steps=settings.num_steps)
    with contextlib.closing(writer), checkpoint.closing(manager):
        batch = next(loader)
        compiled = compile_step(recipe.train_step, train_state, batch, shardings)
        writer.note(
            ", ".join(f"{what} in {seconds:.1f} s" for what, seconds in compiled.seconds.items())
            + f", starts at step {start}"
        )
        watch = _Watch(settings.max_skipped_updates, writer, compiled.operations)
        agree, stop = preemption.make_agreement(parallel.mesh), False
        trace = profiling.Trace(config.get("profile"), directory / "profile")
        with preemption.deferred() as notice:
            for step in range(start + 1, settings.num_steps + 1):
                with trace.step(step - start):
                    train_state, values = compiled.program(train_state, batch)
                trace.finish(step - start, values)
                if step == start + 1:
                    watch.first(values)
                stop = agree(notice.is_set())
                batch = next(loader)
                writer.advance(step)
                last, scores = step == settings.num_steps, {}
                if step % settings.log_every == 0 or last:
                    watch.log(step, values)
                if preview and (step % settings.preview_every == 0 or last):
                    writer.write_picture(step, preview(train_state.generator.weights))
                if score and (step % settings.scores.every == 0 or last):
                    scores = score(train_state.generator.weights)
                    writer.write(step, scores)
                if step % settings.checkpoint_every == 0 or last or stop:
                    watch.flush()  # a run that is killed has all rows up to its last checkpoint
                    writer.flush()
                    checkpoint.save(
                        manager, train_state, step, fingerprint=fingerprint, metrics=scores
                    )
                if stop:
                    break
            watch.flush()
            checkpoint.wait(manager)
            if stop:
                raise preemption.Preempted(
                    f"{stage} was stopped at step {step}, which is saved; run the same command again."
                )


def _check(settings, parallel, streams):
    for name, stream in streams.items():
        parallel.check_batch(f"{name} batch_size", stream.batch_size)


def abstract_state(recipe: recipes.Recipe, params: dict, parallel: sharding.Parallel):
    """Shapes and shardings of what a checkpoint holds, and the shardings of the whole state."""
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
    """The state at step 0, or `restored` with the frozen parameters that a checkpoint leaves out, spread over the devices.

    `params`, and the recipe's others, are the same in every process, or are on the devices already.
    """
    if restored is None:
        return jax.jit(recipe.init, out_shardings=shardings)(params, recipe.others)
    frozen = jax.jit(lambda *args: recipe.init(*args).frozen, out_shardings=shardings.frozen)(
        params, recipe.others
    )
    return restored.replace(frozen=frozen)


def compile_step(train_step: Callable, train_state, batch, shardings) -> Step:
    """The step as one program over the mesh, compiled once; its first argument is donated."""
    began = time.perf_counter()
    traced = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)).trace(
        train_state, batch
    )
    lowered = traced.lower()
    seconds = {"traced": time.perf_counter() - began}
    program = lowered.compile()
    seconds["compiled"] = time.perf_counter() - began - seconds["traced"]
    return Step(program, flops.of_program(traced, program), seconds)


def _first_params(config, stage, parallel, workdir):
    """Those of the stage `init_from`, or random; a network that is made of several of that stage's starts from copies of it."""
    network, start = build.make_network(config, stage), config[stage].init_from
    if not start:
        params = network.init(config.seed)
        return sharding.place(params, parallel.state_shardings(params))
    params = workdir_lib.load_params(config, start, workdir, shardings=parallel.state_shardings)
    if network.grow and jax.tree.structure(params) != jax.tree.structure(network.abstract):
        return network.grow(params)
    shapes, expected = (
        {jax.tree_util.keystr(path): a.shape for path, a in jax.tree.leaves_with_path(t)}
        for t in (params, network.abstract)
    )
    if differing := [
        path for path in shapes.keys() | expected.keys() if shapes.get(path) != expected.get(path)
    ]:
        raise ValueError(
            f"the network of {stage} does not fit what {start} has, which it starts from: {len(differing)} parameters differ, such as "
            f"{min(differing)}; give both the same settings."
        )
    return params


def _previews(config, stage, workdir, parallel):
    """`params -> picture` from the same noise every time, or None if the stage wants none."""
    settings = config[stage]
    if not settings.preview_every:
        return None
    draw = _make_draw(config, stage, workdir, parallel, settings.preview_images)
    inputs = build.inputs(
        config, range(settings.preview_images), evaluation.conditions(config, workdir)
    )
    return lambda params: pixels.grid(draw(params, inputs)[:100])


def _make_draw(config, stage, workdir, parallel, batch_size):
    """`(params, inputs) -> images`"""
    parallel = sharding.Parallel(parallel.mesh)
    sample = generate.make_sample(build.make_sampler(config, stage, workdir), parallel, batch_size)
    decode = autoencoder.make_decode(build.autoencoder(config), parallel, batch_size)
    return lambda params, inputs: decode(sample(params, inputs))


def _scorer(config, stage, workdir, parallel):
    """`params -> scores` by the protocol of `config[stage].scores`, or None if the stage wants none."""
    settings = config[stage].get("scores")
    if not settings:
        return None
    measuring = evaluation.make_suite(
        config, settings.protocol, workdir, sharding.Parallel(parallel.mesh)
    )
    real, conditions = (
        evaluation.reference(config, measuring, workdir),
        evaluation.conditions(config, workdir),
    )
    names, best = (
        measuring.protocol.named(suite.distances(measuring, real), settings.count),
        config[stage].best_metric,
    )
    if best not in ("", *names):
        raise ValueError(
            f"no distance {best!r} for best_metric, which keeps the lowest{lookup.nearest(best, list(names))}; there are: "
            f"{', '.join(names)}."
        )
    draw = _make_draw(config, stage, workdir, parallel, config.evaluate.batch_size)

    return lambda params: evaluation.score(
        config, measuring, real, functools.partial(draw, params), range(settings.count), conditions
    )


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
        self.flush()
        self._pending = step, values

    def flush(self):
        if self._pending is None:
            return
        step, values = self._pending
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        now = time.perf_counter()
        if self._clock:
            values["steps_per_second"] = (step - self._clock[0]) / (now - self._clock[1])
            values["tflops"] = (
                self._operations * values["steps_per_second"] / 1e12
            )  # of each device
            if self._chip:
                values["mfu"] = (
                    values["tflops"] * 1e12 / self._chip.flops
                )  # of its peak in bfloat16
        self._clock, self._pending = (step, now), None
        self._writer.write(step, values)
        if values["skipped"] > self._max_skipped:
            raise FloatingPointError(
                f"{values['skipped']:.0f} updates up to step {step} had gradients that were not finite, more than max_skipped_updates = "
                f"{self._max_skipped}; lower the learning rate or use float32, and start again in another workdir."
            )
