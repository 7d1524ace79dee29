"""Packaging: `kernels/` and `models/` at the root install as `minserve.kernels` and `minserve.models`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOTS = {"minserve": "minserve", "minserve.kernels": "kernels", "minserve.models": "models"}

packages = [
    name
    for root, folder in ROOTS.items()
    for name in [root, *(f"{root}.{sub}" for sub in find_packages(folder))]
]

setup(
    name="minserve",
    version="0.1.0",
    description="A from-scratch LLM inference server in pure PyTorch that keeps latency promises",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=packages,
    package_dir=ROOTS,
    package_data={
        "minserve.models": ["smollm2_draft/*"],
        "minserve.workload": ["data/*.md", "data/*/*.gz"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.0",
        "numpy>=1.26",
        "safetensors>=0.5",
        "gguf>=0.17",
        "huggingface-hub>=1.0",
        "aiohttp>=3.11",
        "jinja2>=3.1",
        "msgspec>=0.19",
        "prometheus-client>=0.21",
        "tqdm>=4.66",
        "psutil>=6.0",
    ],
    extras_require={
        "plot": ["matplotlib>=3.9"],
        "flash-attn": ["flash-attn>=2.6"],
        "test": [
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.130",
            "openai>=2.0",
            "tokenizers>=0.22",
            "matplotlib>=3.9",
            # torch's CUDA builds bring their own; here its interpreter runs the kernels.
            "triton>=3.6,<4; platform_system == 'Linux'",
            "ruff==0.15.*",
        ],
    },
    entry_points={"console_scripts": ["minserve=minserve.cli:main"]},
)
