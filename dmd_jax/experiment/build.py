"""Builds what a config describes: its stages, and for each its sampler, recipe, data and devices.

Nothing outside of this folder and `main` sees a config: a stage's program gets a `Stage`.
"""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import encoders, generate, lookup, recipes, rng, samplers, sharding
from dmd_jax import process as process_lib
from dmd_jax.data import captions, pipeline
from dmd_jax.encoders import autoencoder as autoencoder_lib
from dmd_jax.experiment import settings as settings_lib
from dmd_jax.models import layers, quantize
from dmd_jax.models import lpips as lpips_lib
from dmd_jax.runtime import distributed, storage
from dmd_jax.weights import diffusers, lpips, published, state_dict

# Which of our processes each of our predictions is defined for.
FITS = {
    "edm": process_lib.EDM,
    "eps": process_lib.VP,
    "v": process_lib.VP,
    "flow": process_lib.RectifiedFlow,
    "flow_to_data": process_lib.RectifiedFlow,
}
# The prediction of a rectified flow by the change of variables from the run's process.
RECTIFIED = "rectified"
FILE_SUFFIXES = (".pkl", ".safetensors", ".npz", ".pth", ".ckpt", ".gz", ".json")
EVALUATION_SEED = 2**32  # far from the seeds of runs


@dataclasses.dataclass(frozen=True)
class Model:
    """What a network is and how it is read, as it is written into files.

    Attributes:
      network: the function in dmd_jax/models that makes it, by name, with its arguments.
      process: the noise process, likewise.
      prediction: what the network predicts.
    """

    network: dict
    process: dict
    prediction: str


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A stage of a run, as its program gets it.

    Attributes:
      name: of the stage, and of its directory in the workdir.
      run: what the stages of the run share.
      settings: of its program.
      model: its own, or the run's.
      network: of the model.
      denoiser: the network with its process and its prediction.
      stages: all stages of the config by their names, this one among them; `run.stages` run.
    """

    name: str
    run: settings_lib.Run
    settings: Any  # of the class that its program has in `settings.PROGRAMS`
    model: Model
    network: layers.Network
    denoiser: denoiser_lib.Denoiser
    stages: Mapping[str, "Stage"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of what the run's networks make: images or latents."""
        network = self.run.network
        return network["size"], network["size"], network["channels"]

    @property
    def num_classes(self) -> int:
        """How many classes the run's networks know; 0 for none."""
        return self.run.network["num_classes"]

    @property
    def guidance_scale(self) -> float:
        """Of the stage's sampler; 1 for none."""
        return self.settings.sampler.get("guidance_scale", 1.0)

    @property
    def evaluation(self) -> "Stage | None":
        """The evaluation that a training stage names, or the run's first; None if it has none."""
        named = getattr(self.settings, "evaluation", "")
        evaluations = [
            stage
            for stage in self.stages.values()
            if stage.settings.program == "evaluate" and named in ("", stage.name)
        ]
        return evaluations[0] if evaluations else None

    def seed(self, use: str) -> int:
        """Returns the seed of one use of random numbers in this stage."""
        return rng.seed(self.run.seed, self.name, use)

    def changed(self, **settings) -> "Stage":
        """Returns the stage with other settings of its own; its network stays."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **settings))


def overridden(stage: Stage, overrides: Mapping) -> Stage:
    """Builds a stage again with other values for some keys with dots, such as "mesh.fsdp"."""
    values = settings_lib.to_dict(stage.run)
    values |= {name: settings_lib.to_dict(s.settings) for name, s in stage.stages.items()}
    for key, value in overrides.items():
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[last] = value
    return from_settings(*settings_lib.read(values))[stage.name]


def stages(config: ml_collections.ConfigDict) -> dict[str, Stage]:
    """Builds the stages of a config, those that run first, in their order.

    Raises:
      ValueError: a key is unknown or missing, or a value does not fit; see `settings.read`.
    """
    config = settings_lib.complete(config.copy_and_resolve_references())
    lookup.admit(config.plugins)
    return from_settings(*settings_lib.read(config.to_dict()))


def from_settings(run: settings_lib.Run, settings: Mapping) -> dict[str, Stage]:
    """Builds the stages of a run from their settings."""
    models = {}
    found = {}
    for name, own in settings.items():
        model = Model(
            network=own.network or run.network,
            process=own.process or run.process,
            prediction=own.prediction or run.prediction,
        )
        key = json.dumps(dataclasses.asdict(model))
        if key not in models:
            models[key] = _build(model, run, name)
        network, denoiser = models[key]
        found[name] = Stage(name, run, own, model, network, denoiser, found)
    return found


def _build(model, run, name):
    """The network and the denoiser of a model."""
    try:
        network = make_network(model.network)
        process = make_process(model.process)
        prediction = _prediction(model, run, process)
    except (TypeError, ZeroDivisionError, KeyError) as error:
        raise ValueError(
            f"network or process of {name} does not fit ({error}); check names and values."
        ) from error
    return network, denoiser_lib.Denoiser(network.apply, process, prediction, network.cast)


def make_network(settings: dict) -> layers.Network:
    """Builds the network that settings describe by `name` and arguments; equal ones share it."""
    settings = dict(settings)
    make = lookup.find("models", settings.pop("name"))
    return _network(make, json.dumps(settings))


@functools.cache
def _network(make, arguments):
    return make(**json.loads(arguments))


def make_process(settings: dict):
    """Builds the noise process that settings describe by `name` and arguments."""
    settings = dict(settings)
    return lookup.find("process", settings.pop("name"))(**settings)


def _prediction(model, run, process):
    name = model.prediction
    if name == RECTIFIED and isinstance(process, process_lib.RectifiedFlow):
        before = make_process(run.process)
        if run.prediction != RECTIFIED:
            return denoiser_lib.rectified(before, _defined(run.prediction, before))
    return _defined(name, process)


def _defined(name, process):
    """The prediction of that name, if it is defined for the process."""
    kind = type(process)
    if kind in FITS.values() and "." not in name and FITS.get(name) is not kind:
        names = [prediction for prediction, fitting in FITS.items() if fitting is kind]
        names += [RECTIFIED] if kind is process_lib.RectifiedFlow else []
        raise ValueError(
            f"no prediction for {kind.__name__} {name!r}{lookup.nearest(name, names)}; "
            f"there are: {', '.join(names)}."
        )
    return lookup.find("denoiser", name)


def quantized(stage: Stage, params: dict, cond: np.ndarray) -> tuple[denoiser_lib.Denoiser, dict]:
    """Builds the denoiser of a stage in eight bits, and its parameters.

    Args:
      stage: whose denoiser it is.
      params: its parameters.
      cond: conditions [B, ...] like those that it will see.
    """
    inputs = [np.zeros((1, *shape), np.float32) for shape in (stage.image_shape, ())]
    apply, params = quantize.int8(stage.network, params, (*inputs, cond[:1]))
    return dataclasses.replace(stage.denoiser, network=apply), params


def flow(stage: Stage) -> denoiser_lib.Denoiser:
    """Builds a stage's denoiser as a rectified flow, by the change of variables if need be."""
    denoiser = stage.denoiser
    if isinstance(denoiser.process, process_lib.RectifiedFlow):
        return denoiser
    prediction = denoiser_lib.rectified(denoiser.process, denoiser.prediction)
    return dataclasses.replace(denoiser, process=process_lib.RectifiedFlow(), prediction=prediction)


def parallel(stage: Stage, devices: list | None = None) -> sharding.Parallel:
    """Spreads a stage's work over the devices of its run's mesh.

    Args:
      stage: whose work it is.
      devices: to be used; all of jax's if not given.
    """
    mesh = sharding.make_mesh(stage.run.mesh.data, stage.run.mesh.fsdp, devices)
    return sharding.Parallel(mesh, getattr(stage.settings, "accumulation", 1))


def local_parallel(stage: Stage) -> sharding.Parallel:
    """Spreads a stage's work over the devices of the mesh that this process has."""
    return sharding.Parallel(distributed.local_mesh(parallel(stage).mesh))


def recipe(stage: Stage, parallel: sharding.Parallel, workdir: storage.Path) -> recipes.Recipe:
    """Builds the recipe of a training stage."""
    settings = dict(stage.settings.recipe)
    make = lookup.find("recipes", settings.pop("name"))
    if "distance" in settings:
        settings["distance"], settings["distance_params"] = distance(**settings["distance"])
    null = null_cond(stage.run, workdir)
    return make(stage.denoiser, parallel, seed=stage.seed("steps"), null_cond=null, **settings)


def method(stage: Stage):
    """Returns the module of a training stage's recipe, which says what others must know of it."""
    return inspect.getmodule(lookup.find("recipes", stage.settings.recipe["name"]))


def distance(name: str, **settings) -> tuple[Callable, dict | None]:
    """Builds a distance `(params, x, y) -> [B]`, and its parameters.

    Args:
      name: "lpips", a function of dmd_jax/losses.py, or the user's own, which returns both.
      **settings: of `lpips_distance`, or of that `make`.
    """
    if name == "lpips":
        return lpips_distance(**settings)
    make = lookup.find("losses", name)
    return make(**settings) if "." in name else (make, None)


def lpips_distance(
    *, weights: str, decoder: dict | None = None, **settings
) -> tuple[Callable, dict | None]:
    """Builds LPIPS, and its parameters.

    Args:
      weights: the file.
      decoder: settings of the autoencoder that turns latents into images first; None for none.
      **settings: of `lpips.make`.
    """
    network = lpips_lib.make(**settings)
    params = state_dict.from_torch(lpips.read(weights), network.abstract)
    if not decoder:
        return network.apply, params
    autoencoder, decoder_params = autoencoder_lib.load(decoder)

    def of_images(params, x, y):
        images = [autoencoder.apply(params["decoder"], a) for a in (x, y)]
        return network.apply(params["lpips"], *images)

    return of_images, {"lpips": params, "decoder": decoder_params}


def text_encoder(run: settings_lib.Run, parallel: sharding.Parallel) -> encoders.Encoder:
    """Builds what turns prompts into conditions."""
    settings = dict(run.text)
    return lookup.find("encoders", settings.pop("name"))(parallel, **settings)


def null_cond(run: settings_lib.Run, workdir: storage.Path):
    """Returns the condition that stands for none: a label, or the content of a file.

    Raises:
      ValueError: there is no such file yet.
    """
    if not isinstance(run.null_cond, str):
        return run.null_cond
    path = storage.local(run.null_cond.format(workdir=workdir))
    if not path.exists():
        raise ValueError(
            f"null_cond: {path} does not exist; run the stage {path.parent.name!r} first."
        )
    return np.load(path)


def null_for(sampler: dict, run: settings_lib.Run, workdir: storage.Path):
    """Returns what a sampler of these settings needs as `null_cond`: None if it is not guided."""
    return null_cond(run, workdir) if sampler.get("guidance_scale", 1.0) > 1 else None


def sampler_for_stage(stage: Stage, workdir: storage.Path) -> samplers.Sampler:
    """Builds the sampler with which images are made of what a stage has trained."""
    settings = stage.settings.sampler
    null = null_for(settings, stage.run, workdir)
    return guided_sampler(stage.denoiser, settings, null, f"{stage.name}.sampler")


def straightness(stage: Stage, workdir: storage.Path, num_steps: int) -> Callable:
    """Builds `samplers.straightness` of a stage as a flow, guided as its sampler is."""
    denoiser = flow(stage)
    null = null_for(stage.settings.sampler, stage.run, workdir)
    denoise = denoiser_lib.guided(denoiser, stage.guidance_scale, null)
    process: Any = denoiser.process
    return samplers.straightness(denoise, process, num_steps=num_steps)


def guided_sampler(
    denoiser: denoiser_lib.Denoiser, settings: dict, null, name: str
) -> samplers.Sampler:
    """Builds the sampler of `settings`, guided where they have a "guidance_scale" above 1.

    Args:
      denoiser: what is sampled.
      settings: `name` and arguments.
      null: the condition that stands for none; None where nothing is guided.
      name: what an error calls the settings.
    """
    denoise = denoiser_lib.guided(denoiser, settings.get("guidance_scale", 1.0), null)
    return sampler_from_settings(settings, denoise, denoiser.process, name)


def sampler_from_settings(
    settings: dict, denoise: Callable | None, process, name: str
) -> samplers.Sampler:
    """Builds a sampler of a function that is guided already; None if it is never called."""
    if not isinstance(settings, Mapping) or "name" not in settings:
        raise ValueError(
            f"{name} is {settings!r}, expected the name of a sampler and its settings."
        )
    arguments = {key: value for key, value in settings.items() if key != "guidance_scale"}
    make = lookup.find("samplers", arguments.pop("name"))
    try:
        return make(denoise, process, **arguments)
    except TypeError as error:
        raise ValueError(f"{name} does not fit: {error}.") from error


def streams(stage: Stage, workdir: storage.Path) -> dict[str, pipeline.Stream]:
    """Opens the data of a training stage; a stream without a `batch_size` has the stage's."""
    opened = {}
    for name, settings in stage.settings.data.items():
        source = {key: value for key, value in settings.items() if key != "batch_size"}
        batch_size = settings.get("batch_size", stage.settings.batch_size)
        opened[name] = pipeline.Stream(checked_source(stage, source, workdir), batch_size)
    return opened


def open_source(settings: dict, workdir: storage.Path):
    """Opens the data source `settings["source"]`; {workdir} in a string is the run's directory."""
    return lookup.open_source(located(settings, workdir))


def checked_source(stage: Stage, settings: dict, workdir: storage.Path):
    """Opens a source of what the run's networks take or are compared with; see `open_source`.

    Raises:
      ValueError: there is no such source, or some of its images or labels do not fit the networks.
    """
    source = open_source(settings, workdir)
    name = settings["source"]
    shapes = {
        stage.image_shape,
        autoencoder_lib.image_shape(stage.run.autoencoder, stage.image_shape),
    }
    for i in {*range(min(len(source), 100)), len(source) - 1}:
        try:
            row = source[i]
        except captions.BadRow:  # left to those who go through all of them
            continue
        if "image" in row and row["image"].shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name}: image {i} has shape {row['image'].shape}, the network makes {expected}; "
                "change one of them."
            )
        if stage.num_classes and np.ndim(row["cond"]) == 0 and row["cond"] >= stage.num_classes:
            raise ValueError(
                f"{name}: label {row['cond']} of item {i} is not below network.num_classes = "
                f"{stage.num_classes}; change one of them."
            )
    return source


def find_files(name: str) -> storage.Path:
    """Finds a file, or a directory in the layout of diffusers, of others.

    Raises:
      ValueError: it is not there, and cannot be fetched.
    """
    path = storage.path(name)
    if path.is_file() or path.suffix in FILE_SUFFIXES:
        return published.find(path)
    return diffusers.find(name)


def inputs(stage: Stage, indices: Iterable[int], conditions) -> dict:
    """Returns what images to look at or to measure are made of.

    It is the same for every model of a run, and unlike that of any pair.
    """
    return generate.inputs(EVALUATION_SEED, indices, stage.image_shape, conditions)


def located(settings, workdir: storage.Path):
    """Returns a copy of settings with the run's directory in place of {workdir}."""
    if isinstance(settings, Mapping):
        return {key: located(value, workdir) for key, value in settings.items()}
    return settings.format(workdir=workdir) if isinstance(settings, str) else settings


def replicated(parallel: sharding.Parallel) -> Callable:
    """Returns `tree -> shardings`: all of it on all devices of `parallel`."""
    return lambda tree: jax.tree.map(lambda _: parallel.replicated, tree)
