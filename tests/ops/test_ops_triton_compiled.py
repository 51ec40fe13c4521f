"""The Triton backend's kernels, compiled ahead of time for GPUs that need not be there."""

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

import triton
from triton_cases import INTERPRETED, RELEASE, Case

from icnn_zoo.ops.triton_backend import (
    boxes_kernels,
    columns_kernels,
    direct_kernels,
    drawn_kernels,
    drawn_sum_kernels,
    few_kernels,
    listed_kernels,
    planes_kernels,
)


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled, and what its machine code says."""

    name: str
    num_registers: int
    stack_bytes: int
    lines: list[tuple[int, str]]

    def count(self, operation: str) -> int:
        return sum(re.match(rf"(?:@!?U?P\w+\s+)?{operation}\b", line) is not None for _, line in self.lines)

    @property
    def full_name(self) -> str:
        """The kernel's name; the columns' has a variant that also sums over pixels."""
        sums = self.name == "columns_kernel" and self.count("SHFL") > 0
        return f"{self.name} with sums" if sums else self.name

    @property
    def loop_instructions(self) -> int:
        """Length of the longest loop."""
        loops = [0]
        for address, line in self.lines:
            jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)
            if jump and int(jump[1], 16) < address:
                loops.append((address - int(jump[1], 16)) // 16 + 1)
        return max(loops)


class _Driver:
    """Stands in for a GPU's driver: enough for a launch to be compiled."""

    def __init__(self, capability: int) -> None:
        self.target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _read_machine_code(kernel: object, folder: Path) -> Compiled:
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])

    def dump(option: str) -> str:
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", dump("-sass"), re.MULTILINE)
    code = [(int(address, 16), line.replace("   ", "").strip()) for address, line in lines]
    return Compiled(kernel.metadata.name, int(usage[1]), int(usage[2]), code)


Compile = Callable[[Case, int], list[Compiled]]


@pytest.fixture
def compile_launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compile]:
    """Compiles what forward and backward of a case would launch on a GPU, with the very arguments of the launches."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    run = triton.runtime.jit.JITFunction.run
    launched: dict[int, object] = {}

    def compile_only(self: object, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched[id(kernel)] = kernel

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_only)
    previous = triton.runtime.driver._active

    def compile_launches(case: Case, capability: int) -> list[Compiled]:
        launched.clear()
        triton.runtime.driver.set_active(_Driver(capability))
        modules = (
            boxes_kernels,
            columns_kernels,
            direct_kernels,
            drawn_kernels,
            drawn_sum_kernels,
            few_kernels,
            listed_kernels,
            planes_kernels,
        )
        for kernel in [each for module in modules for each in vars(module).values()]:
            if isinstance(kernel, triton.runtime.jit.JITFunction):
                kernel.device_caches.clear()
        case.run(case.tensors())
        return [_read_machine_code(kernel, tmp_path) for kernel in launched.values()]

    yield compile_launches
    triton.runtime.driver.set_active(previous)


DENSE = Case("dense", batch=1, size=(41, 41), channels=(16, 64), kernel=(3, 3), bias=False)
CLASSIFIER = replace(DENSE, name="classifier", channels=(64, 21), dilation=(12, 12), padding=(12, 12))
GROUPED = replace(DENSE, name="grouped", channels=(64, 42), groups=2)
DEPTHWISE = replace(DENSE, name="depthwise", channels=(8, 8), groups=8, kernel=(5, 5), padding=(2, 2))
STRIDED = replace(DENSE, name="strided", stride=(2, 2))
FULL = replace(DENSE, name="full version", channels=(4, 4), shapes="kernel")

# Most instructions in the longest loop. A pass handles 8 elements a thread, the gathers of the input's gradient 4; slow
# branches and, where there are two, the inner loop are counted too. A change of a layout or mask shows here first.
LOOP_LIMITS = {
    "planes_kernel": 0,
    "transpose_kernel": 0,
    "columns_kernel": 200,  # a tap and the seven rows of a band
    "columns_kernel with sums": 300,
    "banded_input_gradient_kernel": 300,  # a tap and seven rows, inside and at a border
    "input_gradient_kernel": 190,
    "shifted_sum_kernel": 200,
    "shift_gradient_kernel": 0,
    "boxes_kernel": 60,
    "list_kernel": 560,
    "spread_kernel": 150,
    "gather_kernel": 200,
    "listed_sum_kernel": 700,
    "listed_column_gradient_kernel": 520,
    "listed_input_gradient_kernel": 480,
    "listed_columns_kernel": 570,
    "listed_weight_gradient_kernel": 400,
    "draw_kernel": 440,
    "drawn_sum_kernel": 540,  # for 280 products
    "drawn_gradient_kernel": 2250,  # with what comes once, after the loop over 560 products
    "undraw_kernel": 120,
    "direct_forward_kernel": 400,
    "direct_input_gradient_kernel": 240,
    "direct_kernel_gradient_kernel": 960,
}
# Products with tiles of 64 x 64; sums that stay in registers, of which 12 programs of a warp fit at once.
REGISTER_LIMITS = {
    "listed_column_gradient_kernel": 208,
    "drawn_gradient_kernel": 168,
}
OLDER_COMPILER = 1.0 if RELEASE >= (3, 9) else 1.4  # Triton 3.6 makes more of the same code
COLUMNS_BACKWARD = {"columns_kernel with sums", "banded_input_gradient_kernel", "transpose_kernel"}
STRIDED_BACKWARD = {"columns_kernel with sums", "input_gradient_kernel", "transpose_kernel"}
FEW = {
    "boxes_kernel",
    "list_kernel",
    "spread_kernel",
    "gather_kernel",
    "shifted_sum_kernel",
    "shift_gradient_kernel",
    "listed_sum_kernel",
    "listed_column_gradient_kernel",
    "listed_input_gradient_kernel",
    "listed_columns_kernel",
    "listed_weight_gradient_kernel",
}
DRAWN = {"draw_kernel", "drawn_sum_kernel", "drawn_gradient_kernel", "undraw_kernel"}
DIRECT = {"transpose_kernel", "direct_forward_kernel", "direct_input_gradient_kernel", "direct_kernel_gradient_kernel"}


class TestCompiled:
    """Ahead-of-time compilation for GPUs that need not be there."""

    __test__ = not INTERPRETED

    @pytest.mark.parametrize(
        ("case", "launched", "dtype", "capability"),
        [
            (DENSE, {"columns_kernel"} | COLUMNS_BACKWARD, torch.float32, 90),
            (DENSE, {"columns_kernel"} | COLUMNS_BACKWARD, torch.bfloat16, 80),
            (DENSE, {"columns_kernel"} | COLUMNS_BACKWARD, torch.bfloat16, 90),
            (STRIDED, {"columns_kernel"} | STRIDED_BACKWARD, torch.bfloat16, 90),
            (GROUPED, {"columns_kernel"} | COLUMNS_BACKWARD, torch.float32, 90),
            (GROUPED, {"columns_kernel"} | COLUMNS_BACKWARD, torch.bfloat16, 80),
            (GROUPED, {"columns_kernel"} | COLUMNS_BACKWARD, torch.float16, 90),
            (CLASSIFIER, FEW, torch.bfloat16, 80),
            (CLASSIFIER, FEW, torch.float32, 90),
            (DEPTHWISE, DRAWN, torch.float32, 80),
            (DEPTHWISE, DRAWN, torch.bfloat16, 90),
            (FULL, DIRECT, torch.bfloat16, 90),
        ],
        ids=lambda value: (
            getattr(value, "name", str(value).removeprefix("torch.")) if not isinstance(value, set) else ""
        ),
    )
    def test_registers_and_instructions(
        self, case: Case, launched: set[str], dtype: torch.dtype, capability: int, compile_launches: Compile
    ) -> None:
        kernels = compile_launches(replace(case, dtype=dtype, layout=torch.channels_last), capability)
        planes = set() if case.name in (DEPTHWISE.name, CLASSIFIER.name) else {"planes_kernel"}
        assert {kernel.full_name for kernel in kernels} == planes | launched
        for kernel in kernels:
            name = kernel.full_name
            assert kernel.stack_bytes == 0, f"{name} spills"
            assert kernel.num_registers <= REGISTER_LIMITS.get(name, 128), name
            assert kernel.loop_instructions <= LOOP_LIMITS[name] * OLDER_COMPILER, name
            if name == "listed_sum_kernel" and dtype != torch.float32:
                assert kernel.count("HGMMA" if capability == 90 else "HMMA") > 0
