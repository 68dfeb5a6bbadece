"""Pages name what exists: files, links, commands with their flags, protocols."""

import ast
import importlib.util
import itertools
import json
import pathlib
import re
import shlex

import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import dmd_jax
from dmd_jax import __main__ as command_line
from dmd_jax import main
from dmd_jax.bench import __main__ as bench
from dmd_jax.evals import protocols
from dmd_jax.experiment import build, check, configs

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch/README.md"),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
FOLDERS = "dmd_jax|configs|docs|launch|tests"
PATH = re.compile(rf"(?<![\w/.~-])(?:{FOLDERS})/[\w./-]*|(?<=`)[\w-]+\.(?:py|sh|md|yaml)(?=`)")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")
VARIABLES = {"$seed": "0", "$variant": "no_matching"}  # of loops in shell
# Flags of other programs, and what stands for a name.
OTHERS = {"all-files", "no-deps", "cpus-per-task", "signal", "nodes", "STAGE"}


def commands(page):
    """Yields the commands of this package on a page, in blocks and in text, as lists of words."""
    for line in re.findall(r"python -m dmd_jax[^`\n]*(?:\n  ?--[^`\n]*`)?", PAGES[page]):
        for name, value in VARIABLES.items():
            line = line.replace(name, value)
        yield shlex.split(line.split("  #")[0].rstrip("`)"), comments=True)[2:]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


# The config for images of one's own.
PHOTOS = next(
    block
    for block in re.findall(r"```python\n(.*?)```", PAGES["docs/config.md"], re.DOTALL)
    if "def get_config" in block
)


def called(words):
    return " ".join(words)[:80]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def test_the_readme_is_short():
    assert len(PAGES["README.md"].split()) <= 1000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(PAGES[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)", target.read_text())
            assert anchor in map(slug, headings), anchor


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    names = {path.name for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.*")}
    names |= {path.name for path in ROOT.iterdir()}
    for path in PATH.findall(PAGES[page]):
        path = path.rstrip(".")
        assert path in names if "/" not in path else (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_tables_have_headers(page):
    lines = PAGES[page].split("\n")
    for header, line in itertools.pairwise(lines):
        if line.startswith("| ---"):
            assert all(cell.strip() for cell in header.strip("| ").split("|")), header
            assert not header.startswith("| |"), header


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[called(words) for _, words in COMMANDS])
def test_commands_exist_with_their_flags(page, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "photos.py").write_text(PHOTOS)
    words = [word.replace("=photos.py", f"={tmp_path / 'photos.py'}") for word in words]
    module, *arguments = words
    assert importlib.util.find_spec(module), module
    if not arguments or "..." in arguments or arguments[0].isupper():
        return
    try:
        if module == "dmd_jax":
            name, *arguments = arguments
            command_line.COMMANDS[name].parse(arguments)
        elif module == "dmd_jax.main":
            _parse_main(arguments)
        else:
            bench.parse(arguments)
    except SystemExit as error:
        pytest.fail(f"{page}: {error.code} {capsys.readouterr().err}")


def _parse_main(arguments):
    with flagsaver.flagsaver():
        config = main.parse(["main", *arguments])
        assert main.STAGE.value is None or main.STAGE.value in config.stages
        assert main.PLAN.value or main.WORKDIR.value


def known_flags(capsys):
    """The flags of all commands, of `main` and of the scripts of launch/."""
    parsers = [command.parse for command in command_line.COMMANDS.values()]
    benchmarks = ("step", "forward", "sample", "features", "memory", "records")
    parsers += [lambda argv, name=name: bench.parse([name, *argv]) for name in benchmarks]
    for parse in parsers:
        with pytest.raises(SystemExit):
            parse(["--help"])
    text = capsys.readouterr().out
    for path in (ROOT / "launch").glob("*.sh"):
        names = re.findall(r'(?m)^parse "([\w ]+)"', path.read_text())
        text += "".join(f" --{name}" for name in " ".join(names).split())
    return {*re.findall(r"--([\w-]+)", text), *flags.FLAGS, "config"} | OTHERS


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_running_text_exist(page, capsys):
    known = known_flags(capsys)
    for code in re.findall(r"`([^`\n]+)`", PAGES[page]):
        if code.split()[0].startswith("--"):
            assert set(re.findall(r"(?<!\S)--([\w-]+)", code)) <= known, code


@pytest.mark.parametrize("page", PAGES)
def test_python_is_valid_and_uses_what_the_package_has(page):
    for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "dmd_jax" or hasattr(dmd_jax, node.attr), node.attr


@pytest.mark.parametrize("classes", [2, 0])
def test_the_config_for_ones_own_images_finds_them(tmp_path, classes):
    rows = {f"{name}/{i}.png": label for label, name in enumerate(("a", "b")) for i in range(3)}
    for name in rows:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name)
    (tmp_path / "photos/dataset.json").write_text(json.dumps({"labels": list(rows.items())}))
    text = PHOTOS.replace("/data/photos", str(tmp_path / "photos"))
    if not classes:  # as the page says
        text = text.replace(", size=64, num_classes=2)", ", size=64)")
        text = text.replace('"labels.every", num_classes=2', '"labels.every", num_classes=1')
        text = text.replace("conditions=dict(num_classes=2)", "conditions=dict(num_classes=1)")
        text = text.replace("channels=3, num_classes=2", "channels=3, num_classes=0")
    (tmp_path / "photos.py").write_text(text)
    stages = build.stages(configs.load(str(tmp_path / "photos.py")))
    check.stages(stages)
    assert stages["teacher"].num_classes == classes
    check.files([stages[name] for name in stages["dmd"].run.stages], tmp_path / "run")
    teacher = stages["teacher"]
    rows = build.checked_source(teacher, teacher.settings.data["images"], tmp_path)
    assert [int(rows[i]["cond"]) for i in range(6)] == ([0, 0, 0, 1, 1, 1] if classes else [0] * 6)


def test_every_protocol_is_on_its_page():
    rows = [
        line.split("|")[1]
        for line in PAGES["docs/evaluation.md"].split("\n")
        if line.startswith("| `")
    ]
    names = set()
    for row in rows:
        first, *variants = re.findall("`([^`]+)`", row)
        names |= {first, *(first + variant for variant in variants)}
    assert names == protocols.PROTOCOLS.keys()
