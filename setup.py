"""Installation of telechat."""

import pathlib
import re

from setuptools import find_packages, setup

here = pathlib.Path(__file__).resolve().parent
version = re.search(r'__version__ = "(.+)"', (here / "telechat/__init__.py").read_text(encoding="utf-8")).group(1)

# Serving is an extra: who trains or converts does without an HTTP server.
serve = ["starlette>=0.37,<2", "uvicorn>=0.30,<1"]
# GGUF files, by the converter alone.
export = ["gguf>=0.10,<1"]
# torch is needed by the converter alone, and by tests as the reference.
torch = ["torch>=2.1"]

setup(
    name="telechat",
    version=version,
    description="TeleChat-1, 2 and 3 on MindSpore: fine-tuning, inference and serving, from a laptop to 16 cards",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    packages=find_packages(include=["telechat", "telechat.*"]),
    package_data={"telechat.serving": ["page.html"], "telechat.nn.cpu": ["*.cpp", "*.h"]},
    install_requires=[
        "mindspore>=2.8,<2.11",
        "numpy>=1.23,<2",
        "sentencepiece>=0.2.3,<0.3",
        "tokenizers>=0.20,<0.24",
        "safetensors>=0.4.3,<0.9",
        "pyyaml>=6.0,<7",
        "tqdm>=4.60,<5",
        "matplotlib>=3.7,<4",  # the curves in loss.png
    ],
    extras_require={
        "convert": torch,
        "export": export,
        "serve": serve,
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.26,<2"],
        "tensorboard": ["tensorboard>=2.10,<3"],
        "dev": [*serve, *export, "torch==2.13.0", "pytest>=7", "pytest-xdist>=3", "psutil>=5", "scipy>=1.9",
                "openai>=1.40", "transformers>=4.45,<6", "hypothesis>=6", "peft>=0.13,<1", "coverage>=7", "tensorboard>=2.10,<3"],
    },
)
