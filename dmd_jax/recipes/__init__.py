"""Training methods. Each file has `make(denoiser, parallel, *, seed, ...) -> Recipe`."""

from collections.abc import Callable
from typing import NamedTuple


class Recipe(NamedTuple):
    """A method as pure functions.

    Attributes:
      init: `params -> TrainState`, from the initial or the teacher's parameters.
      train_step: `(state, batch) -> (state, metrics)`; metrics are scalars.
    """

    init: Callable
    train_step: Callable
