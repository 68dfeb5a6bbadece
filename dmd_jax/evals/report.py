"""The picture and the table of an evaluation."""

import os
import re
import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np

from dmd_jax.data import pixels


def table(result: dict, teacher: str, student: str) -> str:
    """The scores as a table of text, a row a set of images."""
    scores = result["scores"]
    names = list(scores[student])
    rows = [("", "NFE", "ms/image", "s of its stage", *names)]
    for name in ("real", *result["nfe"]):
        if name in scores:
            label, cost = (
                ("real images", ("", "", "")) if name == "real" else (name, _costs(name, result))
            )
            rows.append((label, *cost, *_cells(scores[name], names)))
    straightness = [
        f"straightness of {name}: {value:.4f}" for name, value in result["straightness"].items()
    ]
    return (
        "\n".join([aligned(rows), *straightness])
        + f"\n{student} is {result['speedup']:.1f} times faster per image than {teacher} ({result['device']})"
    )


def scores_table(scores: dict[str, dict[str, float]]) -> str:
    """Scores of sets of images as a table of text, a column a set."""
    names = list(next(iter(scores.values())))
    columns = [("", *names), *((label, *_cells(of, names)) for label, of in scores.items())]
    return aligned(list(zip(*columns, strict=True)))


def value_of(scores: dict[str, float], name: str) -> float | None:
    """The score of that name; those of real images have no number of images in their names."""
    return scores.get(name, scores.get(re.sub(r"-\d+$", "", name)))


def _cells(scores, names):
    return ["" if (value := value_of(scores, name)) is None else f"{value:.3f}" for name in names]


def draw(
    path: str | os.PathLike,
    result: dict,
    images: dict,
    curves: dict,
    losses: dict,
    *,
    teacher: str,
    student: str,
):
    """Draws images of both models from the same noise, the scores, and losses and scores over time.

    Args:
      path: of the PNG file.
      result: what evaluation.json holds.
      images: of each model, [N, H, W, C]; the first 100 are shown.
      curves: rows of each model's metrics.jsonl.
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
        axes[key].set_title(
            f"{_describe(name, result)}, {1e3 * result['seconds_per_image'][name]:.3f} ms an image"
        )
        axes[key].axis("off")
    _plot(axes["c"], curves[teacher], losses[teacher], f"{teacher}: loss")
    _plot(axes["d"], curves[student], losses[student], f"{student}: losses")
    scored = next(
        (
            list(row)
            for row in curves[student]
            if any(name.startswith(("FID", "FD-")) for name in row)
        ),
        [],
    )
    _plot(
        axes["e"],
        curves[student],
        [name for name in scored if name.startswith(("FID", "FD-"))],
        f"{student}: distance in training",
    )
    shown = [name for name in scored if name.startswith(("precision", "recall", "agreement"))]
    _plot(axes["f"], curves[student], shown, f"{student}: scores in training")
    axes["e"].set_yscale("log")
    axes["t"].axis("off")
    axes["t"].text(
        0, 1, text, family="monospace", va="top", fontsize=min(11, 1400 / text.index("\n"))
    )
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def draw_captions(path: str | os.PathLike, captioned: dict, credit: str, columns: int = 10):
    """For some prompts of each kind the real image and every model's, under one another.

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


def _describe(name, result):
    nfe = result["nfe"][name]
    return f"{name}, {nfe:.0f} network call{'s' * (nfe > 1)}"


def _costs(name, result):
    seconds = result["training_seconds"][result["models"][name]["stage"]]
    return (
        f"{result['nfe'][name]:.0f}",
        f"{1e3 * result['seconds_per_image'][name]:.3f}",
        f"{seconds:.0f}" if seconds else "",
    )


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
    """For a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join((first.ljust(widths[0]), *map(str.rjust, cells, widths[1:]))).rstrip()
        for first, *cells in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """For a page."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join(['---'] * len(rows[0]))} |", *lines[1:]])
