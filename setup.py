"""What pyproject.toml cannot say: conf/ travels inside the wheel, as moss_train/conf."""

from setuptools import find_namespace_packages, setup

PACKAGES = find_namespace_packages(
    include=["moss_train*", "data_pipeline*", "inference*", "tools*"]
)
CONF = ["conf", *(f"conf.{group}" for group in find_namespace_packages("conf"))]

setup(
    packages=[*PACKAGES, *(f"moss_train.{name}" for name in CONF)],
    package_dir={"moss_train.conf": "conf"},
)
