"""The commands of `python -m dmd_jax`: each has parse(argv) -> arguments, and run(arguments)."""

import argparse


def parser(command: str, doc: str) -> argparse.ArgumentParser:
    """Makes the parser of a command, which its module's documentation describes."""
    return argparse.ArgumentParser(
        prog=f"python -m dmd_jax {command}", description=doc.split("\n")[0]
    )


def add_plugins(parser: argparse.ArgumentParser):
    """Adds the flag of commands that open a run, whose config may be somebody else's."""
    parser.add_argument(
        "--plugins",
        action="append",
        default=[],
        help="a package of your own that the run's config may name; may be given several times",
    )
