"""A simulated NVML with switches, for tests that must not hang on a clock: files in a folder say what it does now.

`hang`: no call returns while it is there. `status`: every call answers with the number in it. `slow`: every call takes so
many seconds. `lost`: the GPUs, by index, that answer that they are lost. `gone`: those that there are not.
`mismatch`: it can't be opened. `library`: the file that it was loaded from.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from doctor.simulation.nvml import GPU_IS_LOST, LIB_RM_VERSION_MISMATCH, Library, _Device, _RefusalError
from doctor.simulation.physics import Drill


class Spec(msgspec.Struct):
    """What stands behind `--spec`."""

    drill: Drill
    folder: str


class Switched(Library):
    """The library of a drill, behind the switches of a folder."""

    def __init__(self, drill: Drill, folder: Path) -> None:
        super().__init__(drill)
        self._folder = folder

    def __getattr__(self, name: str) -> Callable[..., int]:
        inner = super().__getattr__(name)
        if name == "nvmlErrorString":
            return inner

        def call(*arguments: Any) -> int:
            parent = os.getppid()
            while (self._folder / "hang").exists() and os.getppid() == parent:
                time.sleep(0.01)
            if (self._folder / "slow").exists():
                time.sleep(float((self._folder / "slow").read_text()))
            if name == "nvmlInitWithFlags" and (self._folder / "mismatch").exists():
                return LIB_RM_VERSION_MISMATCH
            if (self._folder / "status").exists():
                return int((self._folder / "status").read_text())
            return inner(*arguments)

        return call

    def _device(self, handle: Any) -> _Device:
        device = super()._device(handle)
        if str(device.gpu) in self._told("lost"):
            raise _RefusalError(GPU_IS_LOST)
        return device

    def _present(self) -> list[int]:
        return [gpu for gpu in super()._present() if str(gpu) not in self._told("gone")]

    def _told(self, switch: str) -> list[str]:
        path = self._folder / switch
        return path.read_text().split() if path.exists() else []


def library(spec: str) -> Switched:
    """Return the library: the NVML child's door."""
    told = msgspec.json.decode(spec, type=Spec)
    sys.modules["__main__"].__dict__["_library_path"] = lambda: f"{told.folder}/library"  # the child runs as a program
    return Switched(told.drill, Path(told.folder))
