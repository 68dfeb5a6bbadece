"""Configs by their names."""

import importlib.util
import pathlib


def load(name: str):
    """Of configs/<name>.py; a word after a colon picks a variant."""
    file, _, variant = name.partition(":")
    path = pathlib.Path(__file__).parents[2] / "configs" / f"{file}.py"
    if not path.exists():
        raise ValueError(
            f"no config {path}; there are: {', '.join(sorted(p.stem for p in path.parent.glob('*.py')))}."
        )
    spec = importlib.util.spec_from_file_location(file, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()
