"""The stage that brings a public checkpoint into the workdir: EDM's `.pkl`, or `.safetensors` and `.npz` of the same keys."""

import json
import pathlib

import jax
import ml_collections

from dmd_jax import experiment, metrics
from dmd_jax.weights import edm, files

SOURCE = "source.json"  # of what the weights were made


def done(config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path) -> bool:
    """Whether the weights are there, and those of the file that the config names, if that is still at hand."""
    directory, path = workdir / stage, pathlib.Path(config[stage].checkpoint)
    if not all((directory / name).exists() for name in (SOURCE, experiment.WEIGHTS)):
        return False
    found = metrics.read_json(directory / SOURCE)["sha256"]
    if path.exists() and files.sha256(path) != found:
        raise ValueError(f"{directory} holds the weights of another file than {path} is now; use another workdir.")
    return True


def run(config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path):
    """Converts the file `checkpoint`.

    Raises:
      ValueError: there is no such file, it is not safe to read, or it is of another network than the config's.
    """
    path, directory = files.find(config[stage].checkpoint), workdir / stage
    tensors, found = edm.read(path)
    edm.check_settings(found, config.network.to_dict())
    params = edm.to_params(tensors, experiment.make_network(config).abstract)
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        edm.write(directory / experiment.WEIGHTS, params, json.loads(config.network.to_json()))
        metrics.write_json(directory / SOURCE, {"file": str(path), "sha256": files.sha256(path)})
