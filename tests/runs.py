"""Runs of configs/digits.py:smoke."""

import importlib.util
import pathlib

import jax

from dmd_jax import experiment

ROOT = pathlib.Path(__file__).parent.parent


def smoke():
    spec = importlib.util.spec_from_file_location("digits", ROOT / "configs/digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("smoke")


def params_of(config, workdir, stage, step=None):
    return jax.device_get(experiment.load_params(config, f"{{workdir}}/{stage}", workdir, step))
