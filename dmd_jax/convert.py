"""The stage that brings a public checkpoint into the workdir: EDM's `.pkl`, or `.safetensors` and `.npz` of the same keys."""

import json
import pathlib

import jax
import ml_collections

from dmd_jax import experiment, metrics
from dmd_jax.weights import edm, files


def done(config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path) -> bool:
    """Whether the weights are there, whole, and those of the file that the config names, if that is still at hand."""
    source, weights = (workdir / stage / name for name in (experiment.SOURCE, experiment.WEIGHTS))
    if not source.exists() or not weights.exists():
        return False
    made, path = metrics.read_json(source), pathlib.Path(config[stage].checkpoint)
    if path.exists() and files.sha256(path) != made.get("sha256"):
        raise ValueError(f"{weights.parent} holds the weights of another file than {path} is now; use another workdir.")
    return files.sha256(weights) == made.get("weights_sha256")


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
        sha256 = {"sha256": files.sha256(path), "weights_sha256": files.sha256(directory / experiment.WEIGHTS)}
        metrics.write_json(directory / experiment.SOURCE, {"file": str(path), **sha256})
