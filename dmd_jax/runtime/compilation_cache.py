"""Compiled programs are kept from run to run, so that a restart compiles nothing."""

import hashlib
import os
import pathlib

import jax

DIRECTORY = "~/.cache/dmd_jax/programs"


def keep():
    """In DIRECTORY, or where JAX_COMPILATION_CACHE_DIR says: a folder for each kind of processor, as one may not run what another can."""
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    kind = "\n".join(
        sorted(
            {
                line
                for line in lines
                if line.startswith(("model name", "flags", "Features", "CPU part"))
            }
        )
    )
    folder = hashlib.sha256(kind.encode()).hexdigest()[:8]
    jax.config.update(
        "jax_compilation_cache_dir", str(pathlib.Path(DIRECTORY).expanduser() / folder)
    )
