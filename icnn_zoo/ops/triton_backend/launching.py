"""How kernels are launched, in less time than Triton takes to look one up."""

from __future__ import annotations

from typing import Any

import torch
import triton
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


class _Code:
    """Machine code of a kernel for a device, with the constants that are the end of its arguments."""

    def __init__(self, compiled: Any, constants: tuple[Any, ...]) -> None:
        self.compiled, self.constants = compiled, constants
        self.runner, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata

    def run(self, programs: int, device: int, arguments: tuple[Any, ...]) -> None:
        """As ``compiled[(programs, 1, 1)](*arguments)``, which makes a description of the launch for its hooks."""
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler listens
            self.compiled[(programs, 1, 1)](*arguments, *self.constants)
            return
        stream = triton.runtime.driver.active.get_current_stream(device)
        launched = (self.function, self.metadata, None, None, None)
        self.runner(programs, 1, 1, stream, *launched, *arguments, *self.constants)


_codes: dict[Any, _Code] = {}
# The same by the whole numbers themselves, which is found sooner; a layer has the same ones in each step.
_repeated: dict[Any, _Code] = {}
_MOST_REPEATED = 4096


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
    device = arguments[0].get_device()
    numbers = [
        argument if type(argument) is int else (argument.dtype, argument.data_ptr() % 16) for argument in arguments
    ]
    repeated = (id(kernel), device, *numbers, *constants, *constants.values())
    code = _repeated.get(repeated)
    if code is None:
        key = (id(kernel), device, *constants.items(), *map(_kind, arguments))
        code = _codes.get(key)
        if code is None:
            compiled = _compile_and_run(kernel, programs, arguments, constants)
            if compiled is not None:  # the interpreter compiles nothing
                names = kernel.arg_names[len(arguments) :]
                _codes[key] = _Code(compiled, tuple(constants[name] for name in names))
            return
        if len(_repeated) >= _MOST_REPEATED:
            _repeated.clear()
        _repeated[repeated] = code
    code.run(programs, device, arguments)


def _compile_and_run(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    try:
        # Fusing is said, since Triton's default is about to change: its versions should give the same results.
        return kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BackendError(
            f"its kernel {kernel.__name__} cannot be compiled: {type(error).__name__}: {reason}"
        ) from error
