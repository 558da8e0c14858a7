"""Packaging of alignment_jax; every other tool setting is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "alignment_jax" / "__init__.py").read_text()).group(1)

CRITTERS = ["dicebear-core>=10.7", "dicebear-styles>=10.6", "resvg-py>=0.5"]
NOTEBOOKS = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]

setup(
    name="alignment_jax",
    version=VERSION,
    description="Alignment of diffusion models in JAX: rewards, preferences, test time, evaluation.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["alignment_jax", "alignment_jax.*"]),
    package_data={"alignment_jax": ["py.typed", "assets/critters/*", "evaluation/*.jinja"]},
    install_requires=[
        "jax>=0.7.2",
        "flax>=0.11.2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "transformers>=5",
        "tokenizers>=0.21",
        "tensorflow-datasets>=4.9.9",
        "array_record>=0.8",
        "importlib_resources>=6",
        "grain>=0.2.12",
        "ml_collections>=1.1",
        "absl-py>=2.1",
        "safetensors>=0.5",
        "huggingface_hub>=0.34",
        "numpy>=2.0",
        "scipy>=1.14",
        "pillow>=11",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "tensorboardX>=2.6.4",
        "jinja2>=3.1",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.7.2"],
        "cuda": ["jax[cuda12]>=0.7.2"],
        "critters": CRITTERS,
        "notebooks": NOTEBOOKS,
        "parity": ["torch", "diffusers", "transformers", "open_clip_torch"],
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12", "mypy>=1.16", "jsonschema>=4", "pyyaml>=6", *CRITTERS, *NOTEBOOKS],
    },
    entry_points={"console_scripts": ["alignment_jax = alignment_jax.cli:main"]},
)
