"""Text encoders. Each file but `tokenizer` has `make(parallel, ...) -> Encoder`."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple


class Encoder(NamedTuple):
    """A text encoder. The prompt "" is the null condition of guidance.

    Attributes:
      encode: N prompts, a list of str, to float32 [N, L, D], numpy.
      shape: (L, D).
      digest: of everything that the embeddings follow from: parameters, vocabulary, settings.
      truncated: prompts to the indices of those that are longer than L tokens, which `encode` cuts.
    """

    encode: Callable
    shape: tuple[int, int]
    digest: str
    truncated: Callable


def digest(everything: str) -> str:
    """Returns a fingerprint of a text."""
    return hashlib.sha256(everything.encode()).hexdigest()[:16]
