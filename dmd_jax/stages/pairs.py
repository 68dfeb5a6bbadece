"""The stage that runs the teacher's ODE from noise to images and keeps both.

That is section 3.3 of DMD (arXiv 2311.18828).
"""

import math

import jax
import numpy as np
import tqdm

from dmd_jax import generate
from dmd_jax.data import records
from dmd_jax.experiment import build
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import storage
from dmd_jax.weights import digests


def done(stage: build.Stage, workdir: storage.Path) -> bool:
    """Returns whether every shard is there, made by the teacher that is there now."""
    directory = workdir / stage.name
    if not (directory / records.MANIFEST).exists():
        return False
    manifest = _manifest(stage, workdir, _teacher(stage, workdir))
    records.claim(directory, manifest)
    return not records.missing_shards(directory, manifest)


def run(stage: build.Stage, workdir: storage.Path):
    """Writes the shards that are missing; every process makes some of them, on its own devices.

    Raises:
      ValueError: the directory holds pairs of another teacher or another sampler.
    """
    settings = stage.settings
    directory = workdir / stage.name
    parallel = build.local_parallel(stage)
    params = _teacher(stage, workdir)
    manifest = _manifest(stage, workdir, params)
    records.claim(directory, manifest)
    sampler = build.sampler_for_stage(stage.stages[settings.teacher], workdir)
    sample = generate.make_sample(sampler, parallel, settings.batch_size)
    conditions = build.checked_source(stage, settings.conditions, workdir)

    paths = list(enumerate(records.shard_paths(directory, manifest)))[
        jax.process_index() :: jax.process_count()
    ]
    for i, path in tqdm.tqdm(paths, desc=stage.name, unit="shard", disable=jax.process_index() > 0):
        if path.exists():
            continue
        indices = range(i * settings.shard_size, min((i + 1) * settings.shard_size, settings.count))
        inputs = generate.inputs(stage.seed("noise"), indices, stage.image_shape, conditions)
        records.write_shard(
            path, {"noise": inputs["z"], "image": sample(params, inputs), "cond": inputs["cond"]}
        )


def _teacher(stage, workdir):
    """The teacher's parameters, on the devices of this process."""
    shardings = build.replicated(build.local_parallel(stage))
    teacher = stage.stages[stage.settings.teacher]
    return workdir_lib.load_params(teacher, workdir, shardings=shardings)


def _manifest(stage, workdir, params):
    settings = stage.settings
    cond = np.asarray(build.checked_source(stage, settings.conditions, workdir)[0]["cond"])
    image = {"shape": list(stage.image_shape), "dtype": "float32"}
    return {
        "count": settings.count,
        "shards": math.ceil(settings.count / settings.shard_size),
        "shard_size": settings.shard_size,
        "seed": stage.seed("noise"),
        "teacher": digests.of_params(params),
        "sampler": dict(stage.stages[settings.teacher].settings.sampler),
        "features": {
            "noise": image,
            "image": image,
            "cond": {"shape": list(cond.shape), "dtype": str(cond.dtype)},
        },
    }
