"""Where the packages lie: `kernels/` and `models/` install as `minserve.kernels` and `minserve.models`.

All else about the package is in `pyproject.toml`, which cannot search several root folders.
"""

from setuptools import find_packages, setup

ROOTS = {"minserve": "minserve", "minserve.kernels": "kernels", "minserve.models": "models"}

setup(
    packages=[
        name
        for root, folder in ROOTS.items()
        for name in [root, *(f"{root}.{sub}" for sub in find_packages(folder))]
    ],
    package_dir=ROOTS,
    package_data={
        "minserve.models": ["smollm2_draft/*"],
        "minserve.server.page": ["web/*"],
        "minserve.workload": ["data/*.md", "data/*/*.gz"],
    },
)
