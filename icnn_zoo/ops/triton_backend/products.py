"""Matrix products by cuBLAS, with the precision and the promises that cuDNN's convolutions have."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Leading dimensions that are multiples of this many elements let cuBLAS take its fast kernels in every dtype.
ALIGNMENT = 8

_switching = threading.RLock()


def follows_tf32() -> bool:
    """Whether cuDNN may round the factors of a float32 convolution to TF32, PyTorch's default; so may this backend."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def uses_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products of this dtype run at the speed of tensor cores."""
    return dtype != torch.float32 or follows_tf32()


def _as_convolutions(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Sets what PyTorch keeps for matrix products to what it keeps for convolutions, for a moment and where it differs.

    TF32 is off for products and on for convolutions by default. Deterministic mode refuses products by cuBLAS unless an
    environment variable is set, as cuBLAS may give other bits where streams share its workspace; PyTorch gives each
    stream its own. To be called with the lock, which keeps what one thread has set from being read by others.
    """
    level = torch.get_deterministic_debug_mode()
    precision = torch.backends.cuda.matmul.fp32_precision if dtype == torch.float32 else ""
    switch = dtype == torch.float32 and (precision == "tf32") != follows_tf32()
    return _set(level, precision, switch) if level or switch else _NOTHING_TO_SET


_NOTHING_TO_SET = contextlib.nullcontext()


@contextlib.contextmanager
def _set(level: int, precision: str, switch: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    if level:
        torch.set_deterministic_debug_mode(0)
    if switch:
        matmul.allow_tf32 = precision != "tf32"
    try:
        yield
    finally:
        if switch:
            matmul.allow_tf32 = precision == "tf32"
            matmul.fp32_precision = precision  # "none", which follows more general settings, where it was that
        if level:
            torch.set_deterministic_debug_mode(level)


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Batched product [g, m, n] of [g, m, k] and [g, k, n], plus a bias [g, m, 1]."""
    with _switching, _as_convolutions(left.dtype):
        if bias is None:
            return torch.bmm(left, right, out=out)
        return torch.baddbmm(bias, left, right, out=out)


def multiply_float32(left: Tensor, right: Tensor) -> Tensor:
    """Batched product with a float32 result, whatever the dtype of its factors."""
    if left.dtype == torch.float32:
        return multiply(left, right)
    if left.device.type != "cuda":
        return multiply(left.float(), right.float())  # `out_dtype` is for CUDA; the kernels' tests run on a CPU
    with _switching, _as_convolutions(left.dtype):
        return torch.bmm(left, right, out_dtype=torch.float32)


def round_up(elements: int, step: int = ALIGNMENT) -> int:
    """The next multiple of ``step``."""
    return -(-elements // step) * step
