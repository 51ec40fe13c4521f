"""Where C reaches tensors: each address is given after it was held against what C will touch."""

from __future__ import annotations

import torch
from torch import Tensor


def address_of(name: str, tensor: Tensor, dtype: torch.dtype, length: int) -> int:
    """The address of a tensor's numbers.

    Args:
        name: What to call it in messages.
        tensor: The tensor.
        dtype: What C takes it for.
        length: How many numbers C will touch.

    Raises:
        ValueError: It is something else.
    """
    plain = tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()
    if tensor.dtype != dtype or tensor.numel() != length or not plain:
        raise ValueError(
            f"`{name}` must be {length} contiguous numbers of {dtype} on a CPU for the native backend; got "
            f"{list(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()} on {tensor.device}."
        )
    return tensor.data_ptr()
