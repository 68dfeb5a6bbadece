"""Training methods. Each file has `make(denoiser, parallel, *, seed, ...) -> Recipe`."""

from collections.abc import Callable
from typing import NamedTuple


class Recipe(NamedTuple):
    """A method as pure functions.

    Attributes:
      init: `(params, others) -> TrainState`, from the initial or the teacher's parameters and from `others`.
      train_step: `(state, batch) -> (state, metrics)`; metrics are scalars.
      others: parameters of further networks, such as a distance; None if there are none.
    """

    init: Callable
    train_step: Callable
    others: dict | None = None
