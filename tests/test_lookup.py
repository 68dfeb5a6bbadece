"""Names in a config stand for public functions, of this package or of the user's own."""

import importlib
import inspect
import pkgutil
import sys

import pytest

from dmd_jax import denoiser, lookup, losses, process, samplers
from dmd_jax.models import unet_edm, unet_sd
from dmd_jax.recipes import dmd

METHOD = """
import functools

class Helper:
    pass

def make(denoiser, parallel):
    return "made"

def other(denoiser):
    return "other"

def _private():
    pass
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user's own; returns a function that writes a module of it."""
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "my_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")

    def write(name, text):
        (folder / f"{name}.py").write_text(text)

    write("my_method", METHOD)
    monkeypatch.setattr(lookup, "_plugins", {"my_package"})
    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def error_of(package, name):
    with pytest.raises(ValueError) as error:
        lookup.find(package, name)
    return str(error.value)


def test_a_file_of_a_folder_and_a_function_of_it():
    assert lookup.find("recipes", "dmd") is dmd.make
    assert lookup.find("models", "unet_edm.ddpmpp") is unet_edm.ddpmpp
    assert lookup.find("models", "unet_sd.unet") is unet_sd.unet


@pytest.mark.parametrize("name", ["unet_sd._blocks", "unet_sd.Stack", "unet_sd.Encoder"])
def test_private_names_and_classes_are_neither_found_nor_listed(name):
    error = error_of("models", name)
    function = name.split(".")[1]
    assert error.startswith(f"dmd_jax/models/unet_sd.py has no '{function}'")
    listed = error.split("there are: ")[1].removesuffix(".").split(", ")
    assert "unet" in listed
    assert not [name for name in listed if inspect.isclass(getattr(unet_sd, name))]
    assert not [name for name in listed if name.startswith("_")]


def test_what_a_file_imports_is_not_its_own():
    assert "has no 'Callable'" in error_of("recipes", "dmd.Callable")


def test_names_in_a_file():
    assert lookup.find("samplers", "heun") is samplers.heun
    assert lookup.find("samplers", "one_step") is samplers.one_step
    assert lookup.find("process", "VP") is process.VP
    assert lookup.find("denoiser", "flow_to_data") is denoiser.flow_to_data
    assert lookup.find("losses", "squared_error") is losses.squared_error


def test_a_file_lists_its_choices_alone():
    error = error_of("samplers", "huen")
    assert error.startswith("dmd_jax/samplers.py has no 'huen' (did you mean 'heun'?); there are: ")
    assert error.endswith(": " + ", ".join(samplers.CHOICES) + ".")
    assert "has no 'straightness'" in error_of("samplers", "straightness")
    assert "has no 'guided'" in error_of("denoiser", "guided")
    assert "has no 'Process'" in error_of("process", "Process")


@pytest.mark.parametrize("module", [samplers, process, denoiser, losses])
def test_choices_exist(module):
    assert all(callable(getattr(module, name)) for name in module.CHOICES)


@pytest.mark.parametrize("folder", ["recipes", "samplers"])
def test_a_function_of_the_users_own(package, folder):
    assert lookup.find(folder, "my_package.my_method")(None, None) == "made"
    assert lookup.find(folder, "my_package.my_method.make")(None, None) == "made"
    assert lookup.find(folder, "my_package.my_method.other")(None) == "other"


def test_a_class_that_the_users_module_lists(package):
    package("my_process", "class Mine:\n    pass\n\nCHOICES = ('Mine',)\n")
    assert lookup.find("process", "my_package.my_process.Mine").__name__ == "Mine"


@pytest.mark.parametrize("function", ["_private", "Helper", "functools"])
def test_private_names_and_classes_of_the_users_own(package, function):
    name = f"my_package.my_method.{function}"
    assert error_of("recipes", name) == (
        f"there is no module {name}, and my_package.my_method has no {function!r}; "
        "there are: make, other."
    )


def test_a_module_without_make(package):
    package("empty", "")
    assert error_of("recipes", "my_package.empty") == (
        "my_package.empty has no 'make'; there are: none."
    )


def test_a_package_that_nobody_has_admitted_is_not_even_imported(package, tmp_path, monkeypatch):
    package("spy", f"open({str(tmp_path / 'imported')!r}, 'w')\n\ndef make():\n    pass\n")
    monkeypatch.setattr(lookup, "_plugins", set())
    for name in ("my_package.spy", "my_package.spy.make", "subprocess.getoutput", "os.system"):
        own = name.split(".")[0]
        assert error_of("data", name).startswith(
            f"{name} is of no package that a config may name, and dmd_jax/data has no file {own!r}"
        )
        assert error_of("data", name).endswith(
            f"If {own} is your own, admit it: plugins=({own!r},) in your config, "
            f"--plugins={own} of a command."
        )
    assert not (tmp_path / "imported").exists()
    lookup.admit(["my_package"])
    lookup.find("data", "my_package.spy")
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("data", "records.write_shard"),
        ("data", "captions.readable"),
        ("data", "pixels.grid"),
        ("models", "unet_edm.smooth_down"),
        ("models", "clip_text.check"),
        ("features", "classifier.fit"),
        ("evals", "references.write"),
        ("evals", "report.draw"),
    ],
)
def test_helpers_of_our_own_files_are_not_offered(folder, name):
    assert f"has no {name.split('.')[1]!r}" in error_of(folder, name)


def test_every_choice_of_a_folder_exists():
    for folder in ("data", "models"):
        for file in pkgutil.iter_modules([f"dmd_jax/{folder}"]):
            module = importlib.import_module(f"dmd_jax.{folder}.{file.name}")
            assert all(callable(getattr(module, name)) for name in lookup._choices(module))


def test_neither_a_file_nor_a_module(monkeypatch):
    monkeypatch.setattr(lookup, "_plugins", {"dmb", "nowhere"})
    error = error_of("recipes", "dmb.method")
    assert error.startswith("there is no module dmb.method or dmb, and dmd_jax/recipes has no file")
    assert "'dmb' (did you mean 'dmd'?); there are: distil, dmd, reflow, teacher." in error
    error = error_of("samplers", "nowhere.method")
    assert error.startswith("there is no module nowhere.method or nowhere, and dmd_jax/samplers.py")
    assert "has: one_step, euler," in error
    with pytest.raises(ValueError, match=r"^dmd_jax/recipes has no file 'nowhere'; there are: "):
        lookup.find("recipes", "nowhere")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import not_installed", "ModuleNotFoundError: No module named 'not_installed'"),
        ("import my_package.lost", "ModuleNotFoundError: No module named 'my_package.lost'"),
        ("from my_package.my_method import lost", "ImportError: cannot import name 'lost'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError: invalid syntax"),
    ],
)
@pytest.mark.parametrize("name", ["my_package.broken", "my_package.broken.function"])
def test_a_module_that_fails_says_why(package, text, reason, name):
    package("broken", text)
    assert f"cannot be imported: {reason}" in error_of("recipes", name)


def test_arguments_that_do_not_fit(package):
    package("my_data", "def make(path):\n    return path\n")
    assert lookup.open_source({"source": "my_package.my_data", "path": "here"}) == "here"
    with pytest.raises(ValueError, match=r"^the source my_package\.my_data does not fit: "):
        lookup.open_source({"source": "my_package.my_data", "size": 3})
