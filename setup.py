"""What pyproject.toml cannot say: where `effkernels.models` lies, and the commands that compile."""

from setuptools import find_packages, setup

from build_tools.command import BdistWheel, Build, BuildNative, PlatformDistribution

setup(
    packages=[
        *find_packages(include=["effkernels", "effkernels.*"]),
        "effkernels.models",
        *(f"effkernels.models.{name}" for name in find_packages("models")),
    ],
    package_dir={"effkernels.models": "models"},
    package_data={"effkernels": ["py.typed", "triton/tables/*.json"]},
    distclass=PlatformDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel},
)
