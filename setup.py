"""What pyproject.toml cannot say: ``configs/`` is packaged as a part of the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mimicnorm_jax*"]), "mimicnorm_jax.configs"],
    package_dir={"mimicnorm_jax.configs": "configs"},
)
