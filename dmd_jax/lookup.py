"""Finds the function that a config names: one of this package, or one of the user's own.

In a folder such as `recipes` a name is "file" or "file.function", in a file such as `samplers.py`
it is "function". A file offers what its CHOICES list; without them a file of a folder offers its
function `make`.

Any other name with a dot is that of a module of the user's own. The config of somebody else could
name any function of any package there is, so the user says which packages configs may name.
"""

import difflib
import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable, Iterable

_plugins = set()


def admit(packages: str | Iterable[str]):
    """Lets configs name functions of these packages of the user's own, as long as Python runs."""
    _plugins.update([packages] if isinstance(packages, str) else packages)


def find(package: str, name: str) -> Callable:
    """Returns the function that `name` stands for.

    Args:
      package: a folder of dmd_jax such as "recipes", or a file of it such as "samplers".
      name: in a folder "file.function", or "file" for its function `make`; in a file "function"; in
        the user's own package "my_package.my_module.function", or "my_package.my_module" for its
        function `make`.

    Raises:
      ValueError: there is no such file, module or function, the package is not admitted, or the
        module cannot be imported.
    """
    parent = importlib.import_module(f"dmd_jax.{package}")
    path = f"dmd_jax/{package}"
    first, dot, rest = name.partition(".")
    if not hasattr(parent, "__path__"):  # a file
        path = f"{path}.py"
        if not dot:
            return _function(parent, name, path)
        return _outside(name, f"{path} has: {', '.join(_choices(parent))}.")
    files = [module.name for module in pkgutil.iter_modules(parent.__path__)]
    if first in files:
        module = importlib.import_module(f"dmd_jax.{package}.{first}")
        return _function(module, rest or "make", f"{path}/{first}.py")
    error = f"{path} has no file {first!r}{nearest(first, files)}; there are: {', '.join(files)}."
    if not dot:
        raise ValueError(error)
    return _outside(name, error)


def nearest(name: str, names: list[str]) -> str:
    """Returns a hint at the name that was meant, or nothing."""
    close = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_arguments(make: Callable, arguments: dict, where: str, *first):
    """Checks that `make` takes the `first` arguments by position and `arguments` by name.

    Raises:
      ValueError: it does not; the message calls the arguments `where`.
    """
    try:
        inspect.signature(make).bind(*first, **arguments)
    except TypeError as error:
        raise ValueError(f"{where} does not fit: {error}.") from error


def open_source(settings: dict):
    """Opens the data source `settings["source"]`; the other settings are its arguments.

    Raises:
      ValueError: there is no source of that name, or the arguments do not fit it.
    """
    settings = dict(settings)
    name = settings.pop("source")
    make = find("data", name)
    check_arguments(make, settings, f"the source {name}")
    return make(**settings)


def _outside(name: str, error: str) -> Callable:
    """Finds `name` as a module with a function `make`, or as a function of a module."""
    package = name.partition(".")[0]
    if package not in _plugins:
        raise ValueError(
            f"{name} is of no package that a config may name, and {error} "
            f"If {package} is your own, admit it: plugins=({package!r},) in your config, "
            f"--plugins={package} of a command."
        )
    module = _import(name)
    if module:
        return _function(module, "make", name)
    module_name, _, function = name.rpartition(".")
    module = _import(module_name)
    if module:
        return _function(module, function, f"there is no module {name}, and {module_name}")
    raise ValueError(f"there is no module {name} or {module_name}, and {error}")


def _import(name: str) -> types.ModuleType | None:
    """Imports a module of the user's; returns None if there is none of that name."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # such a module may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            return None
        raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def _function(module: types.ModuleType, name: str, where: str) -> Callable:
    choices = _choices(module)
    if name not in choices:
        names = ", ".join(choices) or "none"
        raise ValueError(f"{where} has no {name!r}{nearest(name, choices)}; there are: {names}.")
    return getattr(module, name)


def _choices(module: types.ModuleType) -> list[str]:
    """Lists the names that a config may use."""
    if hasattr(module, "CHOICES"):
        return list(module.CHOICES)
    if module.__name__.startswith("dmd_jax."):
        return ["make"] if hasattr(module, "make") else []
    return [name for name, value in vars(module).items() if _is_public(module, name, value)]


def _is_public(module, name, value):
    """Tells whether `value` is a function, jitted or not, that `module` defines and shows."""
    if name.startswith("_") or inspect.isclass(value) or not callable(value):
        return False
    return getattr(value, "__module__", None) == module.__name__
