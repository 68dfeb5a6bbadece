"""The stage that brings a public checkpoint into the workdir.

EDM's file (`.pkl`, or `.safetensors` and `.npz` of the same keys) is converted; a diffusers directory is checked and used where it lies.
"""

import json

import jax
import ml_collections

from dmd_jax.experiment import build
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import storage
from dmd_jax.weights import diffusers, edm, published, state_dict


def done(config: ml_collections.ConfigDict, stage: str, workdir: storage.Path) -> bool:
    """Whether the weights are there, whole, and those of the file that the config names, if that is still at hand."""
    source, weights = (workdir / stage / name for name in (workdir_lib.SOURCE, workdir_lib.WEIGHTS))
    if not source.exists():
        return False
    made, path = storage.read_json(source), storage.path(config[stage].checkpoint)
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


def run(config: ml_collections.ConfigDict, stage: str, workdir: storage.Path):
    """Imports `checkpoint`, by process 0.

    Raises:
      ValueError: there is no such file, it is not safe to read, or it is of another network or process than the config's.
    """
    if jax.process_index() > 0:
        return
    checkpoint, directory = config[stage].checkpoint, workdir / stage
    of_file = storage.path(checkpoint).suffix in edm.SUFFIXES
    source = (
        _file(config, checkpoint, directory) if of_file else _directory(config, stage, checkpoint)
    )
    directory.mkdir(parents=True, exist_ok=True)
    storage.write_json(directory / workdir_lib.SOURCE, source)


def _file(config, checkpoint, directory):
    path = published.find(checkpoint)
    tensors, found = edm.read(path)
    state_dict.check_settings(found, config.network.to_dict())
    params = edm.to_params(tensors, build.make_network(config).abstract)
    directory.mkdir(parents=True, exist_ok=True)
    edm.write(directory / workdir_lib.WEIGHTS, params, json.loads(config.network.to_json()))
    return {
        "file": checkpoint,
        "sha256": published.sha256(path),
        "weights_sha256": published.sha256(directory / workdir_lib.WEIGHTS),
    }


def _directory(config, stage, checkpoint):
    path = storage.absolute(diffusers.find(checkpoint))
    found, tensors = diffusers.unet(path)
    found = {
        key: value for key, value in found.items() if key != "size"
    }  # a UNet of convolutions and attention takes any
    network, process, prediction = (
        build.of_stage(config, stage, key) for key in ("network", "process", "prediction")
    )
    stated = _settings(found | {"stack": 1}, **diffusers.scheduler(path))
    state_dict.check_settings(stated, _settings(network, process, prediction))
    state_dict.from_torch(
        tensors, build.make_network(config, stage).abstract, place=lambda array, path: None
    )
    return {"directory": str(path), "sha256": diffusers.digest(path)}


def _settings(network, process, prediction):
    """Of a model, in one dict."""
    return (
        dict(network.items())
        | {f"process.{key}": value for key, value in process.items()}
        | {"prediction": prediction}
    )
