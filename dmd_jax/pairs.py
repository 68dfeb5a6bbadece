"""The stage that runs the teacher's ODE from noise to images and keeps both (DMD, arXiv 2311.18828, section 3.3)."""

import json
import pathlib

import jax
import ml_collections
import numpy as np
import tqdm

from dmd_jax import checkpoint, experiment, metrics, sampling, sharding
from dmd_jax.data import pairs


def done(config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path) -> bool:
    """Whether every shard is there, made by the teacher that is there now."""
    directory = workdir / stage
    if not (directory / pairs.MANIFEST).exists():
        return False
    manifest = _manifest(config, stage, workdir, _teacher(config, stage, workdir))
    _check_manifest(directory, manifest)
    return all(path.exists() for path in pairs.shard_paths(directory, manifest))


def run(config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path):
    """Writes the shards that are missing; every process writes its own.

    Raises:
      ValueError: the directory holds pairs of another teacher or another sampler.
    """
    settings, directory = config[stage], workdir / stage
    params = _teacher(config, stage, workdir)
    manifest = _manifest(config, stage, workdir, params)
    _check_manifest(directory, manifest)
    parallel = sharding.Parallel(sharding.make_mesh(devices=jax.local_devices()))
    sample = sampling.make_sample(experiment.make_sampler(config, settings.teacher), parallel, settings.batch_size)
    conditions = experiment.make_source(config, settings.conditions, workdir)

    paths = list(enumerate(pairs.shard_paths(directory, manifest)))[jax.process_index() :: jax.process_count()]
    for i, path in tqdm.tqdm(paths, desc=stage, unit="shard", disable=jax.process_index() > 0):
        if path.exists():
            continue
        indices = range(i * settings.shard_size, min((i + 1) * settings.shard_size, settings.count))
        inputs = sampling.inputs(config.seed, indices, experiment.image_shape(config), conditions)
        pairs.write_shard(path, {"noise": inputs["z"], "image": sample(params, inputs), "cond": inputs["cond"]})


def _teacher(config, stage, workdir):
    return experiment.load_params(config, f"{{workdir}}/{config[stage].teacher}", workdir)


def _manifest(config, stage, workdir, params):
    settings = config[stage]
    cond = np.asarray(experiment.make_source(config, settings.conditions, workdir)[0]["cond"])
    image = {"shape": list(experiment.image_shape(config)), "dtype": "float32"}
    return {
        "count": settings.count,
        "shard_size": settings.shard_size,
        "seed": config.seed,
        "teacher": checkpoint.digest(params),
        "sampler": config[settings.teacher].sampler.to_dict(),
        "features": {"noise": image, "image": image, "cond": {"shape": list(cond.shape), "dtype": str(cond.dtype)}},
    }


def _check_manifest(directory, manifest):
    """Writes the manifest where there is none, and refuses another one."""
    manifest = json.loads(json.dumps(manifest))
    path = directory / pairs.MANIFEST
    if path.exists():
        found = pairs.read_manifest(directory)
        differing = [f"{key} is {found.get(key)}, expected {manifest[key]}" for key in manifest if found.get(key) != manifest[key]]
        if differing:
            raise ValueError(f"the pairs in {directory} are others than the config asks for: {'; '.join(differing)}; use another workdir.")
    elif jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        metrics.write_json(path, manifest)
