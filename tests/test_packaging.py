"""What the sdist and the wheel hold, and that a config is found in an installed package."""

import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

from dmd_jax.experiment import configs

ROOT = pathlib.Path(__file__).parents[1]


def build(source, target, *command):
    """Runs setup.py of `source` with its scratch files in `target`; returns the archive."""
    base = ("egg_info", f"--egg-base={target}")
    subprocess.run(
        [sys.executable, "setup.py", "-q", *base, *command, f"--dist-dir={target / 'dist'}"],
        cwd=source,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return next((target / "dist").iterdir())


def files(*folders):
    """The Python files of folders of the repository, relative to it."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The directory that the sdist unpacks to."""
    directory = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, directory, "sdist")) as archive:
        archive.extractall(directory, filter="data")
    return next(path for path in directory.glob("dmd_jax-*") if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The directory that the wheel made of the sdist unpacks to."""
    directory = tmp_path_factory.mktemp("wheel")
    build_base = ("build", f"--build-base={directory / 'build'}")
    path = build(sdist, directory, *build_base, "bdist_wheel")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(directory / "site")
    return directory / "site"


def test_the_sdist_has_everything(sdist):
    names = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    expected = files("configs", "dmd_jax", "tests")
    expected |= {"setup.py", "pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md"}
    expected |= {"LICENSE", "CITATION.cff", "CONTRIBUTING.md", "docs/digits.png"}
    expected |= {"dmd_jax/py.typed", "launch/worker.sh", "tests/data/edm_golden.npz"}
    assert not expected - names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_wheel_has_the_package_and_the_configs(wheel):
    names = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    packaged = files("dmd_jax") | {f"dmd_jax/{name}" for name in files("configs")}
    assert {name for name in names if ".dist-info/" not in name} == packaged | {"dmd_jax/py.typed"}


def test_the_description_has_no_links_into_the_repository(wheel):
    description = next(wheel.glob("*.dist-info/METADATA")).read_text()
    assert "# dmd_jax" in description and "](https://" in description
    assert not [line for line in description.splitlines() if "](docs/" in line or "![" in line]


def test_an_installed_package_finds_its_configs_and_its_command(wheel, tmp_path):
    program = "from dmd_jax.experiment import configs; print(configs.DIRECTORY, *configs.names())"
    environment = {"PYTHONPATH": str(wheel), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", f"{program}; print(configs.load('digits:smoke').stages[0])"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    directory, *names = result.stdout.split()
    assert directory == str(wheel / "dmd_jax/configs")
    assert names == [*configs.names(), "teacher"]
    entry_points = next(wheel.glob("*.dist-info/entry_points.txt")).read_text()
    assert "dmd_jax = dmd_jax.__main__:main" in entry_points


@pytest.mark.parametrize("name", ["digits:smoke", "configs/digits.py:smoke"])
def test_a_clone_finds_its_configs_by_name_and_by_path(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    assert configs.load(name).stages == ("teacher", "pairs", "dmd", "evaluate")


def test_a_wrong_name_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"no config digit \(did you mean 'digits'\?\); there are"):
        configs.load("digit")
