"""Finds what a config names: networks, recipes and data sources are files of this package."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable


def find(package: str, name: str) -> Callable:
    """The function `name`, written "file" or "file.function", of the subpackage `package`; "file" stands for "file.make".

    Raises:
      ValueError: there is no such file or function; names those that exist.
    """
    module_name, _, function = name.partition(".")
    parent = importlib.import_module(f"dmd_jax.{package}")
    modules = [m.name for m in pkgutil.iter_modules(parent.__path__)]
    if module_name not in modules:
        raise ValueError(
            f"dmd_jax/{package} has no file {module_name!r}{nearest(module_name, modules)}; there are: {', '.join(modules)}."
        )
    module = importlib.import_module(f"dmd_jax.{package}.{module_name}")
    function = function or "make"
    names = [
        n
        for n, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    ]
    if function not in names:
        raise ValueError(
            f"dmd_jax/{package}/{module_name}.py has no {function!r}{nearest(function, names)}; there are: {', '.join(names)}."
        )
    return getattr(module, function)


def nearest(name: str, names: list[str]) -> str:
    """A hint at what was meant, or nothing."""
    close = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_arguments(make: Callable, arguments: dict, where: str, *first):
    """Raises ValueError, which names `where` they are from, unless `make` takes these arguments after the `first` ones."""
    try:
        inspect.signature(make).bind(*first, **arguments)
    except TypeError as error:
        raise ValueError(f"{where} does not fit: {error}.") from error


def open_source(settings: dict):
    """The data source `settings["source"]`; the rest of them are its arguments.

    Raises:
      ValueError: there is none of that name, or the arguments are not its own.
    """
    settings = dict(settings)
    name = settings.pop("source")
    make = find("data", name)
    check_arguments(make, settings, f"the source {name}")
    return make(**settings)
