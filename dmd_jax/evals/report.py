"""The picture and the table of an evaluation."""

import os
import re
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

from dmd_jax.data import pixels
from dmd_jax.evals import result as result_lib


def table(result: result_lib.Result, teacher: str, student: str) -> str:
    """Returns the scores and the costs as a table of text, a row a set of images."""
    names = list(result.row(student).scores)
    rows = [("", "NFE", "ms/image", "s of its stage", *names)]
    if result.real:
        rows.append(("real images", "", "", "", *_cells(result.real, names)))
    rows += [(row.name, *_costs(row), *_cells(row.scores, names)) for row in result.rows]
    straightness = [
        f"straightness of {name}: {value:.4f}" for name, value in result.straightness.items()
    ]
    faster = (
        f"{student} is {result.speedup(teacher, student):.1f} times faster per image than "
        f"{teacher} ({result.device})"
    )
    return "\n".join([aligned(rows), *straightness, faster])


def scores_table(result: result_lib.Result) -> str:
    """Returns the scores alone as a table of text, a column a set of images."""
    names = list(result.rows[0].scores)
    columns = [("", *names), *((row.name, *_cells(row.scores, names)) for row in result.rows)]
    if result.real:
        columns.append(("real images", *_cells(result.real, names)))
    return aligned(list(zip(*columns, strict=True)))


def value_of(scores: Mapping[str, float], name: str) -> float | None:
    """Returns the score of that name; names of real images' scores have no number of images."""
    return scores.get(name, scores.get(re.sub(r"-\d+$", "", name)))


def _cells(scores, names):
    values = [value_of(scores, name) for name in names]
    return ["" if value is None else f"{value:.3f}" for value in values]


def draw(
    path: str | os.PathLike,
    result: result_lib.Result,
    images: Mapping[str, np.ndarray],
    curves: Mapping[str, Sequence[dict]],
    losses: Mapping[str, Sequence[str]],
    *,
    teacher: str,
    student: str,
):
    """Draws images of both models from the same noise, the scores, and losses and scores over time.

    Args:
      path: of the PNG file.
      result: of the evaluation.
      images: of each model, [N, H, W, C]; the first 100 are shown.
      curves: the rows of each model's metrics.jsonl.
      losses: names of the metrics of each model that are drawn.
      teacher: name of a model.
      student: name of a model.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    text = table(result, teacher, student)
    height = 0.2 * (text.count("\n") + 2)
    figure = pyplot.figure(figsize=(14, 11 + height), layout="constrained")
    axes = figure.subplot_mosaic(
        [["a", "a", "b", "b"], ["c", "d", "e", "f"], ["t"] * 4], height_ratios=[7.3, 3.5, height]
    )
    for key, name in (("a", teacher), ("b", student)):
        axes[key].imshow(pixels.grid(images[name][:100]))
        axes[key].set_title(_title(result.row(name)))
        axes[key].axis("off")
    _plot(axes["c"], curves[teacher], losses[teacher], f"{teacher}: loss")
    _plot(axes["d"], curves[student], losses[student], f"{student}: losses")
    names = dict.fromkeys(name for row in curves[student] for name in row)
    distances = [name for name in names if name.startswith(("FID", "FD-"))]
    others = [name for name in names if name.startswith(("precision", "recall", "agreement"))]
    _plot(axes["e"], curves[student], distances, f"{student}: distance in training")
    _plot(axes["f"], curves[student], others, f"{student}: scores in training")
    axes["e"].set_yscale("log")
    axes["t"].axis("off")
    axes["t"].text(
        0, 1, text, family="monospace", va="top", fontsize=min(11, 1400 / text.index("\n"))
    )
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def draw_captions(path: str | os.PathLike, captioned: dict, credit: str, columns: int = 10):
    """Draws the real image and every model's under one another, for some prompts of each kind.

    Args:
      path: of the PNG file.
      captioned: {model: {kind of prompt: (texts N, real images [N, H, W, C], images [N, H, W,
        C])}}.
      credit: of the real images.
      columns: prompts of a row; there are two rows of each kind.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = next(iter(captioned.values()))
    rows = len(captioned) + 1
    figure, axes = pyplot.subplots(
        2 * rows * len(kinds),
        columns,
        figsize=(1.3 * columns, 2.9 * rows * len(kinds)),
        squeeze=False,
    )
    for top, (kind, (texts, real, _)) in enumerate(kinds.items()):
        chosen = np.linspace(0, len(texts) - 1, 2 * columns).astype(int)
        shown = [("real", real), *((name, models[kind][2]) for name, models in captioned.items())]
        for place, i in enumerate(chosen):
            for k, (name, images) in enumerate(shown):
                ax = axes[(2 * top + place // columns) * rows + k, place % columns]
                ax.imshow(pixels.to_uint8(images[i]), interpolation="nearest")
                ax.set_xticks([])
                ax.set_yticks([])
                if k == 0:
                    ax.set_title("\n".join(textwrap.wrap(texts[i], 16)[:2]), fontsize=8)
                if place % columns == 0:
                    ax.set_ylabel(f"{name}\n({kind})", fontsize=8)
    figure.text(0.5, 0.005, credit, ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.01, 1, 1))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _title(row):
    calls = "1 network call" if row.nfe == 1 else f"{row.nfe:.0f} network calls"
    return f"{row.name}, {calls}, {1e3 * row.seconds_per_image:.3f} ms an image"


def _costs(row):
    seconds = f"{row.training_seconds:.0f}" if row.training_seconds else ""
    return f"{row.nfe:.0f}", f"{1e3 * row.seconds_per_image:.3f}", seconds


def _plot(ax, rows, names, title):
    for name in names:
        points = np.array([(row["step"], row[name]) for row in rows if name in row])
        if len(points):
            ax.plot(*points.T, label=name)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step")
    if ax.lines and (len(names) > 1 or names[0] not in title):
        ax.legend(fontsize=8)
    ax.set_visible(bool(ax.lines))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lays out a table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join((first.ljust(widths[0]), *map(str.rjust, cells, widths[1:]))).rstrip()
        for first, *cells in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Lays out a table for a Markdown page."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join(['---'] * len(rows[0]))} |", *lines[1:]])
