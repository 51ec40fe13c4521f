"""The backends that the parts measure; on a CPU, in Triton's interpreter, with limits that tiny sizes go through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from icnn_zoo.ops import register_backend, unregister_backend
from icnn_zoo.ops.triton_backend import Limits, TritonBackend

SMALL = Limits(direct_product=4, few_channels=4)


class _Anywhere(TritonBackend):
    def unavailable(self, device: object) -> None:
        return None


@contextlib.contextmanager
def backend(rehearsal: bool) -> Iterator[str]:
    """The name of the backend to measure; that with kernels in CUDA C++ is "staged" meanwhile."""
    kind, limits = (_Anywhere, SMALL) if rehearsal else (TritonBackend, Limits())
    made = {"staged": kind(replace(limits, staged=True))}
    if rehearsal:
        made["rehearsal"] = kind(limits)
    for name, each in made.items():
        register_backend(name, each)
    try:
        yield "rehearsal" if rehearsal else "triton"
    finally:
        for name in made:
            unregister_backend(name)
