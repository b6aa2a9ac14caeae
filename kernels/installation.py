"""What pip runs at installation: the CPU library, where a C++ compiler is; without one it installs all the same.

setuptools loads this file by its path in an environment without this package: `build.py` beside it is loaded alike.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class WheelOfAnyPython(bdist_wheel):
    """`bdist_wheel`, tagged py3-none-PLATFORM: plain C libraries belong to a platform and to no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class BuildWithKernels(build_ext):
    """`build_ext`, and the WKV library into kernels/lib: of the source tree when editable, else of the wheel.

    A library keeps its plain name, without the tag of the Python that builds it.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return f"{Path(*fullname.split('.'))}.so"

    def run(self) -> None:
        super().run()
        source = Path(__file__).parent
        output = source / "lib" if self.inplace else Path(self.build_lib, "rwkv_cluster", "kernels", "lib")
        build = _load(source / "build.py")
        try:
            print(f"built {build.build('cpu', output)}")
        except build.BuildError as error:
            print(f"warning: no compiled WKV kernels: {error}. Training uses PyTorch instead, more slowly")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rwkv_kernels_build", path)
    assert spec is not None  # true of every path ending in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
