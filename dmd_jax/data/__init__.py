"""Data sources: images, conditions, pairs, captions."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Source(Protocol):
    """Rows by their numbers, from 0 on.

    A row has arrays by name: "image" [H, W, C] in [-1, 1], "cond" a label or an embedding, or the
    fields of a pair; "text" is a caption. A source may also have a `digest` of its whole content,
    and the `texts` of its rows.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def digest(source: Source) -> str | None:
    """Returns the digest of a source's whole content; None if the source does not have one."""
    return getattr(source, "digest", None)


def texts(source: Source) -> Sequence[str] | None:
    """Returns the texts of a source's rows; None if the source has none."""
    return getattr(source, "texts", None)
