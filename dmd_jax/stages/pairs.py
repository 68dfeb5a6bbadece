"""The stage that runs the teacher's ODE from noise to images and keeps both.

That is section 3.3 of DMD (arXiv 2311.18828).
"""

import math

import jax
import numpy as np
import tqdm

from dmd_jax import generate
from dmd_jax.data import records
from dmd_jax.experiment import build, made
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import distributed, storage


def done(stage: build.Stage, workdir: storage.Path) -> bool:
    """Returns whether every shard is there.

    Raises:
      ValueError: they were made from other things than there are now, such as another teacher.
    """
    directory = workdir / stage.name
    if not (directory / records.MANIFEST).exists():
        return False
    made.check(stage, workdir, made.of(stage, workdir))
    return not records.missing_shards(directory, records.read_manifest(directory))


def run(stage: build.Stage, workdir: storage.Path):
    """Writes the shards that are missing; every process makes some of them, on its own devices.

    Raises:
      ValueError: the directory holds pairs that were made from other things.
    """
    settings = stage.settings
    directory = workdir / stage.name
    parallel = build.local_parallel(stage)
    if jax.process_index() == 0:
        _claim(stage, workdir)
    distributed.barrier("claim")
    storage.wait_for(directory / records.MANIFEST)
    manifest = records.read_manifest(directory)
    params = _teacher(stage, workdir)
    sampler = build.sampler_for_stage(stage.stages[settings.teacher], workdir)
    sample = generate.make_sample(sampler, parallel, settings.batch_size)
    conditions = build.checked_source(stage, settings.conditions, workdir)

    seed = stage.seed("noise")
    paths = list(enumerate(records.shard_paths(directory, manifest)))[
        jax.process_index() :: jax.process_count()
    ]
    for i, path in tqdm.tqdm(paths, desc=stage.name, unit="shard", disable=jax.process_index() > 0):
        if path.exists():
            continue
        indices = range(i * settings.shard_size, min((i + 1) * settings.shard_size, settings.count))
        inputs = generate.inputs(seed, indices, stage.image_shape, conditions)
        records.write_shard(
            path, {"noise": inputs["z"], "image": sample(params, inputs), "cond": inputs["cond"]}
        )


def _teacher(stage, workdir):
    """The teacher's parameters, on the devices of this process."""
    shardings = build.replicated(build.local_parallel(stage))
    teacher = stage.stages[stage.settings.teacher]
    return workdir_lib.load_params(teacher, workdir, shardings=shardings)


def _claim(stage, workdir):
    settings = stage.settings
    directory = workdir / stage.name
    begun = (directory / records.MANIFEST).exists()
    everything = made.of(stage, workdir)
    made.claim(stage, workdir, everything, begun=begun)
    cond = np.asarray(build.checked_source(stage, settings.conditions, workdir)[0]["cond"])
    image = {"shape": list(stage.image_shape), "dtype": "float32"}
    manifest = {
        "count": settings.count,
        "shards": math.ceil(settings.count / settings.shard_size),
        "made": made.digest(everything),
        "features": {
            "noise": image,
            "image": image,
            "cond": {"shape": list(cond.shape), "dtype": str(cond.dtype)},
        },
    }
    records.write_manifest(directory, manifest)
