"""The miniature world's package, installed from a checkout: ``pip install -e . -e projects/MiniWorld``."""

from setuptools import setup

setup(
    name="regionspot-miniworld",
    version="0.1.0",
    description="A drawn world for RegionSpot, with a tiny SAM and CLIP",
    license="Apache-2.0",
    packages=["miniworld"],
    package_data={"miniworld": ["weights/*"]},
    python_requires=">=3.10",
    install_requires=["regionspot", "tabulate"],
    entry_points={"console_scripts": ["miniworld = miniworld.__main__:main"]},
)
