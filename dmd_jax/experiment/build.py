"""What a config describes, as objects; the stages share this, and nothing below them sees a config."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import ml_collections
import numpy as np

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import encoders, generate, lookup, losses, recipes, samplers, sharding
from dmd_jax import process as process_lib
from dmd_jax.data import captions, pipeline
from dmd_jax.encoders import autoencoder as autoencoder_lib
from dmd_jax.models import layers, quantize
from dmd_jax.models import lpips as lpips_lib
from dmd_jax.runtime import distributed, storage
from dmd_jax.weights import diffusers, lpips, published, state_dict

PROCESSES = {c.__name__: c for c in (process_lib.EDM, process_lib.VP, process_lib.RectifiedFlow)}
PREDICTIONS = {
    "EDM": ("edm",),
    "VP": ("eps", "v"),
    "RectifiedFlow": ("flow", "flow_to_data"),
}  # those that are defined for each process
RECTIFIED = "rectified"  # the prediction of a stage that is a rectified flow by the change of variables from the config's process
SAMPLER_NAMES = (
    "one_step",
    "euler",
    "heun",
    "stochastic_heun",
    "rk45",
    "ddim",
    "pndm",
    "dpm_solver_pp",
)
SAMPLERS = {name: getattr(samplers, name) for name in SAMPLER_NAMES}
FILE_SUFFIXES = (".pkl", ".safetensors", ".npz", ".pth", ".ckpt", ".gz", ".json")
DISTANCES = {"squared_error": False, "lpips": True}  # whether it has weights
EVALUATION_SEED = 2**32  # far from the seeds of runs


def of_stage(config: ml_collections.ConfigDict, stage: str, key: str):
    """`network`, `process` or `prediction` of a stage: its own, or the config's."""
    return config.get(stage, {}).get(key, config[key])


def make_network(config: ml_collections.ConfigDict, stage: str = "") -> layers.Network:
    """The network of a stage: its own, or `config.network`."""
    settings = of_stage(config, stage, "network").to_dict()
    return lookup.find("models", settings.pop("name"))(**settings)


def make_denoiser(config: ml_collections.ConfigDict, stage: str = "") -> denoiser_lib.Denoiser:
    """The network of a stage with its process and prediction: its own, or the config's."""
    network = make_network(config, stage)
    return denoiser_lib.Denoiser(
        network.apply, *_process_and_prediction(config, stage), network.cast
    )


def quantized(
    config: ml_collections.ConfigDict, stage: str, params: dict, cond: np.ndarray
) -> tuple[denoiser_lib.Denoiser, dict]:
    """The denoiser of a stage in eight bits, and its parameters, for conditions like `cond` [B, ...]."""
    inputs = [
        np.zeros((1, *shape), dtype)
        for shape, dtype in ((image_shape(config), np.float32), ((), np.float32))
    ]
    apply, params = quantize.int8(make_network(config, stage), params, (*inputs, cond[:1]))
    return dataclasses.replace(make_denoiser(config, stage), network=apply), params


def make_flow(config: ml_collections.ConfigDict, stage: str) -> denoiser_lib.Denoiser:
    """As `make_denoiser`, as a rectified flow: by the change of variables if it is none."""
    denoiser = make_denoiser(config, stage)
    if isinstance(denoiser.process, process_lib.RectifiedFlow):
        return denoiser
    prediction = denoiser_lib.rectified(denoiser.process, denoiser.prediction)
    return dataclasses.replace(denoiser, process=process_lib.RectifiedFlow(), prediction=prediction)


def make_parallel(config: ml_collections.ConfigDict, stage: str) -> sharding.Parallel:
    """All devices, as `config.mesh` has them."""
    return sharding.Parallel(
        sharding.make_mesh(**config.mesh), config[stage].get("accumulation", 1)
    )


def make_local_parallel(config: ml_collections.ConfigDict) -> sharding.Parallel:
    """This process's own devices of `config.mesh`."""
    return sharding.Parallel(distributed.local_mesh(sharding.make_mesh(**config.mesh)))


def make_recipe(
    config: ml_collections.ConfigDict,
    stage: str,
    parallel: sharding.Parallel,
    workdir: storage.Path,
) -> recipes.Recipe:
    """The recipe of a training stage."""
    settings = config[stage].recipe.to_dict()
    make = lookup.find("recipes", settings.pop("name"))
    if "distance" in settings:
        settings["distance"], settings["distance_params"] = make_distance(**settings["distance"])
    return make(
        make_denoiser(config, stage),
        parallel,
        seed=config.seed,
        null_cond=null_cond(config, workdir),
        **settings,
    )


def make_distance(
    name: str, *, weights: str = "", decoder: dict | None = None, **settings
) -> tuple[Callable, dict | None]:
    """A distance `(params, x, y) -> [B]` and its parameters: "squared_error", or "lpips" with its `weights` file.

    Latents are first turned into images by the autoencoder `decoder`, if there is one.
    """
    if name == "squared_error":
        return losses.squared_error, None
    network = lpips_lib.make(**settings)
    params = state_dict.from_torch(lpips.read(weights), network.abstract)
    if not decoder:
        return network.apply, params
    autoencoder, decoder_params = autoencoder_lib.load(decoder)

    def distance(params, x, y):
        return network.apply(
            params["lpips"], *(autoencoder.apply(params["decoder"], a) for a in (x, y))
        )

    return distance, {"lpips": params, "decoder": decoder_params}


def make_text_encoder(
    config: ml_collections.ConfigDict, parallel: sharding.Parallel
) -> encoders.Encoder:
    """What turns prompts into conditions."""
    settings = config.text.to_dict()
    return lookup.find("encoders", settings.pop("name"))(parallel, **settings)


def autoencoder(config: ml_collections.ConfigDict) -> dict | None:
    """The settings `config.autoencoder`, for dmd_jax/latents.py; None if the networks see images."""
    return config.autoencoder.to_dict() if "autoencoder" in config else None


def null_cond(config: ml_collections.ConfigDict, workdir: storage.Path):
    """The condition that stands for none: a label, or what is in the file that `config.null_cond` names.

    Raises:
      ValueError: there is no such file yet.
    """
    if not isinstance(config.null_cond, str):
        return config.null_cond
    path = storage.local(config.null_cond.format(workdir=workdir))
    if not path.exists():
        raise ValueError(
            f"null_cond: {path} does not exist; run the stage {path.parent.name!r} first."
        )
    return np.load(path)


def null_of(config: ml_collections.ConfigDict, settings: dict, workdir: storage.Path):
    """What a sampler of `settings` needs as `null_cond`: None if it is not guided."""
    return null_cond(config, workdir) if settings.get("guidance_scale", 1.0) > 1 else None


def make_sampler(
    config: ml_collections.ConfigDict, stage: str, workdir: storage.Path
) -> samplers.Sampler:
    """How images are made with what a stage has trained."""
    settings = config[stage].sampler.to_dict()
    return build_sampler(
        make_denoiser(config, stage),
        settings,
        null_of(config, settings, workdir),
        f"{stage}.sampler",
    )


def make_straightness(
    config: ml_collections.ConfigDict, stage: str, workdir: storage.Path, num_steps: int
) -> Callable:
    """`samplers.straightness` of what a stage has trained, guided as its sampler is, as a rectified flow."""
    settings, denoiser = config[stage].sampler.to_dict(), make_flow(config, stage)
    denoise = denoiser_lib.guided(
        denoiser, settings.get("guidance_scale", 1.0), null_of(config, settings, workdir)
    )
    return samplers.straightness(denoise, denoiser.process, num_steps=num_steps)


def build_sampler(
    denoiser: denoiser_lib.Denoiser, settings: dict, null, name: str
) -> samplers.Sampler:
    """The sampler of `settings`, guided where they have a "guidance_scale" above 1; `name` is what an error calls them."""
    denoise = denoiser_lib.guided(denoiser, settings.get("guidance_scale", 1.0), null)
    return sampler_of(settings, denoise, denoiser.process, name)


def make_streams(
    config: ml_collections.ConfigDict, stage: str, workdir: storage.Path
) -> dict[str, pipeline.Stream]:
    """The data of a training stage; a stream without a `batch_size` has the stage's."""
    streams = {}
    for name, settings in config[stage].data.items():
        settings = settings.to_dict()
        batch_size = settings.pop("batch_size", config[stage].batch_size)
        streams[name] = pipeline.Stream(make_source(config, settings, workdir), batch_size)
    return streams


def sources(tree, name: str = "") -> Iterator[tuple[str, dict]]:
    """The data sources in a config, with the keys under which they stand."""
    if isinstance(tree, dict):
        if "source" in tree:
            yield name, tree
        for key, value in tree.items():
            yield from sources(value, f"{name}.{key}" if name else key)


def open_source(settings: dict, workdir: storage.Path):
    """The data source `settings["source"]`; {workdir} in a string stands for the run's directory."""
    return lookup.open_source(located(settings, workdir))


def make_source(config: ml_collections.ConfigDict, settings: dict, workdir: storage.Path):
    """As `open_source`, for what the network takes or is compared with.

    Raises:
      ValueError: there is no such source, or some of its images or labels are not what the network takes.
    """
    source, name, n = open_source(settings, workdir), settings["source"], config.network.num_classes
    shapes = {
        image_shape(config),
        autoencoder_lib.image_shape(autoencoder(config), image_shape(config)),
    }
    for i in {*range(min(len(source), 100)), len(source) - 1}:
        try:
            row = source[i]
        except captions.BadRow:  # left to those who go through all of them
            continue
        if "image" in row and row["image"].shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name}: image {i} has shape {row['image'].shape}, the network makes {expected}; change one of them."
            )
        if n and np.ndim(row["cond"]) == 0 and row["cond"] >= n:
            raise ValueError(
                f"{name}: label {row['cond']} of item {i} is not below config.network.num_classes = {n}; change one of them."
            )
    return source


def replicated(parallel: sharding.Parallel) -> Callable:
    """`tree -> shardings`: all of it on all devices of `parallel`."""
    return lambda tree: jax.tree.map(lambda _: parallel.replicated, tree)


def find_files(name: str) -> storage.Path:
    """The file, or the directory in the layout of diffusers, of others.

    Raises:
      ValueError: it is not there, and cannot be fetched.
    """
    path = storage.path(name)
    return (
        published.find(path)
        if path.is_file() or path.suffix in FILE_SUFFIXES
        else diffusers.find(name)
    )


def image_shape(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """[H, W, C] of what the network makes."""
    return config.network.size, config.network.size, config.network.channels


def inputs(config: ml_collections.ConfigDict, indices: range, conditions) -> dict:
    """What images to look at or to measure are made of: the same for every model, unlike that of any pair."""
    return generate.inputs(EVALUATION_SEED, indices, image_shape(config), conditions)


def _process_and_prediction(config, stage):
    settings, prediction = (
        of_stage(config, stage, "process").to_dict(),
        of_stage(config, stage, "prediction"),
    )
    name = settings.pop("name")
    process = choose("process", PROCESSES, name)(**settings)
    predictions = {p: getattr(denoiser_lib, p) for p in PREDICTIONS[name]}
    if stage and name == "RectifiedFlow":
        predictions[RECTIFIED] = denoiser_lib.rectified(*_process_and_prediction(config, ""))
    return process, choose(f"prediction for {name}", predictions, prediction)


def sampler_of(settings: dict, denoise: Callable | None, process, name: str) -> samplers.Sampler:
    """As `build_sampler`, of what is guided already; None for one that is never called."""
    if not isinstance(settings, dict) or "name" not in settings:
        raise ValueError(
            f"{name} is {settings!r}, expected the name of a sampler and its settings."
        )
    settings = {key: value for key, value in settings.items() if key != "guidance_scale"}
    make = choose("sampler", SAMPLERS, settings.pop("name"))
    try:
        return make(denoise, process, **settings)
    except TypeError as error:
        raise ValueError(f"{name} does not fit: {error}.") from error


def located(settings, workdir: storage.Path):
    """A copy of settings as plain dicts, with the run's directory in place of {workdir}."""
    if hasattr(settings, "items"):
        return {key: located(value, workdir) for key, value in settings.items()}
    return settings.format(workdir=workdir) if isinstance(settings, str) else settings


def choose(what: str, choices: Mapping, name: str):
    """`choices[name]`.

    Raises:
      ValueError: there is no such `what`; lists those that there are.
    """
    if name not in choices:
        raise ValueError(
            f"no {what} {name!r}{lookup.nearest(name, list(choices))}; there are: {', '.join(choices)}."
        )
    return choices[name]


def flat(tree, prefix: str = "") -> dict:
    """Nested settings by their keys with dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for key, value in tree.items()
        for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
