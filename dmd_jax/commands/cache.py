"""Lists the copies of what lies in buckets, and removes those that are named.

python -m dmd_jax cache
python -m dmd_jax cache --remove=gs://bucket/model --remove=all
"""

import argparse
import time

from dmd_jax import commands
from dmd_jax.runtime import storage


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the flags."""
    parser = commands.parser("cache", __doc__)
    parser.add_argument(
        "--remove",
        action="append",
        default=[],
        help="what a copy is of, as it is listed, or all; may be given several times",
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace):
    """Removes what is named, and prints what is there.

    Raises:
      ValueError: there is no such copy, or a process uses it.
    """
    there = storage.copies()
    known = {"all", *(copy.source for copy in there)}
    if unknown := [name for name in arguments.remove if name not in known]:
        raise ValueError(
            f"no copy of {', '.join(unknown)}; there are: {', '.join(sorted(known - {'all'}))}."
        )
    used = [
        copy.source
        for copy in there
        if {"all", copy.source} & set(arguments.remove) and not storage.remove_copy(copy)
    ]
    for copy in storage.copies():
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(copy.used))
        print(f"{copy.size / 1e6:12.1f} MB  {when}  {copy.source}  {copy.path}")
    if used:
        raise ValueError(f"in use by a process, and kept: {', '.join(used)}.")
