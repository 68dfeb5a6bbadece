"""The stage that brings a public checkpoint into the workdir.

EDM's file (`.pkl`, or `.safetensors` and `.npz` of the same keys) is converted; a diffusers
directory is checked and used where it lies.
"""

import jax

from dmd_jax.experiment import build
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import storage
from dmd_jax.weights import diffusers, edm, published, state_dict


def done(stage: build.Stage, workdir: storage.Path) -> bool:
    """Returns whether the weights are there and whole.

    Raises:
      ValueError: they are not those of the file that the config names.
    """
    source, weights = (
        workdir / stage.name / name for name in (workdir_lib.SOURCE, workdir_lib.WEIGHTS)
    )
    if not source.exists():
        return False
    made, path = storage.read_json(source), storage.path(stage.settings.checkpoint)
    changed = f"{source} is about other weights than {path} has now; use another workdir."
    if made.get("directory"):
        directory = storage.absolute(path if path.is_dir() else made["directory"])
        if diffusers.digest(directory) != made.get("sha256"):
            raise ValueError(changed)
        if str(directory) != made["directory"]:  # it was moved
            storage.write_json(source, made | {"directory": str(directory)})
        return True
    if path.exists() and published.sha256(path) != made.get("sha256"):
        raise ValueError(changed)
    return weights.exists() and published.sha256(weights) == made.get("weights_sha256")


def run(stage: build.Stage, workdir: storage.Path):
    """Imports `checkpoint`, by process 0.

    Raises:
      ValueError: there is no such file, it is not safe to read, or it is of another network or
        process than the config's.
    """
    if jax.process_index() > 0:
        return
    directory = workdir / stage.name
    if storage.path(stage.settings.checkpoint).suffix in edm.SUFFIXES:
        source = _import_file(stage, directory)
    else:
        source = _check_directory(stage)
    directory.mkdir(parents=True, exist_ok=True)
    storage.write_json(directory / workdir_lib.SOURCE, source)


def _import_file(stage, directory):
    """Writes the weights of EDM's file, and returns where they came from."""
    path = published.find(stage.settings.checkpoint)
    tensors, stated = edm.read(path)
    network = stage.model.network
    state_dict.check_settings(stated, network)
    params = edm.to_params(tensors, stage.network.abstract)
    directory.mkdir(parents=True, exist_ok=True)
    edm.write(directory / workdir_lib.WEIGHTS, params, network)
    return {
        "file": stage.settings.checkpoint,
        "sha256": published.sha256(path),
        "weights_sha256": published.sha256(directory / workdir_lib.WEIGHTS),
    }


def _check_directory(stage):
    """Checks a diffusers directory, and returns where it lies."""
    path = storage.absolute(diffusers.find(stage.settings.checkpoint))
    network, tensors = diffusers.unet(path)
    del network["size"]  # a UNet of convolutions and attention takes any
    stated = _in_one(network | {"stack": 1}, **diffusers.scheduler(path))
    model = stage.model
    state_dict.check_settings(stated, _in_one(model.network, model.process, model.prediction))
    state_dict.from_torch(tensors, stage.network.abstract, place=lambda array, path: None)
    return {"directory": str(path), "sha256": diffusers.digest(path)}


def _in_one(network, process, prediction):
    """The settings of a model in one dict."""
    return (
        dict(network)
        | {f"process.{key}": value for key, value in process.items()}
        | {"prediction": prediction}
    )
