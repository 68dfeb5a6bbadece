"""Who may import whom."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = (  # a module imports of lower lines and of its own folder, and of nothing else
    {"main", "__main__", "bench"},
    {"plan", "stages", "commands"},
    {"experiment"},
    {"evals", "recipes", "generate"},
    {"features", "encoders"},
    {"data"},
    {"samplers", "weights"},
    {"denoiser", "ode", "optim", "runtime"},
    {"process", "models", "losses", "state", "sharding", "lookup", "rng"},
)
SEE_CONFIGS = {"main", "bench", "plan", "stages", "commands", "experiment"}
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
    return [
        module
        for module in IMPORTS
        if module.startswith(f"{folder}.") and not module.endswith("__init__")
    ]


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if name in names)


def test_every_file_at_the_top_and_every_folder_has_a_layer():
    tops = {module.split(".")[0] for module in IMPORTS} - {"__init__"}
    assert tops == set().union(*LAYERS)


@pytest.mark.parametrize("module", [module for module in IMPORTS if module != "__init__"])
def test_imports_point_down(module):
    top = module.split(".")[0]
    assert not [name for name in ours(module) - {top} if layer(name) <= layer(top)]


@pytest.mark.parametrize("module", sorted(MATHEMATICS))
def test_mathematics_needs_only_jax(module):
    others = {name for name in IMPORTS[module] if not name.startswith("dmd_jax.")}
    assert others <= {"jax", "numpy", "dataclasses", "functools", "typing", "collections"}
    assert ours(module) <= MATHEMATICS


@pytest.mark.parametrize("module", files("models"))
def test_models_need_only_flax_and_each_other(module):
    others = {name for name in IMPORTS[module] if not name.startswith("dmd_jax.")}
    allowed = {"qwix"} if module == "models.quantize" else set()
    assert others - allowed <= {
        "jax",
        "flax",
        "numpy",
        "functools",
        "itertools",
        "typing",
        "collections",
        "math",
        "re",
    }
    assert all(name.startswith("dmd_jax.models.") for name in IMPORTS[module] - others)


@pytest.mark.parametrize("module", files("recipes"))
def test_a_method_knows_no_other_and_no_network(module):
    assert not ours(module) & {"models", "data", "weights", "evals", "runtime"}
    assert not IMPORTS[module] & {f"dmd_jax.{other}" for other in files("recipes")}


@pytest.mark.parametrize("module", IMPORTS)
def test_nothing_below_the_stages_sees_a_config(module):
    assert "ml_collections" not in IMPORTS[module] or module.split(".")[0] in SEE_CONFIGS
