"""Machines to compile for, by name, which need not be there: TPU slices, GPUs, CPU devices."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmd_jax.runtime import accelerators

# Chips.
FLAT = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
# Cores, 2 a chip.
DEEP = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
}
SLICES = {"v5e": FLAT, "v6e": FLAT, "v5p": DEEP}
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
QUIET |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # no chip is used
PER_HOST = 8  # GPUs
# What XLA asks of a GPU: multiprocessors, bytes of shared memory in each, capability, units of
# each, bytes of L2, GHz.
GPUS = {
    "a100": (108, 167_936, (8, 0), 64, 40 * 2**20, 1.41),
    "h100": (132, 233_472, (9, 0), 128, 50 * 2**20, 1.98),
    "h200": (132, 233_472, (9, 0), 128, 50 * 2**20, 1.98),
}
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: 2048 shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {cores} shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin} fpus_per_core: {units}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  l2_cache_size: {cache} clock_rate_ghz: {clock}
}}
platform_name: "CUDA" device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 13 }}
"""


class Target(NamedTuple):
    """What to compile for.

    Attributes:
      name: as `find` was given it.
      devices: as `sharding.make_mesh` takes them.
      chip: that each of them is; None for CPU devices.
      about: what it is, in words.
      capacity: bytes that a program may use on each; None where there is no telling.
      options: of the compiler.
    """

    name: str
    devices: list
    chip: accelerators.Chip | None
    about: str
    capacity: float | None
    options: dict


def find(name: str) -> Target:
    """The machine that `name` stands for: v5e-64, gpu:8xh100, cpu:8.

    Call it before anything else of jax: the process computes on the CPU from then on.

    Raises:
      ValueError: there is no such machine, or what compiles for it is not installed.
    """
    patterns: dict[str, Callable] = {
        r"(v\d\w)-(\d+)": _tpu,
        r"gpu:(\d+)x(\w+)": _gpu,
        r"cpu:([1-9]\d*)": _cpu,
    }
    for pattern, make in patterns.items():
        if (found := re.fullmatch(pattern, name.replace("v5litepod", "v5e"))) and (
            target := make(*found.groups())
        ):
            return target
    slices = "; ".join(
        f"{chip}-N with N = {', '.join(map(str, sizes))}" for chip, sizes in SLICES.items()
    )
    gpus = ", ".join(f"gpu:Nx{chip}" for chip in GPUS)
    raise ValueError(
        f"no machine {name!r}; there are: {slices}; {gpus} with N = 1 to {PER_HOST} or a multiple "
        f"of {PER_HOST}; cpu:N."
    )


def _tpu(name, size):
    topology = SLICES.get(name, {}).get(int(size))
    if not topology:
        return None
    if not importlib.util.find_spec("libtpu"):
        raise ValueError('the compiler for TPUs is not installed; run: pip install "dmd_jax[tpu]"')
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    single = {"chips_per_host_bounds": (1, 1, 1)} if topology == "1x1" else {}
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{name}:{topology}", **single
    ).devices
    about = f"{len(devices)} chips {devices[0].device_kind} as {topology}"
    if name == "v5p":
        about += f" ({size} cores)"
    # Without it these compilers take several times as long.
    options = {"exec_time_optimization_effort": -1.0}
    return Target(
        f"{name}-{size}",
        devices,
        accelerators.CHIPS[name],
        f"{about}, libtpu {importlib.metadata.version('libtpu')}",
        _usable(devices[0]),
        options,
    )


def _usable(device):
    """Returns the bytes that a TPU's compiler gives to programs, by what it says of a huge one."""
    everywhere = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    try:
        jax.jit(lambda x: x + 1).lower(
            jax.ShapeDtypeStruct((2**40,), np.float32, sharding=everywhere)
        ).compile()
    except jax.errors.JaxRuntimeError as error:
        return too_large(str(error))[1]
    raise AssertionError("4 TiB fitted.")


def too_large(message: str) -> tuple[float, float] | None:
    """Returns the bytes needed and there, from a compiler's message; None if it is another one."""
    for pattern in (
        r"Used ([\d.]+)(\w?) of ([\d.]+)(\w?) hbm",
        r"\(([\d.]+)(\w?)\) exceeds available HBM \(([\d.]+)(\w?)\)",
    ):
        if found := re.search(pattern, message):
            used, used_unit, there, there_unit = found.groups()
            return tuple(
                float(n) * 1024 ** " KMGT".index(unit or " ")
                for n, unit in ((used, used_unit), (there, there_unit))
            )
    return None


def _gpu(count, name):
    count = int(count)
    if name not in GPUS or count < 1 or (count > PER_HOST and count % PER_HOST):
        return None
    if not importlib.util.find_spec("jax_plugins") or not importlib.util.find_spec(
        "jax_plugins.xla_cuda13"
    ):
        version = jax.__version__
        raise ValueError(
            'the compiler for GPUs is not installed; run: pip install "dmd_jax[cuda13]", or, '
            "enough to compile, "
            f"pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
        )
    # Which wants all of CUDA's libraries.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")
    chip, (cores, shared, (major, minor), units, cache, clock) = (
        accelerators.CHIPS[name],
        GPUS[name],
    )
    settings = dict(
        cores=cores,
        shared=shared,
        optin=shared - 1024,
        major=major,
        minor=minor,
        units=units,
        cache=cache,
        clock=clock,
    )
    settings |= dict(bandwidth=int(chip.bandwidth), memory=int(chip.memory), kind=chip.kinds[0])
    shape = (
        f"1x{-(-count // PER_HOST)}x{min(count, PER_HOST)}"  # partitions, hosts, devices of a host
    )
    devices = topologies.get_topology_desc(
        platform="cuda", target_config=GPU_CONFIG.format(**settings), topology=shape
    ).devices
    about = f"{count} x {chip.kinds[0]}, jax's CUDA plugin; "
    about += "without the workspaces that cuDNN asks for on a real one"
    # What jax takes of a GPU's memory.
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    about += f"; {fraction:.0%} of its memory, as XLA_PYTHON_CLIENT_MEM_FRACTION says"
    options = {"xla_gpu_autotune_level": 0}  # there is nothing to try algorithms on
    return Target(f"gpu:{count}x{name}", devices, chip, about, fraction * chip.memory, options)


def _cpu(count):
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # jax has started already; perhaps with enough of them
        jax.config.update("jax_num_cpu_devices", int(count))
    devices = jax.devices()
    if len(devices) < int(count):
        raise ValueError(
            f"jax has started with {len(devices)} CPU devices; cpu:{count} needs a process of its "
            "own."
        )
    about = f"{count} CPU devices; memory and traffic are those of the compiler for CPUs, "
    about += "which computes in float32 what is bfloat16"
    return Target(f"cpu:{count}", devices[: int(count)], None, about, None, {})
