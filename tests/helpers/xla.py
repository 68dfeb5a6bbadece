"""Flags of XLA for the tests and for the processes that they start."""

import functools
import os
import subprocess
import sys

FASTER = (
    "--xla_cpu_use_fusion_emitters=false"  # a third less to compile; jaxlib 0.12 has it no more
)


@functools.cache
def flags(devices: int) -> str:
    """Returns the value of XLA_FLAGS for that many CPU devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *_known(FASTER)])


def _known(flag):
    """Returns the flag if this jaxlib knows it.

    Another process tries it, because an unknown flag aborts the process.
    """
    verdict = os.environ.get("DMD_TEST_FLAG")  # one process tries for all that it starts
    if verdict is None:
        trial = [sys.executable, "-c", "import jax; jax.devices()"]
        environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
        code = subprocess.run(trial, env=environment, capture_output=True).returncode
        verdict = os.environ["DMD_TEST_FLAG"] = "unknown" if code else "known"
    return [flag] if verdict == "known" else []
