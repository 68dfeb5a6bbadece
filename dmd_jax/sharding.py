"""Devices as a mesh of two axes: both split the batch, and `fsdp` also splits parameters, optimizer state and running means."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
MIN_SPLIT = 2**10  # elements; smaller arrays are not worth a collective


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of `data` x `fsdp` devices; `data` -1 takes all there are.

    Raises:
      ValueError: the devices are not that many.
    """
    devices = devices or jax.devices()
    data = max(len(devices) // fsdp, 1) if data == -1 else data
    if data * fsdp > len(devices):
        raise ValueError(f"a mesh of data={data} x fsdp={fsdp} needs {data * fsdp} devices, but there are {len(devices)}.")
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[: data * fsdp])


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a step is spread over the devices; what the recipes know of the mesh.

    Attributes:
      mesh: from `make_mesh`.
      accumulation: pieces that each device cuts its share of the batch into, to be worked off one after another.
    """

    mesh: Mesh
    accumulation: int = 1

    def check_batch(self, name: str, batch_size: int):
        """Raises ValueError if a batch cannot be split evenly."""
        n = self.mesh.size * self.accumulation
        if batch_size % n or batch_size < 1:
            below = batch_size // n * n
            choices = f"{below} or {below + n}" if below > 0 else f"{n}"
            parts = f"{self.mesh.size} devices" + f" x {self.accumulation} accumulation steps" * (self.accumulation > 1)
            raise ValueError(f"{name} {batch_size} is not divisible by {parts}; use {choices}.")

    def split(self, tree):
        """Constrains the arrays of `tree` to be split along their first axis.

        Random arrays must pass through here: drawn bare, every device would draw all of them.
        """
        return jax.lax.with_sharding_constraint(tree, self.batch_sharding)

    @property
    def batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(AXES))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    def state_shardings(self, tree):
        """One sharding per leaf: the largest axis that `fsdp` divides is split, small arrays are replicated."""
        fsdp = self.mesh.shape["fsdp"]

        def sharding(leaf):
            axes = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0]
            if fsdp == 1 or leaf.size < MIN_SPLIT or not axes:
                return NamedSharding(self.mesh, P())
            widest = max(axes, key=lambda i: leaf.shape[i])
            return NamedSharding(self.mesh, P(*(("fsdp" if i == widest else None) for i in range(leaf.ndim))))

        return jax.tree.map(sharding, tree)

    def map(self, function: Callable) -> Callable:
        """`function(params, batch) -> batch`, each device working on its share of the batch."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=(P(), P(AXES)), out_specs=P(AXES))

    def in_batches(self, name: str, function: Callable, batch_size: int) -> Callable:
        """`function(params, batch) -> batch` as `(params, arrays [N, ...]) -> arrays [N, ...]`, numpy, for any N.

        It is one program, run on batches of `batch_size`; the last one is filled up from the beginning.

        Raises:
          ValueError: the devices cannot share such a batch, which the message calls `name`.
        """
        self.check_batch(name, batch_size)
        program = jax.jit(self.map(function))

        def run(params, arrays):
            count = len(jax.tree.leaves(arrays)[0])
            rows = [np.arange(start, start + batch_size) % count for start in range(0, count, batch_size)]
            done = [jax.device_get(program(params, jax.tree.map(lambda a, r=r: a[r], arrays))) for r in rows]
            return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *done)

        return run

    def mean(self, function: Callable) -> Callable:
        """`function(params, batch) -> tree`, the mean over all pieces of the batch; gradients taken inside it come out right."""

        @functools.partial(jax.shard_map, mesh=self.mesh, in_specs=(P(), P(AXES)), out_specs=P())
        def mean_of(params, batch):
            # Without this the gradient of a parameter that is the same everywhere would be summed over the devices.
            params = jax.tree.map(_vary, params)
            if self.accumulation == 1:
                return jax.lax.pmean(function(params, batch), AXES)
            pieces = jax.tree.map(lambda a: a.reshape(self.accumulation, -1, *a.shape[1:]), batch)
            shapes = jax.eval_shape(function, params, jax.tree.map(lambda a: a[0], pieces))
            total = jax.tree.map(lambda a: _vary(jnp.zeros(a.shape, a.dtype)), shapes)
            total, _ = jax.lax.scan(lambda total, piece: (jax.tree.map(jnp.add, total, function(params, piece)), None), total, pieces)
            return jax.lax.pmean(jax.tree.map(lambda a: a / self.accumulation, total), AXES)

        return mean_of


def _vary(a):
    return jax.lax.pcast(a, AXES, to="varying")
