"""Devices as a mesh of two axes: both split the batch, and `fsdp` also splits parameters, optimizer state and running means.

Where they are split, a step gathers what it computes with, in the network's precision, and leaves each device its part of the gradient,
summed in float32: ZeRO's third stage (Rajbhandari et al., arXiv 1910.02054).
"""

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
WHOLE = -1  # the axis along which an array that is not split is split


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of `data` x `fsdp` devices; `data` -1 takes all there are.

    Devices stand in the order of their processes, so that a process has rows of a batch that follow one another, and those that share
    parameters are neighbours.

    Raises:
      ValueError: the devices are not that many.
    """
    devices = sorted(
        devices or jax.devices(),
        key=lambda d: (getattr(d, "slice_index", 0) or 0, d.process_index, d.id),
    )
    data = max(len(devices) // fsdp, 1) if data == -1 else data
    if data * fsdp > len(devices):
        raise ValueError(
            f"a mesh of data={data} x fsdp={fsdp} needs {data * fsdp} devices, but there are {len(devices)}."
        )
    return Mesh(
        np.array(devices[: data * fsdp]).reshape(data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2
    )


def place(tree, shardings):
    """Arrays of the host, the same in every process, as arrays on the devices; `shardings` is one, or a tree of them."""

    def put(a, sharding):
        return jax.make_array_from_callback(
            np.shape(a), sharding, lambda index: np.asarray(a)[index]
        )

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda a: put(a, shardings), tree)
    return jax.tree.map(put, tree, shardings)


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
            parts = f"{self.mesh.size} devices" + f" x {self.accumulation} accumulation steps" * (
                self.accumulation > 1
            )
            raise ValueError(f"{name} {batch_size} is not divisible by {parts}; use {choices}.")

    def split(self, tree):
        """Constrains the arrays of `tree` to be split along their first axis.

        Random arrays must pass through here: drawn bare, every device would draw all of them.

        Raises:
          ValueError: the devices cannot share the batch evenly.
        """
        for size in sorted({len(a) for a in jax.tree.leaves(tree)}):
            self.check_batch("batch_size", size)
        return jax.lax.with_sharding_constraint(tree, self.batch_sharding)

    @property
    def batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(AXES))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    def state_shardings(self, tree):
        """One sharding per leaf: the largest axis that `fsdp` divides is split, small arrays are replicated."""
        return jax.tree.map(
            lambda leaf: NamedSharding(self.mesh, _spec(self._split_axis(leaf))), tree
        )

    def _split_axis(self, leaf):
        """WHOLE if none is."""
        fsdp = self.mesh.shape["fsdp"]
        axes = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0]
        return (
            max(axes, key=lambda i: leaf.shape[i])
            if fsdp > 1 and leaf.size >= MIN_SPLIT and axes
            else WHOLE
        )

    def map(self, function: Callable) -> Callable:
        """`function(params, batch) -> batch`, each device working on its share of the batch."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=(P(), P(AXES)), out_specs=P(AXES))

    def in_batches(self, name: str, function: Callable, batch_size: int) -> Callable:
        """`function(params, batch) -> batch` as `(params, arrays [N, ...]) -> arrays [N, ...]`, numpy, for any N.

        It is one program, run on batches of `batch_size`; the last one is filled up from the beginning. All processes of the mesh call it
        with the same arrays.

        Raises:
          ValueError: the devices cannot share such a batch, which the message calls `name`.
        """
        self.check_batch(name, batch_size)
        program = jax.jit(
            self.map(function), out_shardings=self.replicated
        )  # every process gets all of it

        def run(params, arrays):
            count = len(jax.tree.leaves(arrays)[0])
            rows = [
                np.arange(start, start + batch_size) % count
                for start in range(0, count, batch_size)
            ]
            batches = (
                place(jax.tree.map(lambda a, r=r: a[r], arrays), self.batch_sharding) for r in rows
            )
            done = [jax.device_get(program(params, batch)) for batch in batches]
            return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *done)

        return run

    def gradients(self, function: Callable) -> Callable:
        """`(trained, frozen, batch) -> (gradients, metrics)`, means over all pieces of the batch; gradients are split as parameters are.

        Args:
          function: `(trained, frozen, batch) -> (gradients, metrics)` for whole parameters and one piece of the batch; the gradients are
            like `trained`, metrics are scalars.
        """

        def mean(trained, frozen, batch):
            axes = jax.tree.map(self._split_axis, (trained, frozen))
            specs = jax.tree.map(_spec, axes)

            @functools.partial(
                jax.shard_map, mesh=self.mesh, in_specs=(*specs, P(AXES)), out_specs=(specs[0], P())
            )
            def mean_of(trained, frozen, batch):
                whole = jax.tree.map(_gather, (trained, frozen), axes)

                def piece(batch):
                    grads, metrics = function(*whole, batch)
                    return jax.tree.map(_scatter, grads, axes[0]), metrics

                grads, metrics = self._mean_of_pieces(piece, batch)
                return jax.tree.map(self._mean_of_devices, grads, axes[0]), jax.lax.pmean(
                    metrics, AXES
                )

            return mean_of(trained, frozen, batch)

        return mean

    def _mean_of_pieces(self, function, batch):
        if self.accumulation == 1:
            return function(batch)
        pieces = jax.tree.map(lambda a: a.reshape(self.accumulation, -1, *a.shape[1:]), batch)
        shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], pieces))
        total = jax.tree.map(
            lambda a: jax.lax.pcast(jnp.zeros(a.shape, a.dtype), AXES, to="varying"), shapes
        )
        total, _ = jax.lax.scan(
            lambda total, piece: (jax.tree.map(jnp.add, total, function(piece)), None),
            total,
            pieces,
        )
        return jax.tree.map(lambda a: a / self.accumulation, total)

    def _mean_of_devices(self, grad, axis):
        return (
            jax.lax.pmean(grad, AXES)
            if axis == WHOLE
            else jax.lax.pmean(grad, "data") / self.mesh.shape["fsdp"]
        )


def _spec(axis):
    return P() if axis == WHOLE else P(*[None] * axis, "fsdp")


def _gather(a, axis):
    """Different on every device, in name: without it a gradient would come out summed over the devices."""
    if axis == WHOLE:
        return jax.lax.pcast(a, AXES, to="varying")
    return jax.lax.pcast(jax.lax.all_gather(a, "fsdp", axis=axis, tiled=True), "data", to="varying")


def _scatter(grad, axis):
    """The sum over the devices that share a parameter, each keeping its part."""
    grad = grad.astype(jnp.float32)
    return (
        grad
        if axis == WHOLE
        else jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True)
    )
