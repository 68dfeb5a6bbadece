"""Keeps compiled programs from run to run, so that a restart compiles nothing."""

import hashlib
import os
import pathlib

import jax

DIRECTORY = "~/.cache/dmd_jax/programs"
FIELDS = ("model name", "flags", "Features", "CPU part")  # of /proc/cpuinfo, the kind of processor


def keep():
    """Keeps programs in DIRECTORY, or in JAX_COMPILATION_CACHE_DIR if it is set.

    In DIRECTORY each kind of processor has a folder, because one may lack instructions of another.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    kind = "\n".join(sorted({line for line in lines if line.startswith(FIELDS)}))
    folder = hashlib.sha256(kind.encode()).hexdigest()[:8]
    directory = pathlib.Path(DIRECTORY).expanduser() / folder
    jax.config.update("jax_compilation_cache_dir", str(directory))
