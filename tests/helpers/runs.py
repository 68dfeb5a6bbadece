"""Runs of configs/digits.py:smoke, and what tests need of configs."""

import json

import jax

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


def params_of(config, workdir, name, step=None):
    return jax.device_get(workdir_lib.load_params(stage_of(config, name), workdir, step))
