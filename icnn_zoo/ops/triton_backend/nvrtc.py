"""Kernels in CUDA C++, compiled on the first use by NVRTC, which comes with PyTorch, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from icnn_zoo.io.files import replacing
from icnn_zoo.ops import kernel_cache

OPTIONS = ("--std=c++17",)


class Kernel:
    """A kernel on a device.

    Args:
        function: The driver's handle.
        device: Number of the device.
        threads: Threads of a block.
        memory: Bytes of shared memory of a block.
    """

    def __init__(self, function: Any, device: int, threads: int, memory: int) -> None:
        from cuda.bindings import driver

        self._launch = driver.cuLaunchKernel
        self._function, self._device, self._threads, self._memory = function, device, threads, memory

    def launch(self, blocks: int, task: ctypes.Structure) -> None:
        """Runs so many blocks on the current stream; the kernel's only argument is a structure.

        Raises:
            RuntimeError: The driver refuses.
        """
        _enter_context(self._device)
        parameters = ctypes.c_void_p(ctypes.addressof(task))
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        sizes = (blocks, 1, 1, self._threads, 1, 1, self._memory)
        (status,) = self._launch(self._function, *sizes, stream, ctypes.addressof(parameters), 0)
        if status:
            raise RuntimeError(f"A kernel cannot be launched: {status.name}.")


def load(source: Path, name: str, device: int, threads: int, memory: int, **constants: object) -> Kernel:
    """Loads a kernel, compiled before or now.

    Args:
        source: A file in CUDA C++.
        name: The kernel, ``extern "C"``.
        device: Number of the device, the current one.
        threads: Threads of a block.
        memory: Bytes of shared memory of a block.
        **constants: Macros.

    Raises:
        RuntimeError: It cannot be compiled or loaded.
        ImportError: There is no ``cuda.bindings``.
    """
    options = (*OPTIONS, *(f"-D{key}={value}" for key, value in sorted(constants.items())))
    return Kernel(_function(source, name, device, options), device, threads, memory)


@functools.cache
def _function(source: Path, name: str, device: int, options: tuple[str, ...]) -> Any:
    """The driver's handle of a kernel, which may have all the shared memory there is."""
    from cuda.bindings import driver

    _enter_context(device)
    module = _checked(driver.cuModuleLoadData(_machine_code(source, _architecture(device), options)))
    function = _checked(driver.cuModuleGetFunction(module, name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, attribute, shared_memory(device)))
    return function


def _enter_context(device: int) -> None:
    """Gives a thread that is new to the GPU the context that PyTorch uses."""
    from cuda.bindings import driver

    if not int(_checked(driver.cuCtxGetCurrent())):
        context = driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device)))
        _checked(driver.cuCtxSetCurrent(_checked(context)))


def _architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _machine_code(source: Path, architecture: str, options: tuple[str, ...]) -> bytes:
    """The machine code, from the cache where it is there and the user has one."""
    from cuda.bindings import nvrtc

    text = source.read_text(encoding="utf-8")
    version = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
    key = hashlib.sha256("\0".join((text, architecture, version, *options)).encode()).hexdigest()[:16]
    try:
        folder = kernel_cache.private_folder("cuda")
    except OSError:  # there is none: each process compiles
        return compile_for(text, architecture, options)
    target = folder / f"{source.stem}-{architecture}-{key}.cubin"
    code = kernel_cache.read_intact(target)
    if code is None:
        code = compile_for(text, architecture, options)
        with contextlib.suppress(OSError):  # a full disk: it is compiled again next time
            kernel_cache.remove_leftovers(folder, f".{source.stem}-*")
            with replacing(target) as partial:
                partial.write_bytes(code)
                kernel_cache.seal(partial)
    return code


def compile_for(text: str, architecture: str, options: tuple[str, ...]) -> bytes:
    """Compiles CUDA C++ for an architecture, such as "sm_90", whose GPU need not be here.

    Raises:
        RuntimeError: It is not to be compiled; the message has the compiler's first line that says why.
    """
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))
    every = [option.encode() for option in (f"--gpu-architecture={architecture}", *options)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(every), every)
    if status:
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        lines = log.decode(errors="replace").strip("\0\n ").splitlines()
        raise RuntimeError(next((line for line in lines if "error" in line), status.name))
    code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver or the compiler gives, after its status."""
    status, *values = result
    if status:
        raise RuntimeError(f"the driver says {status.name}")
    return values[0] if values else None


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that a block may have; none where there is no GPU."""
    if device < 0:
        return 0
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_checked(driver.cuDeviceGetAttribute(attribute, _checked(driver.cuDeviceGet(device)))))
