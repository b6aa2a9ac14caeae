"""What pip runs at installation: the CPU library, where a C++ compiler is; without one it installs all the same.

setuptools loads this file by its path in an environment without this package: `build.py` beside it is loaded alike.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools.command.build_ext import build_ext


class BuildWithKernels(build_ext):
    """`build_ext`, and the WKV library into kernels/lib: of the source tree when editable, else of the wheel."""

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
