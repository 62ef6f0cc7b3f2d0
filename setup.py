"""RegionSpot's package; exact versions for development are in requirements/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "regionspot" / "__init__.py").read_text(encoding="utf-8")).group(1)

# What some commands need; the tests run all of them.
OPTIONAL = {
    "video": ["av>=12"],
    "parquet": ["pyarrow>=15"],
    "ray": ["ray[data]>=2.30"],
    "app": ["gradio>=6.31"],
    "export": ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"],
    "serve": ["litserve>=0.2.5"],
    # other SAMs and CLIPs than the paper's
    "models": [
        "transformers>=5.0,<6",
        "timm>=1.0.20",
        "open-clip-torch>=3.0,<4",
    ],
}

setup(
    name="regionspot",
    version=VERSION,
    description="Open-world region recognition for Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["regionspot", "regionspot.*", "regionspot_cli"]),
    package_data={
        "regionspot.model_zoo": ["configs/**/*.yaml", "configs/**/*.json"],
        "regionspot.app": ["assets/*"],
        "regionspot.report": ["templates/*"],
    },
    entry_points={"console_scripts": ["regionspot = regionspot_cli.__main__:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.24",
        "pillow>=9.5",
        "opencv-python>=4.8",  # lvis needs it, too
        "matplotlib>=3.8",
        "segment-anything>=1.0",
        "clip-anytorch>=2.6",
        "setuptools>=75,<82",  # clip imports pkg_resources
        "pycocotools>=2.0.7",
        "lvis>=0.5.3",
        "fvcore>=0.1.5",
        "safetensors>=0.4",
        "msgspec>=0.18",
        "filelock>=3.13",
        "defusedxml>=0.7",
        "jinja2>=3.1",  # torch needs it, too
        "tqdm>=4.65",
    ],
    extras_require={
        # What Detectron2 needs; Detectron2 itself is not on PyPI under its own name, see README.md.
        "detectron2": [
            "iopath>=0.1.7,<0.1.11",
            "omegaconf>=2.1,<2.4",
            "hydra-core>=1.1",
            "yacs>=0.1.8",
            "tabulate",
            "cloudpickle",
            "tensorboard",
            "termcolor>=1.1",
            "black",
            "packaging",
            "matplotlib",
        ],
        "demo": ["scikit-image>=0.21"],
        "prepare": ["pandas>=2.0"],  # datasets/prepare_openimages.py: CSV
        **OPTIONAL,
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff", "mypy", "scikit-image>=0.21", "pandas>=2.0"]
        + ["playwright>=1.50", *sum(OPTIONAL.values(), [])],
    },
)
