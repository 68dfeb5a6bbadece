"""Commands that use what a run has made; python -m dmd_jax.main makes it.

python -m dmd_jax COMMAND --help
"""

import sys

from dmd_jax import lookup
from dmd_jax.commands import cache, compare, export, latency, personalise, sample, score
from dmd_jax.runtime import compilation_cache

COMMANDS = {  # each has parse(argv) -> arguments, and run(arguments)
    "sample": sample,
    "score": score,
    "compare": compare,
    "latency": latency,
    "export": export,
    "personalise": personalise,
    "cache": cache,
}


def main(argv: list[str] | None = None):
    """Runs one command; an error that users can mend is one line.

    Args:
      argv: the command and its flags; those of the process if not given.
    """
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        hint = lookup.nearest(name, list(COMMANDS))
        sys.exit(f"error: no command {name!r}{hint}; there are: {', '.join(COMMANDS)}.")
    command = COMMANDS[name]
    arguments = command.parse(flags)
    lookup.admit(getattr(arguments, "plugins", ()))
    compilation_cache.keep()
    try:
        command.run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def usage() -> str:
    """Lists the commands, with the first line of each one's documentation."""
    lines = [f"  {name:12} {module.__doc__.splitlines()[0]}" for name, module in COMMANDS.items()]
    return "\n".join(["usage: python -m dmd_jax COMMAND [--help]", "", *lines])


if __name__ == "__main__":
    main()
