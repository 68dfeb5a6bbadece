"""What a training run carries from step to step. There is no random state: every key is a function of (seed, step)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Net:
    """A network in training.

    Attributes:
      params: nested dict of float32 arrays.
      opt_state: of the optimizer.
      ema: the running mean of `params`; None if none is kept.
      skipped: int32 count of updates that were left out because a gradient was not finite.
    """

    params: dict
    opt_state: Any
    ema: dict | None
    skipped: jax.Array

    @property
    def weights(self) -> dict:
        """What images are made with: the running mean, or the parameters themselves where none is kept."""
        return self.params if self.ema is None else self.ema


@struct.dataclass
class TrainState:
    """Roles that a method does not use are None.

    Attributes:
      step: int32, the number of steps done.
      generator: the network that a run is about.
      fake_score: the denoiser of generated images (DMD).
      frozen: parameters that no step changes, such as the teacher's; a checkpoint leaves them out.
    """

    step: jax.Array
    generator: Net
    fake_score: Net | None = None
    frozen: dict | None = None


def create(params: dict, tx, *, ema: bool) -> Net:
    """A network about to be trained, in buffers of its own: `params` may be used elsewhere, and states are donated."""
    params = jax.tree.map(jnp.array, params)
    return Net(
        params,
        tx.init(params),
        jax.tree.map(jnp.array, params) if ema else None,
        jnp.zeros((), jnp.int32),
    )
