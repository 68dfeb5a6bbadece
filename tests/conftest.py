"""Eight CPU devices, strict numerics, and compiled programs kept from run to run."""

import fcntl
import os
import pathlib
import shutil

from tests.helpers import xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(devices=8)}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/dmd_jax_tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Our networks take longer to compile than to run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers would wait for one another's threads

import jax
import numpy as np
import pytest
from absl import flags

from dmd_jax import main
from dmd_jax.experiment import build
from dmd_jax.models import unet_edm
from tests.helpers import gcs, runs

flags.FLAGS.mark_as_parsed()  # chex.variants asks it
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


# They take longest, so they come first: no worker is left alone with one of them at the end.
LONGEST = ("stages", "coco_instaflow", "processes", "resume", "recipes", "unet_edm", "bench")


def pytest_collection_modifyitems(items):
    names = [f"test_{name}" for name in LONGEST]
    order = {name: i for i, name in enumerate(names)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True, scope="module")
def fresh_caches():
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def recipes_once():
    """Stages of equal settings have one recipe, whose step is traced and compiled once."""
    recipes = {}
    make = build.recipe

    def recipe(stage, parallel, workdir):
        null = np.asarray(build.null_cond(stage.run, workdir)).tolist()
        settings = stage.settings.recipe, stage.model, stage.seed("steps"), null
        key = repr((settings, parallel.mesh, parallel.accumulation))
        if key not in recipes:
            recipes[key] = make(stage, parallel, workdir)
        return recipes[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "recipe", recipe)
        yield


@pytest.fixture
def optimisations():
    """For what is held to the last bits: without them products and sums are rounded one by one."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def tiny():
    """Settings of a network that has one of everything."""
    return dict(
        size=8,
        channels=1,
        num_classes=10,
        width=8,
        multipliers=(1, 2),
        num_blocks=1,
        attention=(4,),
    )


@pytest.fixture(scope="session")
def network(tiny):
    return unet_edm.ddpmpp(**tiny)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """A workdir with all stages done; all workers have the same."""
    root = tmp_path_factory.getbasetemp()
    workdir = (root if worker_id == "master" else root.parent) / "finished"
    with open(f"{workdir}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "evaluate/evaluation.json").exists():
            main.run(runs.smoke(), workdir)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of the finished workdir, to be damaged."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def server():
    """Of a bucket, to which all clients of Google Cloud Storage are led."""
    with gcs.served() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """The objects of the bucket, {name: (content, generation)}; none at first."""
    monkeypatch.setenv("DMD_CACHE", str(tmp_path / "cache"))
    server.objects.clear()
    return server.objects
