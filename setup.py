"""Adds compiled kernels to wheels, where ``ICNN_ZOO_KERNELS=1`` asks for them; everything else is in pyproject.toml.

From source nothing is compiled here: the kernel is, on its first use, for the very processor it runs on.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = "icnn_zoo.ops.native_backend"
SOURCES = sorted(map(str, Path(PACKAGE.replace(".", "/")).glob("csrc/*.c")))
KINDS = {"x86_64": ("x86-64-v3", "x86-64-v4"), "aarch64": ("armv8-a",), "arm64": ("armv8-a",)}  # those of wheel.py


class Kernels(build_ext):
    """Names the libraries as wheel.py looks for them: they are no Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where a library goes."""
        return str(Path(*fullname.split("."))) + ".so"


class AnyPython(bdist_wheel):
    """A wheel of one platform for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


def kernels() -> list[Extension]:
    """A library for each type of numbers and kind of processor."""
    return [
        Extension(
            f"{PACKAGE}.kernel-{real}-{kind}",
            SOURCES,
            define_macros=[("REAL", real)],
            extra_compile_args=["-O3", f"-march={kind}", "-fno-trapping-math", "-std=gnu11", "-pthread", "-g0"],
            extra_link_args=["-pthread"],
        )
        for real in ("float", "double")
        for kind in KINDS[platform.machine()]
    ]


if os.environ.get("ICNN_ZOO_KERNELS") == "1":
    setup(ext_modules=kernels(), cmdclass={"build_ext": Kernels, "bdist_wheel": AnyPython})
else:
    setup()
