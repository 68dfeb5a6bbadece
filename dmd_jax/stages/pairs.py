"""The stage that runs the teacher's ODE from noise to images and keeps both (DMD, arXiv 2311.18828, section 3.3)."""

import math

import jax
import ml_collections
import numpy as np
import tqdm

from dmd_jax import generate
from dmd_jax.data import records
from dmd_jax.experiment import build
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import storage
from dmd_jax.weights import digests


def done(config: ml_collections.ConfigDict, stage: str, workdir: storage.Path) -> bool:
    """Whether every shard is there, made by the teacher that is there now."""
    directory = workdir / stage
    if not (directory / records.MANIFEST).exists():
        return False
    manifest = _manifest(config, stage, workdir, _teacher(config, stage, workdir))
    records.claim(directory, manifest)
    return not records.missing_shards(directory, manifest)


def run(config: ml_collections.ConfigDict, stage: str, workdir: storage.Path):
    """Writes the shards that are missing; every process makes some of them, on its own devices.

    Raises:
      ValueError: the directory holds pairs of another teacher or another sampler.
    """
    settings, directory = config[stage], workdir / stage
    parallel = build.make_local_parallel(config)
    params = _teacher(config, stage, workdir)
    manifest = _manifest(config, stage, workdir, params)
    records.claim(directory, manifest)
    sample = generate.make_sample(
        build.make_sampler(config, settings.teacher, workdir), parallel, settings.batch_size
    )
    conditions = build.make_source(config, settings.conditions, workdir)

    paths = list(enumerate(records.shard_paths(directory, manifest)))[
        jax.process_index() :: jax.process_count()
    ]
    for i, path in tqdm.tqdm(paths, desc=stage, unit="shard", disable=jax.process_index() > 0):
        if path.exists():
            continue
        indices = range(i * settings.shard_size, min((i + 1) * settings.shard_size, settings.count))
        inputs = generate.inputs(config.seed, indices, build.image_shape(config), conditions)
        records.write_shard(
            path, {"noise": inputs["z"], "image": sample(params, inputs), "cond": inputs["cond"]}
        )


def _teacher(config, stage, workdir):
    """On the devices of this process."""
    shardings = build.replicated(build.make_local_parallel(config))
    return workdir_lib.load_params(
        config, f"{{workdir}}/{config[stage].teacher}", workdir, shardings=shardings
    )


def _manifest(config, stage, workdir, params):
    settings = config[stage]
    cond = np.asarray(build.make_source(config, settings.conditions, workdir)[0]["cond"])
    image = {"shape": list(build.image_shape(config)), "dtype": "float32"}
    return {
        "count": settings.count,
        "shards": math.ceil(settings.count / settings.shard_size),
        "shard_size": settings.shard_size,
        "seed": config.seed,
        "teacher": digests.of_params(params),
        "sampler": config[settings.teacher].sampler.to_dict(),
        "features": {
            "noise": image,
            "image": image,
            "cond": {"shape": list(cond.shape), "dtype": str(cond.dtype)},
        },
    }
