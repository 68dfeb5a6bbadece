"""The state that a training run carries from step to step.

It has no random state: every key is a function of (seed, step).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Net:
    """A network in training.

    Attributes:
      params: nested dict of float32 arrays.
      opt_state: state of the optimizer.
      ema: the running mean of `params`; None if none is kept.
      skipped: int32 count of the updates that were skipped because a gradient was not finite.
    """

    params: dict
    opt_state: Any
    ema: dict | None
    skipped: jax.Array

    @property
    def weights(self) -> dict:
        """The parameters that make images: the running mean, or `params` if none is kept."""
        return self.params if self.ema is None else self.ema


@struct.dataclass
class TrainState:
    """The networks of a method; those that it does not use are None.

    Attributes:
      step: int32 count of the steps done.
      generator: the network that the run trains.
      fake_score: the denoiser of generated images (DMD).
      frozen: parameters that no step changes, such as the teacher's; checkpoints leave them out.
    """

    step: jax.Array
    generator: Net
    fake_score: Net | None = None
    frozen: dict | None = None


def create(params: dict, tx, *, ema: bool) -> Net:
    """Returns a network that no step has trained yet.

    It has buffers of its own, because states are donated and `params` may be used elsewhere.
    """
    params = jax.tree.map(jnp.array, params)
    return Net(
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.array, params) if ema else None,
        skipped=jnp.zeros((), jnp.int32),
    )
