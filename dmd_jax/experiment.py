"""What a config describes, as objects; the stages share this, and nothing below them sees a config."""

import pathlib

import jax
import ml_collections
import numpy as np

from dmd_jax import checkpoint, lookup, recipes, sampling, sharding
from dmd_jax import denoiser as denoiser_lib
from dmd_jax import process as process_lib
from dmd_jax.data import pipeline
from dmd_jax.evals import classifier as classifier_lib
from dmd_jax.models import layers

PROCESSES = {c.__name__: c for c in (process_lib.EDM, process_lib.VP, process_lib.RectifiedFlow)}
EVALUATION_SEED = 2**32  # far from the seeds of runs
PREDICTIONS = {"EDM": ("edm",), "VP": ("eps", "v"), "RectifiedFlow": ("flow",)}  # those that are defined for each process


def make_network(config: ml_collections.ConfigDict) -> layers.Network:
    """The network of `config.network`."""
    settings = dict(config.network)
    return lookup.find("models", settings.pop("name"))(**settings)


def make_denoiser(config: ml_collections.ConfigDict) -> denoiser_lib.Denoiser:
    """The network with `config.process` and `config.prediction`."""
    settings = dict(config.process)
    name = settings.pop("name")
    process = _choose("process", PROCESSES, name)(**settings)
    predictions = {p: getattr(denoiser_lib, p) for p in PREDICTIONS[name]}
    return denoiser_lib.Denoiser(make_network(config).apply, process, _choose(f"prediction for {name}", predictions, config.prediction))


def make_parallel(config: ml_collections.ConfigDict, stage: str) -> sharding.Parallel:
    """All devices, as `config.mesh` has them."""
    return sharding.Parallel(sharding.make_mesh(**config.mesh), config[stage].get("accumulation", 1))


def make_recipe(config: ml_collections.ConfigDict, stage: str, parallel: sharding.Parallel) -> recipes.Recipe:
    """The recipe of a training stage."""
    settings = config[stage].recipe.to_dict()
    make = lookup.find("recipes", settings.pop("name"))
    return make(make_denoiser(config), parallel, seed=config.seed, null_cond=config.null_cond, **settings)


def make_streams(config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path) -> dict[str, pipeline.Stream]:
    """The data of a training stage; a stream without a `batch_size` has the stage's."""
    streams = {}
    for name, settings in config[stage].data.items():
        settings = settings.to_dict()
        batch_size = settings.pop("batch_size", config[stage].batch_size)
        streams[name] = pipeline.Stream(make_source(settings, workdir), batch_size)
    return streams


def make_source(settings: dict, workdir: pathlib.Path):
    """The data source `settings["source"]`; {workdir} in a string stands for the run's directory."""
    settings = {key: value.format(workdir=workdir) if isinstance(value, str) else value for key, value in dict(settings).items()}
    return lookup.find("data", settings.pop("source"))(**settings)


def load_params(config: ml_collections.ConfigDict, directory: str, workdir: pathlib.Path, step: int | None = None) -> dict:
    """The running mean that a stage has trained, on all devices; `directory` may contain {workdir}."""
    replicated = jax.sharding.NamedSharding(sharding.make_mesh(**config.mesh), jax.P())
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), make_network(config).abstract)
    return checkpoint.load_ema(directory.format(workdir=workdir), abstract, step)


def image_shape(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """[H, W, C] of what the network makes."""
    return config.network.size, config.network.size, config.network.channels


def inputs(config: ml_collections.ConfigDict, count: int, workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Noise and conditions of `count` images to look at or to measure: the same ones for every model, unlike those of any pair."""
    conditions = make_source(config.conditions, workdir)
    cond = np.stack([conditions[i % len(conditions)]["cond"] for i in range(count)])
    return sampling.noise(EVALUATION_SEED, range(count), image_shape(config)), cond


def make_classifier(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> classifier_lib.Classifier:
    """The classifier of the training split, kept in the workdir."""
    train = make_source(config.images.train, workdir)
    return classifier_lib.cached(workdir / "classifier.npz", train.image, train.cond)


def _choose(what, choices, name):
    if name not in choices:
        raise ValueError(f"no {what} {name!r}{lookup.nearest(name, list(choices))}; there are: {', '.join(choices)}.")
    return choices[name]
