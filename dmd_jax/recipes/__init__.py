"""Training methods. Each file has `make(denoiser, parallel, *, seed, ...) -> Recipe`."""

from collections.abc import Callable
from typing import NamedTuple


class Recipe(NamedTuple):
    """A method as pure functions.

    Attributes:
      init: `params -> TrainState`, from the initial or the teacher's parameters.
      train_step: `(state, batch) -> (state, metrics)`; metrics are scalars.
      sample: `(params, z, cond) -> images` for unit Gaussian noise z of the images' shape [B, H, W, C].
      nfe: network calls per image of `sample`.
    """

    init: Callable
    train_step: Callable
    sample: Callable
    nfe: int
