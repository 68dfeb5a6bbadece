"""Runs of configs/digits.py:smoke."""

import jax

from dmd_jax.experiment import configs
from dmd_jax.experiment import workdir as workdir_lib


def smoke():
    return configs.load("digits:smoke")


def params_of(config, workdir, stage, step=None):
    return jax.device_get(workdir_lib.load_params(config, f"{{workdir}}/{stage}", workdir, step))
