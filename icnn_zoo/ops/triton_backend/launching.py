"""How kernels are launched, in less time than Triton takes to look one up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops.backends import BackendError


def num_blocks(elements: int, block: int) -> int:
    """How many blocks cover so many elements."""
    return -(-elements // block)


def block_size(elements: int, largest: int) -> int:
    """A power of two for so many elements: full blocks, or one that is not much too large."""
    return min(largest, max(128, 1 << (elements - 1).bit_length()))


def _kind(argument: Any) -> Any:
    """What of an argument decides which machine code runs: dtype and alignment, or the width of a whole number."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument == 1, argument % 16 == 0, argument.bit_length() > 31


_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Runs a kernel as so many programs.

    Args:
        kernel: A function that Triton compiles; what is constant comes last in its signature.
        programs: Size of the grid.
        *arguments: Tensors, the first on the device to run on, and whole numbers, in the order of the signature.
        **constants: The constants of the signature and options of the compiler.

    Raises:
        BackendError: The kernel cannot be compiled or loaded.
    """
    key = (kernel, arguments[0].device, *constants.items(), *map(_kind, arguments))
    known = _compiled.get(key)
    if known is not None:
        compiled, tail = known
        compiled[(programs, 1, 1)](*arguments, *tail)
        return
    try:
        # Fusing is said, since Triton's default is about to change: its versions should give the same results.
        compiled = kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BackendError(
            f"its kernel {kernel.__name__} cannot be compiled: {type(error).__name__}: {reason}"
        ) from error
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
