"""Times an image by the teacher and by the student, always in the same way.

python -m dmd_jax latency --workdir=/data/coco --out=latency.json
python -m dmd_jax latency --model=student --teacher_model=stable-diffusion-v1-5 --dtype=bfloat16

Text encoder, network and decoder are timed, each alone and all together, from what is on the host
to what is there again; the noise is drawn before. The first call of every shape compiles and does
not count; then the median of some runs counts, the models in turn. Batch 1, on one device, gives
milliseconds an image. Then the batch size is raised, on as many devices as divide it, until two
sizes in a row are no faster per image, or memory runs out; the best gives images per second.
"""

import argparse
import functools
import os
import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dmd_jax import commands, generate
from dmd_jax.evals import report
from dmd_jax.experiment import build as build_lib
from dmd_jax.experiment import model as model_lib
from dmd_jax.experiment import workdir
from dmd_jax.runtime import storage, timing

PROMPT = "a photograph of an astronaut riding a horse"  # any: each is as long as the encoder reads
BATCH_SIZES = ",".join(str(2**i) for i in range(11))
TEXT, NETWORK, DECODER, TOGETHER = "text", "network", "decoder", "together"


class Row(NamedTuple):
    """One model at one batch size.

    Attributes:
      model: its name.
      batch_size: images.
      seconds: of the runs of each part.
    """

    model: str
    batch_size: int
    seconds: Mapping[str, Sequence[float]]

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds an image of each part, the median."""
        return {
            part: 1e3 * statistics.median(seconds) / self.batch_size
            for part, seconds in self.seconds.items()
        }

    @property
    def whole(self) -> float:
        """Milliseconds an image of all parts together."""
        return self.ms.get(TOGETHER, self.ms[NETWORK])


def parts(model: model_lib.Model, batch_size: int, *, decodes: bool) -> dict[str, Callable]:
    """Returns the parts of making images, as functions that end when their result is on the host.

    Args:
      model: made for this batch size.
      batch_size: images.
      decodes: whether there is something between latents and images.

    Returns:
      "text" and "decoder" where there are such, "network", and "together" where that is more than
      the network.
    """
    texts, encode = [PROMPT] * batch_size, model.encoder and model.encoder.encode
    cond = (
        encode(texts)
        if encode
        else np.arange(batch_size, dtype=np.int32) % max(model.num_classes, 1)
    )
    inputs = generate.inputs(0, range(batch_size), model.shape, [{"cond": row} for row in cond])
    draw = functools.partial(model.sample, model.params)
    latents = draw(inputs)
    found = {TEXT: lambda: encode(texts)} if encode else {}
    found[NETWORK] = lambda: draw(inputs)
    if decodes:
        found[DECODER] = lambda: model.decode(latents)
    if len(found) > 1:
        found[TOGETHER] = lambda: model.decode(
            draw(inputs | {"cond": encode(texts)} if encode else inputs)
        )
    return found


def search(
    builders: Mapping[str, Callable], batch_sizes: Sequence[int], repeats: int
) -> tuple[list[Row], dict[str, str]]:
    """Times models in turn, at growing batch sizes.

    Args:
      builders: of each model, `batch_size -> parts`.
      batch_sizes: growing.
      repeats: runs that are timed, after one that is not.

    Returns:
      The rows, and why those of each model end.

    Raises:
      ValueError: not even the first batch fits the memory.
    """
    rows, ends, took = [], {}, {name: [] for name in builders}
    for batch_size in batch_sizes:
        ready = {
            name: _built(build, batch_size, bool(rows))
            for name, build in builders.items()
            if name not in ends
        }
        ends |= {
            name: f"memory is short at batch {batch_size}"
            for name, found in ready.items()
            if not found
        }
        if ends and not rows:
            raise ValueError(
                "; ".join(f"{name}: {end}" for name, end in ends.items())
                + "; give --dtype=bfloat16, or a larger device."
            )
        for row in measure(
            {name: found for name, found in ready.items() if found}, batch_size, repeats
        ):
            rows.append(row)
            took[row.model].append(row.whole)
            if min(took[row.model][-2:]) >= min(took[row.model][:-2], default=float("inf")):
                ends[row.model] = f"up to batch {batch_size} it gets no faster"
    return rows, {
        name: ends.get(name, f"batch {batch_sizes[-1]} is the last that was asked for")
        for name in builders
    }


def measure(
    ready: Mapping[str, Mapping[str, Callable]], batch_size: int, repeats: int
) -> list[Row]:
    """Times the parts of models, which have been called before, `repeats` times in turn."""
    names = [
        (name, part)
        for part in (TEXT, NETWORK, DECODER, TOGETHER)
        for name in ready
        if part in ready[name]
    ]
    seconds = dict(
        zip(
            names, timing.in_turn([ready[name][part] for name, part in names], repeats), strict=True
        )
    )
    return [
        Row(name, batch_size, {part: seconds[name, part] for part in found})
        for name, found in ready.items()
    ]


def _built(build, batch_size, later):
    """The parts, each called once; None where memory is short."""
    try:
        if later and _would_not_fit():
            return None
        found = build(batch_size)
        for part in found.values():
            part()
        return found
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise


def _would_not_fit():
    """Returns whether twice the peak of memory is more than the host has.

    Linux would end the process without a word.
    """
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        jax.default_backend() == "cpu"
        and 2 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > size
    )


def summary(rows: Sequence[Row], teacher: str, student: str) -> dict:
    """Batch 1, and of each model the batch where all parts together are fastest.

    Returns:
      {"batch 1" or "best": {"batch_size": {model: n}, "ms": {model: {part: an image}},
      "images_per_second": {model: of all parts}, "ratio": {"together" or "network": the teacher's
      ms over the student's}}}
    """
    of = {name: [row for row in rows if row.model == name] for name in (teacher, student)}
    chosen = {
        "batch 1": [of[name][0] for name in of],
        "best": [min(of[name], key=lambda row: row.whole) for name in of],
    }
    return {
        key: {
            "batch_size": {row.model: row.batch_size for row in found},
            "ms": {row.model: row.ms for row in found},
            "images_per_second": {row.model: 1e3 / row.whole for row in found},
            "ratio": {
                TOGETHER: found[0].whole / found[1].whole,
                NETWORK: found[0].ms[NETWORK] / found[1].ms[NETWORK],
            },
        }
        for key, found in chosen.items()
    }


def table(result: dict) -> str:
    """What `compare` has found, as text."""
    rows, (teacher, student) = [Row(**row) for row in result["rows"]], result["models"]
    columns = [
        part
        for part in (TEXT, NETWORK, DECODER, TOGETHER)
        if any(part in row.seconds for row in rows)
    ]
    lines = [("ms an image", "NFE", "batch", *columns, "images/s")]
    for row in rows:
        nfe, scale = result["models"][row.model]["nfe"], 1e3 / row.batch_size
        cells = [
            timing.spread([scale * s for s in row.seconds[part]]) if part in row.seconds else ""
            for part in columns
        ]
        lines.append(
            (
                row.model,
                "varies" if nfe is None else str(nfe),
                str(row.batch_size),
                *cells,
                f"{1e3 / row.whole:.2f}",
            )
        )
    told = [report.aligned(lines)]
    told += [f"{name}: {end}" for name, end in result["ends"].items()]
    for key, name in (("batch 1", "batch 1"), ("best", "best batches, {} and {}")):
        ratio, sizes = result[key]["ratio"], result[key]["batch_size"]
        alone = f"; the network alone {ratio[NETWORK]:.1f} times" if TOGETHER in columns else ""
        told.append(
            f"{name.format(sizes[teacher], sizes[student])}: {student} is {ratio[TOGETHER]:.1f} "
            f"times as fast as {teacher}{alone}"
        )
    return "\n".join(told)


def compare(found: Mapping[str, model_lib.Found], batch_sizes: Sequence[int], repeats: int) -> dict:
    """The protocol, for a teacher and a student by name, in this order: what --out writes.

    Raises:
      ValueError: their images have not the same shape, or not even the first batch fits the memory.
    """
    shapes = {name: model.image_shape for name, model in found.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "the images have the shapes "
            f"{', '.join(f'{s} ({name})' for name, s in shapes.items())}; expected the same."
        )

    def builder(model):
        return lambda batch_size: parts(
            model_lib.make_model(model, batch_size),
            batch_size,
            decodes=model.image_shape != model.stage.image_shape,
        )

    rows, ends = search(
        {name: builder(model) for name, model in found.items()}, batch_sizes, repeats
    )
    return {
        "device": {"count": jax.device_count(), "kind": jax.devices()[0].device_kind},
        "jax": jax.__version__,
        "resolution": shapes[rows[0].model][:2],
        "repeats": repeats,
        "models": {
            name: {
                "dtype": model.stage.model.network["dtype"],
                "sampler": model.sampler,
                "nfe": _nfe(model),
            }
            for name, model in found.items()
        },
        "rows": [row._asdict() for row in rows],
        "ends": ends,
        **summary(rows, *found),
    }


def _nfe(found):
    """Network calls for an image; None where each has its own number."""
    # Of which no null condition is asked, and which does not change the number.
    settings = found.sampler | {"guidance_scale": 1.0}
    return build_lib.guided_sampler(found.stage.denoiser, settings, None, "sampler").nfe


def find(arguments: argparse.Namespace) -> dict[str, model_lib.Found]:
    """The teacher and the student that the command line names.

    Raises:
      ValueError: it does not, or there are no such.
    """
    stages = arguments.teacher, arguments.student
    if arguments.workdir and not (arguments.model or arguments.teacher_model):
        evaluation = workdir.read_run(storage.absolute(arguments.workdir)).evaluation
        if evaluation is None and not all(stages):
            raise ValueError("the run has no evaluation; name --teacher and --student.")
        stages = [
            given or getattr(evaluation.settings, role)
            for given, role in zip(stages, ("teacher", "student"), strict=True)
        ]
        if stages[0] == stages[1]:
            raise ValueError(f"teacher and student are both {stages[0]}; expected two stages.")
        return {
            stage: model_lib.find(arguments.workdir, stage=stage, dtype=arguments.dtype)
            for stage in stages
        }
    if arguments.workdir or any(stages) or not (arguments.model and arguments.teacher_model):
        raise ValueError(
            "expected either --workdir, and --teacher and --student if wanted, or --model and "
            "--teacher_model."
        )
    paths = {"teacher": arguments.teacher_model, "student": arguments.model}
    return {name: model_lib.find(path, dtype=arguments.dtype) for name, path in paths.items()}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = commands.parser("latency", __doc__)
    parser.add_argument("--workdir", default="", help="directory of a run")
    of_run = "a stage of the run; the evaluation's if not given"
    parser.add_argument("--teacher", default="", help=of_run)
    parser.add_argument("--student", default="", help=of_run)
    parser.add_argument("--model", default="", help="the diffusers directory of the student")
    parser.add_argument(
        "--teacher_model", default="", help="the diffusers directory of its teacher"
    )
    parser.add_argument("--batch_sizes", default=BATCH_SIZES, help="growing, from 1 on")
    parser.add_argument("--repeats", type=int, default=5, help="runs that are timed")
    parser.add_argument(
        "--dtype", default="", choices=["", "float32", "bfloat16"], help="of the networks"
    )
    parser.add_argument("--out", default="", help="a JSON file to be written")
    commands.add_plugins(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace):
    """Prints the table, and writes the file if one is named."""
    batch_sizes = [int(n) if n.strip().isdecimal() else 0 for n in arguments.batch_sizes.split(",")]
    if batch_sizes[0] != 1 or batch_sizes != sorted(set(batch_sizes)):
        raise ValueError(
            f"--batch_sizes is {arguments.batch_sizes}; expected growing numbers from 1 on, such "
            "as 1,2,4,8."
        )
    if arguments.repeats < 1:
        raise ValueError(f"--repeats is {arguments.repeats}; expected at least 1.")
    if arguments.out and not storage.has_parent(arguments.out):
        raise ValueError(f"--out is {arguments.out}; expected a file in a directory that exists.")
    found = find(arguments)
    print(timing.devices(), flush=True)
    result = compare(found, batch_sizes, arguments.repeats)
    dtypes = ", ".join(dict.fromkeys(model["dtype"] for model in result["models"].values()))
    print(
        f"{'x'.join(map(str, result['resolution']))} pixels, {dtypes}; medians (least to most) of "
        f"{arguments.repeats} runs"
    )
    print(table(result))
    if arguments.out:
        storage.write_json(storage.path(arguments.out), result)
