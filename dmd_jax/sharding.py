"""Devices form a mesh of two axes, `data` and `fsdp`. Both split the batch; `fsdp` also splits
parameters, optimizer state and running means.

A step gathers the parameters that are split, in the network's precision. Each device keeps its
part of the gradient, summed in float32. This is ZeRO's third stage (Rajbhandari et al., arXiv
1910.02054).
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
NOT_SPLIT = -1  # stands for the axis of an array that is not split


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """Makes a mesh of `data` x `fsdp` devices; `data` -1 takes all devices.

    The devices are in the order of their processes. So the rows of a batch that belong to a process
    follow one another, and devices that share parameters are neighbours.

    Raises:
      ValueError: there are fewer devices, or `data` is -1 and some would be idle.
    """

    def position(device):
        return getattr(device, "slice_index", 0) or 0, device.process_index, device.id

    devices = sorted(devices or jax.devices(), key=position)
    if data == -1:
        data = max(len(devices) // fsdp, 1)
        idle = len(devices) - data * fsdp
        if idle > 0:
            raise ValueError(
                f"mesh.fsdp is {fsdp}, which leaves {idle} of {len(devices)} devices idle; give it "
                f"a number that divides {len(devices)}, or give mesh.data a number, too."
            )
    if data * fsdp > len(devices):
        raise ValueError(
            f"a mesh of data={data} x fsdp={fsdp} needs {data * fsdp} devices, "
            f"but there are {len(devices)}."
        )
    grid = np.array(devices[: data * fsdp]).reshape(data, fsdp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def place(tree, shardings):
    """Places arrays of the host, equal in every process, on the devices.

    `shardings` is one sharding for all arrays, or a tree of them.
    """

    def put(a, sharding):
        return jax.make_array_from_callback(
            np.shape(a), sharding, lambda index: np.asarray(a)[index]
        )

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda a: put(a, shardings), tree)
    return jax.tree.map(put, tree, shardings)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a step is spread over the devices. Recipes know no more of the mesh than this.

    Attributes:
      mesh: from `make_mesh`.
      accumulation: number of pieces into which each device cuts its share of the batch; they are
        computed one after another, and their gradients are averaged.
    """

    mesh: Mesh
    accumulation: int = 1

    def check_batch(self, name: str, batch_size: int):
        """Checks that a batch can be split evenly.

        Raises:
          ValueError: it cannot; the message calls the batch size `name`.
        """
        n = self.mesh.size * self.accumulation
        if batch_size % n or batch_size < 1:
            below = batch_size // n * n
            choices = f"{below} or {below + n}" if below > 0 else f"{n}"
            parts = f"{self.mesh.size} devices"
            if self.accumulation > 1:
                parts += f" x {self.accumulation} accumulation steps"
            raise ValueError(f"{name} {batch_size} is not divisible by {parts}; use {choices}.")

    def split(self, tree):
        """Constrains the arrays of `tree` to be split along their first axis.

        Random arrays must pass through here; otherwise every device would draw all of them.

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
        """Returns a sharding for each leaf.

        The largest axis that `fsdp` divides is split; small arrays are replicated.
        """
        return jax.tree.map(
            lambda leaf: NamedSharding(self.mesh, _spec(self._split_axis(leaf))), tree
        )

    def _split_axis(self, leaf):
        """Returns the axis that is split, or NOT_SPLIT."""
        fsdp = self.mesh.shape["fsdp"]
        axes = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0]
        if fsdp == 1 or leaf.size < MIN_SPLIT or not axes:
            return NOT_SPLIT
        return max(axes, key=lambda i: leaf.shape[i])

    def map(self, function: Callable) -> Callable:
        """Returns `function(params, batch) -> batch`, applied by each device to its share."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=(P(), P(AXES)), out_specs=P(AXES))

    def in_batches(self, name: str, function: Callable, batch_size: int) -> Callable:
        """Makes `(params, arrays [N, ...]) -> arrays [N, ...]`, numpy, for any N.

        It runs one program on batches of `batch_size`; the last batch is filled up from the
        beginning. All processes of the mesh call it with the same arrays.

        Args:
          name: what the error calls the batch size.
          function: `(params, batch) -> batch`.
          batch_size: rows at once, over all devices.

        Raises:
          ValueError: the devices cannot share such a batch.
        """
        self.check_batch(name, batch_size)
        # The result is replicated, so that every process has all of it.
        program = jax.jit(self.map(function), out_shardings=self.replicated)

        def run(params, arrays):
            count = len(jax.tree.leaves(arrays)[0])

            def run_batch(start):
                rows = np.arange(start, start + batch_size) % count
                batch = jax.tree.map(lambda a: a[rows], arrays)
                return jax.device_get(program(params, place(batch, self.batch_sharding)))

            batches = [run_batch(start) for start in range(0, count, batch_size)]
            return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *batches)

        return run

    def gradients(self, function: Callable) -> Callable:
        """Makes `(trained, frozen, batch) -> (gradients, metrics)`, means over the whole batch.

        The gradients are split as the parameters are.

        Args:
          function: `(trained, frozen, batch) -> (gradients, metrics)` for complete parameters and
            one piece of the batch; gradients have the structure of `trained`, metrics are scalars.
        """

        def mean(trained, frozen, batch):
            axes = jax.tree.map(self._split_axis, (trained, frozen))
            specs = jax.tree.map(_spec, axes)

            @functools.partial(
                jax.shard_map, mesh=self.mesh, in_specs=(*specs, P(AXES)), out_specs=(specs[0], P())
            )
            def mean_of(trained, frozen, batch):
                params = jax.tree.map(_gather, (trained, frozen), axes)

                def of_piece(batch):
                    grads, metrics = function(*params, batch)
                    return jax.tree.map(_scatter, grads, axes[0]), metrics

                grads, metrics = self._mean_of_pieces(of_piece, batch)
                grads = jax.tree.map(self._mean_of_devices, grads, axes[0])
                return grads, jax.lax.pmean(metrics, AXES)

            return mean_of(trained, frozen, batch)

        return mean

    def _mean_of_pieces(self, function, batch):
        if self.accumulation == 1:
            return function(batch)
        pieces = jax.tree.map(lambda a: a.reshape(self.accumulation, -1, *a.shape[1:]), batch)
        shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], pieces))
        zeros = jax.tree.map(
            lambda a: jax.lax.pcast(jnp.zeros(a.shape, a.dtype), AXES, to="varying"), shapes
        )

        def add(total, piece):
            return jax.tree.map(jnp.add, total, function(piece)), None

        total, _ = jax.lax.scan(add, zeros, pieces)
        return jax.tree.map(lambda a: a / self.accumulation, total)

    def _mean_of_devices(self, grad, axis):
        if axis == NOT_SPLIT:
            return jax.lax.pmean(grad, AXES)
        return jax.lax.pmean(grad, "data") / self.mesh.shape["fsdp"]  # `_scatter` summed over fsdp


def _spec(axis):
    return P() if axis == NOT_SPLIT else P(*[None] * axis, "fsdp")


def _gather(a, axis):
    """Gathers `a` and marks it as varying over devices (`pcast`).

    Unmarked, JAX would sum its gradient over all N devices.
    """
    if axis == NOT_SPLIT:
        return jax.lax.pcast(a, AXES, to="varying")
    return jax.lax.pcast(jax.lax.all_gather(a, "fsdp", axis=axis, tiled=True), "data", to="varying")


def _scatter(grad, axis):
    """Sums a gradient over the devices that share the parameter; each keeps its part."""
    grad = grad.astype(jnp.float32)
    if axis == NOT_SPLIT:
        return grad
    return jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True)
