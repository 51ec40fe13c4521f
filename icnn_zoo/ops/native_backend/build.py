"""The C kernel as a loaded library: the wheel's, else compiled on the first use and kept in the user's cache.

Where there is no folder that is the user's own (:mod:`icnn_zoo.ops.kernel_cache`), the library lives in a temporary one
until it is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from icnn_zoo.io.files import replacing
from icnn_zoo.ops import kernel_cache
from icnn_zoo.ops.native_backend import wheel

# Nobody asks for floating-point exceptions, for whose sake compilers leave loops with conditions to scalar code.
FLAGS = ("-O3", "-fno-trapping-math", "-std=gnu11", "-fPIC", "-shared", "-pthread")
# For this processor; where a compiler does not know the option, code for all processors of its kind.
_TUNED = ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",)
SYSTEMS = ("linux", "darwin")
_FOLDER = Path(__file__).with_name("csrc")
_HEADERS, SOURCES = (sorted(_FOLDER.glob(pattern)) for pattern in ("*.h", "*.c"))


@functools.cache
def load() -> tuple[wheel.Libraries, str | None]:
    """The kernel's libraries by dtype, and why there are none; warns once of what a user can change."""
    if sys.platform not in SYSTEMS:
        return {}, f"it was made for Linux and macOS; on {sys.platform} the backend torch computes"
    try:
        return wheel.load() or _load_anywhere(_find_compiler()), None
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error)
    warnings.warn(
        f"`irregular_conv2d` runs on CPUs without its native backend, up to 14 times slower: {reason}.",
        RuntimeWarning,
        stacklevel=2,
    )
    return {}, reason


def call(name: str, dtype: torch.dtype, task: ctypes.Structure, *options: int) -> int:
    """Calls a function of the library with a task, on PyTorch's threads.

    Returns:
        What it says: 0 where it is done, and above 1 why it will not be.

    Raises:
        MemoryError: There is no memory for a thread's buffer.
    """
    function: Callable[..., int] = getattr(load()[0][dtype], name)
    threads = ctypes.c_uint(torch.get_num_threads())
    status = function(ctypes.c_void_p(find_parallel()), threads, ctypes.byref(task), *options)
    if status == 1:
        raise MemoryError("`irregular_conv2d` found no memory for a thread's buffer.")
    return status


@functools.cache
def find_parallel() -> int | None:
    """Address of what starts work on the threads of PyTorch's pool: GNU's OpenMP and what is compatible has it.

    None where there is none, as on macOS; the kernel then starts threads of its own for each call.
    """
    maps = Path("/proc/self/maps")
    # Where the process has it: packagers move it away from the Python files.
    mapped = [line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()] if maps.is_file() else []
    path = next((path for path in mapped if Path(path).name.startswith("libtorch_cpu.so")), None)
    address = None if path is None else getattr(ctypes.CDLL(path), "GOMP_parallel", None)
    return None if address is None else ctypes.cast(address, ctypes.c_void_p).value


def _find_compiler() -> list[str]:
    """The compiler's command, which may have options and a launcher such as ccache.

    Raises:
        ValueError: $CC cannot be read.
        RuntimeError: There is none.
    """
    try:
        command = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise ValueError(f"$CC, {os.environ['CC']!r}, is not a command line: {error}") from None
    command = command or next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), [])
    if not command:
        raise RuntimeError("it needs a C compiler on the first use (cc, gcc or clang on the PATH, or $CC)")
    return command


def _run(compiler: list[str], *options: str) -> str:
    """What a compiler prints.

    Raises:
        RuntimeError: It cannot be run or fails; the message has its first line that says so.
    """
    try:
        done = subprocess.run([*compiler, *options], capture_output=True, text=True, check=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or ["no message"]
        line = next((line for line in lines if "error" in line), lines[0])
        raise RuntimeError(f"compiling it with {shlex.join(compiler)!r} failed: {line}") from error
    return done.stdout


def _load_anywhere(compiler: list[str]) -> wheel.Libraries:
    """Loads the libraries of the user's cache, or of a temporary folder."""
    texts = [source.read_text() for source in (*_HEADERS, *SOURCES)]
    parts = [*texts, *FLAGS, *_TUNED, *compiler, _run(compiler, "--version"), _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    try:
        return _load_from(kernel_cache.private_folder("native"), key, compiler)
    except OSError as error:
        warnings.warn(
            f"`irregular_conv2d` compiles its C kernel in a temporary folder, for this process only: {error}. Set "
            "XDG_CACHE_HOME to a folder of your own to keep it.",
            RuntimeWarning,
            stacklevel=2,
        )
    with tempfile.TemporaryDirectory(prefix="icnn_zoo-") as folder:
        return _load_from(Path(folder), key, compiler)


def _load_from(folder: Path, key: str, compiler: list[str]) -> wheel.Libraries:
    libraries = {}
    for dtype, real in wheel.REALS.items():
        target = folder / f"native-{real}-{key}.so"
        if kernel_cache.read_intact(target) is None:
            _compile(compiler, real, target)
        libraries[dtype] = wheel.open_library(target)
    return libraries


def _compile(compiler: list[str], real: str, target: Path) -> None:
    """Compiles a library and appends its digest; leftovers of compilations that were killed go."""
    kernel_cache.remove_leftovers(target.parent, ".native-*")
    with replacing(target) as partial:
        task = (*FLAGS, f"-DREAL={real}", *map(str, SOURCES), "-o", str(partial))
        try:
            _run(compiler, *_TUNED, *task)
        except RuntimeError:
            _run(compiler, *task)
        kernel_cache.seal(partial)


def _processor() -> str:
    """What tuning for this processor depends on: a cache may be shared by several machines."""
    return "".join([platform.machine(), platform.processor(), *sorted(wheel.processor_lines())])
