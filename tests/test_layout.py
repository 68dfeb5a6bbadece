"""Who may import whom."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CHAIN = (  # a module imports none of its own line, nor of those above it
    {"main", "bench", "compare", "latency"},
    {"train", "convert", "embed", "pairs", "evaluate", "export", "personalise", "plan", "sample"},
    {"recipes"},
    {"losses", "samplers"},
    {"denoiser"},
    {"ode"},
    {"process"},
)
STAGES = {"main", "bench", "train", "convert", "embed", "pairs", "evaluate", "export", "personalise", "sample", "experiment"}
STAGES |= {"plan", "plan_report", "check", "measure", "compare", "latency"}
MATHEMATICS = {"process", "ode", "denoiser", "samplers", "losses"}


def imported(tree):
    """The full names of what a file imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# {"recipes.dmd": {"jax", "dmd_jax.losses", ...}}
IMPORTS = {}
for path in sorted((ROOT / "dmd_jax").rglob("*.py")):
    module = ".".join(path.relative_to(ROOT / "dmd_jax").with_suffix("").parts)
    names = [name.split(".") for name in imported(ast.parse(path.read_text()))]
    IMPORTS[module] = {".".join(n[:3]) if n[0] == "dmd_jax" else n[0] for n in names}


def ours(module):
    return {name.split(".")[1] for name in IMPORTS[module] if name.startswith("dmd_jax.")}


def files(folder):
    return [module for module in IMPORTS if module.startswith(f"{folder}.") and not module.endswith("__init__")]


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_point_down(module):
    top = module.split(".")[0]
    line = next((i for i, names in enumerate(CHAIN) if top in names), None)
    above = set().union(*CHAIN[: 2 if line is None else line + 1])
    if top == "recipes":
        above.discard("recipes")  # for the type of a recipe
    assert not ours(module) & above


@pytest.mark.parametrize("module", sorted(MATHEMATICS))
def test_mathematics_needs_only_jax(module):
    others = {name for name in IMPORTS[module] if not name.startswith("dmd_jax.")}
    assert others <= {"jax", "numpy", "dataclasses", "functools", "typing", "collections"}
    assert ours(module) <= MATHEMATICS


@pytest.mark.parametrize("module", files("models"))
def test_models_need_only_flax_and_each_other(module):
    others = {name for name in IMPORTS[module] if not name.startswith("dmd_jax.")}
    assert others <= {"jax", "flax", "numpy", "functools", "itertools", "typing", "collections", "math"}
    expected = "dmd_jax.rules" if module == "models.layers" else "dmd_jax.models."
    assert all(name.startswith(expected) for name in IMPORTS[module] - others)


@pytest.mark.parametrize("module", files("recipes"))
def test_a_method_knows_no_other_and_no_network(module):
    assert not ours(module) & {"models", "data", "weights", "evals"}
    assert not IMPORTS[module] & {f"dmd_jax.{other}" for other in files("recipes")}


@pytest.mark.parametrize("module", [m for m in IMPORTS if m.split(".")[0] in ("data", "models", "weights", "evals")])
def test_data_networks_and_metrics_know_no_recipes(module):
    assert not ours(module) & {"recipes", "losses", "experiment"}


@pytest.mark.parametrize("module", sorted(set(IMPORTS) - STAGES))
def test_nothing_below_the_stages_sees_a_config(module):
    assert "ml_collections" not in IMPORTS[module]


def test_there_are_no_cycles():
    """Between the modules at the top and the folders."""
    below = {}
    for module in IMPORTS:
        top = module.split(".")[0]
        below[top] = below.get(top, set()) | (ours(module) - {top})
    while leaves := {name for name, needs in below.items() if not needs & below.keys()}:
        below = {name: needs for name, needs in below.items() if name not in leaves}
    assert not below
