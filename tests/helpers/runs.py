"""Runs of configs/digits.py:smoke."""

import jax

from dmd_jax.experiment import build, configs
from dmd_jax.experiment import workdir as workdir_lib


def smoke():
    return configs.load("digits:smoke")


def stage(config, name):
    return build.stages(config)[name]


def params_of(config, workdir, name, step=None):
    return jax.device_get(workdir_lib.load_params(stage(config, name), workdir, step))
