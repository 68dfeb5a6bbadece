"""Compares runs: a table of their scores, and a picture of their images from the same noise.

python -m dmd_jax compare /tmp/digits /tmp/without_matching --out=compare.png
python -m dmd_jax compare "both=/tmp/full-*" "no matching=/tmp/no_matching-*" --markdown --out=

A row is a model: every teacher once, and the student of each run. NAME=DIRECTORY names a row.
NAME=PATTERN puts several runs into one row, such as those of other seeds: the table has their mean
and standard deviation, the picture the first of them. Runs are refused where their scores do not
mean the same.
"""

import argparse
import functools
import itertools
import json
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np

from dmd_jax import commands, generate
from dmd_jax.data import pixels as pixels_lib
from dmd_jax.evals import report
from dmd_jax.evals import result as result_lib
from dmd_jax.experiment import build, workdir
from dmd_jax.experiment import evaluation as evaluation_lib
from dmd_jax.experiment import model as model_lib
from dmd_jax.runtime import storage

WILD = "*?["  # in a pattern
PROTOCOL = (
    "name",
    "count",
    "ranges",
    "quantisation",
    "crop_to",
    "neighbours",
    "clip",
    "prefix",
    "diversity",
)
# What scores in one column have in common, by its place in evaluation.json.
SAME = (
    *(("asked", "protocol", key) for key in PROTOCOL),
    ("asked", "conditions"),
    ("asked", "seed"),
    ("asked", "extras", "retrieval"),
    ("networks",),
    ("reference", "count"),
    ("reference", "digest"),
)


class Run(NamedTuple):
    """A finished run.

    Attributes:
      path: its directory.
      evaluation: its first stage that evaluates.
      result: what that has written.
    """

    path: storage.Path
    evaluation: build.Stage
    result: result_lib.Result


class Row(NamedTuple):
    """A model of one or of several runs.

    Attributes:
      name: of the row.
      role: "teacher" or "student".
      runs: at least one.
    """

    name: str
    role: str
    runs: Sequence[Run]

    def stage(self, run: Run) -> str:
        """The name of the stage that is the row's model in a run."""
        return getattr(run.evaluation.settings, self.role)

    @property
    def results(self) -> list[result_lib.Row]:
        """The results of the model, one for each run."""
        return [run.result.row(self.stage(run)) for run in self.runs]


def open_run(path: storage.Path) -> Run:
    """The run of that directory.

    Raises:
      ValueError: it is none, or not evaluated.
    """
    evaluation = workdir.read_run(path).evaluation
    if evaluation is None:
        raise ValueError(f"{path} has no stage that evaluates; add one to its config.")
    file = path / evaluation.name / "evaluation.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist; let the run come to its evaluation first.")
    result = result_lib.read(file)
    roles = {evaluation.settings.teacher, evaluation.settings.student}
    whole = {row.name for row in result.rows if row.scores and row.nfe and row.seconds_per_image}
    missing = sorted(roles - whole) + ([] if "versions" in result.asked else ["versions"])
    if missing:
        raise ValueError(
            f"{file} has no {', '.join(missing)}, which the config asks for; evaluate the "
            "run again."
        )
    return Run(path, evaluation, result)


def matching(pattern: str) -> list[storage.Path]:
    """Returns the directories of runs that match a pattern, in order.

    A pattern without wildcards stands for itself.

    Raises:
      ValueError: there are none.
    """
    parts = pattern.rstrip("/").split("/")
    first = next((i for i, part in enumerate(parts) if set(part) & set(WILD)), None)
    if first is None:
        return [storage.absolute(pattern)]
    root = storage.absolute("/".join(parts[:first]) or ("/" if first else "."))
    found = sorted(
        path for path in root.glob("/".join(parts[first:])) if (path / "config.json").exists()
    )
    if not found:
        raise ValueError(f"no run's directory matches {pattern}; quote the pattern, and check it.")
    return found


def open_rows(arguments: Sequence[str]) -> list[Row]:
    """The rows of directories, or of NAME=PATTERN: every teacher once, then the students.

    Raises:
      ValueError: a run is missing or not evaluated, two rows have one name, or scores do not mean
        the same.
    """
    groups = {}
    for argument in arguments:
        name, equals, pattern = argument.partition("=")
        if not equals or "/" in name:
            name, pattern = storage.absolute(argument).name, argument
        if not name:
            raise ValueError(f"{argument} has no name before its =; expected NAME=DIRECTORY.")
        if name in groups:
            raise ValueError(f"two rows are named {name}; name them, such as other={pattern}.")
        groups[name] = [open_run(path) for path in matching(pattern)]
    refuse_unlike([run for runs in groups.values() for run in runs])
    teachers = {}
    for name, runs in groups.items():
        if any(_distils(run) for run in runs):
            teachers.setdefault(frozenset(map(_identity, runs)), (name, runs))
    named = [
        ("teacher" if len(teachers) == 1 else f"teacher of {name}", runs)
        for name, runs in teachers.values()
    ]
    return [Row(name, "teacher", runs) for name, runs in named] + [
        Row(name, "student", runs) for name, runs in groups.items()
    ]


def refuse_unlike(runs: Sequence[Run]):
    """Checks that the scores of all runs mean the same.

    Raises:
      ValueError: those of some runs do not compare with those of the first one; says why.
    """
    told = []
    first = _meaning(runs[0])
    for run in runs[1:]:
        other = _meaning(run)
        values = [
            f"{name} ({_short(first[name])}, {_short(other[name])})"
            for name in first
            if first[name] != other[name]
        ]
        if values:
            told.append(f"{runs[0].path} and {run.path} differ in {', '.join(values)}")
    if told:
        raise ValueError(
            f"scores that do not mean the same: {'; '.join(told)}. Compare runs of one protocol, "
            "or evaluate them by one."
        )


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Returns the cells of the table, its header first.

    The columns are scores, network calls, milliseconds an image and seconds of training; several
    runs in one row have their means.

    The row "real images" is of real ones, measured as if they were generated.
    """
    several = any(len(row.runs) > 1 for row in rows)
    real = [run.result.real for run in rows[-1].runs]
    names = list(dict.fromkeys(n for row in rows for model in row.results for n in model.scores))
    first = "mean (standard deviation)" if several else ""
    lines = [(first, *names, "NFE", "ms an image", "s of training")]
    if any(real):
        floors = [_mean([report.value_of(scores, name) for scores in real], 3) for name in names]
        lines.append(("real images", *floors, "", "", ""))
    for row in rows:
        models = row.results
        lines.append(
            (
                f"{row.name}, {len(models)} runs" if len(models) > 1 else row.name,
                *(_mean([model.scores.get(name) for model in models], 3) for name in names),
                f"{np.mean([model.nfe for model in models]):.0f}",
                _mean([1e3 * model.seconds_per_image for model in models], 3),
                _mean([model.training_seconds for model in models], 0),
            )
        )
    return lines


def sampled(rows: Sequence[Row], count: int, batch_size: int) -> tuple[list, list[np.ndarray]]:
    """Makes images with each row's first run, from the noise and conditions of evaluations.

    Args:
      rows: the models.
      count: images of each.
      batch_size: images at once.

    Returns:
      The texts or the labels, and of each row the images [count, H, W, C] in [-1, 1].

    Raises:
      ValueError: the models have not the same shapes and conditions, or one has changed since its
        evaluation.
    """
    found = [_find(row) for row in rows]
    kinds = [
        (
            model.stage.image_shape,
            model.image_shape,
            "texts" if model.stage.run.text else model.stage.num_classes,
        )
        for model in found
    ]
    for row, kind in zip(rows, kinds, strict=True):
        if kind != kinds[0]:
            told = " and ".join(
                f"{shape} of noise, {image_shape} of images, labels {labels}"
                for shape, image_shape, labels in (kinds[0], kind)
            )
            raise ValueError(
                f"{rows[0].name} and {row.name} cannot stand in one picture: shapes {told}; leave "
                "one out, or give --out=."
            )
    conditions = _conditions(rows[0].runs[0], found[0], count)
    shape = found[0].stage.image_shape
    noise = generate.inputs(build.EVALUATION_SEED, range(count), shape, [{"cond": 0}])["z"]
    return conditions, [
        model_lib.make_model(model, batch_size)(conditions, noise=noise) for model in found
    ]


def draw(
    path: storage.Path, rows: Sequence[Row], conditions: Sequence, images: Sequence[np.ndarray]
):
    """The picture: a row a model, a column a condition; see `sampled`."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    side = min(max(images[0].shape[1], 96), 256) / 80  # inches
    size = side * len(conditions) + 2, (side + 0.2) * len(rows) + 0.6
    figure, axes = pyplot.subplots(
        len(rows), len(conditions), figsize=size, squeeze=False, layout="constrained"
    )
    for (k, row), (i, condition) in itertools.product(enumerate(rows), enumerate(conditions)):
        ax, pixels = axes[k, i], pixels_lib.to_uint8(images[k][i])
        ax.imshow(
            pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels, interpolation="nearest"
        )
        ax.set_xticks([])
        ax.set_yticks([])
        if k == 0:
            ax.set_title("\n".join(textwrap.wrap(str(condition), int(12 * side))[:3]), fontsize=8)
        if i == 0:
            ax.set_ylabel(_label(row), rotation=0, ha="right", va="center", fontsize=9)
    with storage.writing(path) as file:
        figure.savefig(file, dpi=80)
    pyplot.close(figure)


def _find(row):
    """The model of the row's first run, as it was evaluated."""
    run = row.runs[0]
    stage = row.stage(run)
    then = run.result.asked["versions"].get(stage)
    now = workdir.content(run.path / stage)
    if then != now:
        raise ValueError(
            f"the evaluation of {run.path} is of {stage} at {then}, which is now at {now}; "
            "evaluate the run again."
        )
    return model_lib.find(str(run.path), stage=stage)


def _conditions(run, model, count):
    """The texts with which the evaluation begins, or labels 0, 1, 2 ..."""
    if not model.stage.run.text:
        return [i % max(model.stage.num_classes, 1) for i in range(count)]
    texts = evaluation_lib.conditions(run.evaluation, run.path).texts
    return [texts[i % len(texts)] for i in range(count)]


def _label(row):
    model = row.results[0]
    name, value = next(iter(model.scores.items()))
    lines = textwrap.wrap(row.name, 20)
    return "\n".join((*lines, f"NFE {model.nfe:.0f}", f"{name} {value:.3f}"))


def _distils(run):
    """Whether the teacher and the student of a run are two models."""
    settings = run.evaluation.settings
    return settings.teacher != settings.student


def _identity(run):
    """What tells one teacher from another."""
    teacher = run.evaluation.stages[run.evaluation.settings.teacher]
    version = run.result.asked["versions"].get(teacher.name) or str(run.path)
    return json.dumps([version, dict(teacher.settings.sampler)], sort_keys=True)


def _meaning(run):
    """Returns what the scores of a run depend on, by names; None for what the run lacks."""
    result = run.result.to_json()
    return {" ".join(keys).removeprefix("asked "): _get(result, keys) for keys in SAME}


def _get(values, keys):
    return functools.reduce(
        lambda found, key: found.get(key) if isinstance(found, dict) else None, keys, values
    )


def _short(value):
    return textwrap.shorten(json.dumps(value), 80, placeholder=" ...")


def _mean(values, digits):
    """With the standard deviation, if there are several; minus nothing is nothing."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    spread = f" ({np.std(values, ddof=1):.{digits}f})" if len(values) > 1 else ""
    mean = f"{np.mean(values):.{digits}f}"
    return (mean if float(mean) else mean.lstrip("-")) + spread


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = commands.parser("compare", __doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        help="directories, NAME=DIRECTORY, or NAME=PATTERN for a row of several runs",
    )
    parser.add_argument("--out", default="compare.png", help="the picture; nothing for none")
    parser.add_argument("--count", type=int, default=8, help="images of each model in the picture")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="images at once, over as many devices as divide it",
    )
    parser.add_argument(
        "--markdown",
        dest="tell",
        action="store_const",
        const=report.markdown,
        default=report.aligned,
        help="the table so",
    )
    commands.add_plugins(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace):
    """Prints the table, and writes the picture."""
    if min(arguments.count, arguments.batch_size) < 1:
        raise ValueError(
            f"--count is {arguments.count} and --batch_size {arguments.batch_size}; expected at "
            "least 1."
        )
    out = arguments.out and storage.path(arguments.out)
    if out and (out.suffix not in (".png", ".jpg", ".webp") or not storage.has_parent(out)):
        raise ValueError(
            f"--out is {out}; expected a .png, .jpg or .webp in a directory that exists, or "
            "nothing."
        )
    rows = open_rows(arguments.runs)
    print(arguments.tell(table(rows)))
    speedups = [
        run.result.speedup(run.evaluation.settings.teacher, row.stage(run))
        for row in rows
        if row.role == "student"
        for run in row.runs
    ]
    print(
        f"\nStudents are {np.mean(speedups):.1f} times as fast per image as their teachers "
        f"({min(speedups):.1f} to {max(speedups):.1f})."
    )
    if out:
        draw(out, rows, *sampled(rows, arguments.count, arguments.batch_size))
        print(out)
