"""Runs of configs/digits.py:smoke, and what tests need of configs."""

import json
import shutil

import jax

from dmd_jax.evals import result
from dmd_jax.experiment import build, check, configs, settings
from dmd_jax.experiment import workdir as workdir_lib


def smoke():
    return configs.load("digits:smoke")


def stage_of(config, name):
    return build.stages(config)[name]


def check_of(config):
    check.stages(build.stages(config))


def values_of(config):
    """The config as main writes it."""
    return json.loads(settings.complete(config.copy_and_resolve_references()).to_json())


def put_classifier(finished, workdir):
    """Saves a run the training of the classifier that its evaluation uses."""
    workdir.mkdir(parents=True, exist_ok=True)
    shutil.copy(finished / "classifier.npz", workdir)


def result_of(workdir, stage="evaluate"):
    return result.read(workdir / stage / "evaluation.json")


def scores_of(result):
    """Of each model, and of the real images where there are such."""
    real = {"real": result.real} if result.real else {}
    return {row.name: row.scores for row in result.rows} | real


def nfe_of(result):
    return {row.name: row.nfe for row in result.rows}


def params_of(config, workdir, name, step=None):
    return jax.device_get(workdir_lib.load_params(stage_of(config, name), workdir, step))
