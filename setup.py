import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
TEST = ["pytest>=8", "pytest-timeout>=2.3", "ruff>=0.14"]
DIGITS = ["scikit-learn>=1.5"]

setup(
    name="dmd_jax",
    version=re.search(r'__version__ = "(.+)"', (HERE / "dmd_jax/__init__.py").read_text())[1],
    description="One-step image generators out of pretrained diffusion models, in JAX.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["dmd_jax", "dmd_jax.*"]),
    python_requires=">=3.11,<3.14",
    install_requires=(HERE / "requirements.txt").read_text().split(),
    extras_require={
        "digits": DIGITS,  # the data set of configs/digits.py, and the classifier of its evaluation
        "test": TEST + DIGITS,
        "tpu": ["jax[tpu]"],
        "cuda13": ["jax[cuda13]"],
    },
)
