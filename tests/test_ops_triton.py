"""The Triton backend without a GPU: its kernels in Triton's interpreter, and compiled ahead of time."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

import triton

from icnn_zoo.ops import operators, reference, triton_backend
from icnn_zoo.ops.geometry import Geometry, memory_format

# The interpreter takes the place of the compiler in a whole process: this file runs once more in one of its own.
INTERPRETED = bool(triton.knobs.runtime.interpret)
RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
Pair = tuple[int, int]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]


@dataclass(frozen=True)
class Case:
    """One call: sizes, geometry, and how far positions lie from the regular grid."""

    name: str = "plain"
    batch: int = 2
    size: Pair = (4, 6)
    channels: Pair = (2, 2)
    kernel: Pair = (2, 2)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    spread: float = 0.7
    bias: bool = True
    per_kernel: bool = False
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format

    @property
    def sizes(self) -> tuple[Pair, tuple[int, int, int, int], Pair, int]:
        rows, cols = self.padding
        return self.stride, (rows, rows, cols, cols), self.dilation, self.groups

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.size, self.kernel, *self.sizes)

    def tensors(self) -> Tensors:
        """Input, weight [N, C / G, kh, kw], positions, bias and the output's gradient."""
        generator = torch.Generator().manual_seed(1)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        in_channels, out_channels = self.channels
        rows, cols = (d * (torch.arange(k) - (k - 1) // 2) for d, k in zip(self.dilation, self.kernel, strict=True))
        grid = torch.cartesian_prod(rows, cols).reshape(-1, 2)
        owners = (out_channels, in_channels // self.groups) if self.per_kernel else (in_channels,)
        input = rand(self.batch, in_channels, *self.size).to(self.dtype).contiguous(memory_format=self.layout)
        grad_output = rand(self.batch, out_channels, *self.geometry.output_size)
        return (
            input,
            rand(out_channels, in_channels // self.groups, *self.kernel).to(self.dtype),
            grid + self.spread * rand(*owners, *grid.shape),
            rand(out_channels).to(self.dtype) if self.bias else None,
            grad_output.to(self.dtype).contiguous(memory_format=self.layout),
        )

    def run(self, tensors: Tensors) -> list[Tensor]:
        """Output and gradients of input, weight and positions by the Triton backend."""
        input, weight, positions, _, grad_output = tensors
        weight = weight.flatten(2)
        output = self.forward(tensors)
        grads = triton_backend.backward(grad_output, input, weight, positions, self.geometry, (True, True, True))
        assert output.dtype == input.dtype
        assert [grad.dtype for grad in grads] == [input.dtype, weight.dtype, positions.dtype]
        for result in (output, grads[0]):
            layout = memory_format(input)
            assert result.stride() == torch.empty(result.shape, device="meta", memory_format=layout).stride()
        return [output, *grads]

    def forward(self, tensors: Tensors) -> Tensor:
        """Output of the Triton backend."""
        input, weight, positions, bias, _ = tensors
        return triton_backend.forward(input, weight.flatten(2), positions, bias, self.geometry)

    def expected(self, tensors: Tensors) -> list[Tensor]:
        """The same by the reference in float64."""
        *arguments, grad_output = tensors
        output = reference.irregular_conv2d_forward(*arguments, *self.sizes)
        by_input, by_weight, by_positions, _ = reference.irregular_conv2d_backward(grad_output, *arguments, *self.sizes)
        return [output, by_input, by_weight.flatten(2), by_positions]


CASES = [
    Case(),
    Case("3x3", kernel=(3, 3), channels=(2, 3)),
    Case("no bias, channels_last", bias=False, layout=torch.channels_last),
    Case("channels_last, groups", groups=2, channels=(4, 4), layout=torch.channels_last),
    Case("stride 2", stride=(2, 2)),
    Case("unequal strides", stride=(3, 2), size=(8, 6)),
    Case("unequal strides, one is 1", stride=(1, 2)),
    Case("groups, stride and dilation", groups=2, channels=(4, 2), stride=(2, 1), dilation=(2, 3), padding=(3, 2)),
    Case("depthwise, multiplier 2", channels=(2, 4), groups=2),
    Case("depthwise, stride 2", channels=(3, 3), groups=3, stride=(2, 2)),
    Case("one input channel", channels=(1, 3)),
    Case("2x4, dilation 2", kernel=(2, 4), dilation=(2, 2), padding=(2, 2)),
    Case("1x1, stride 2", kernel=(1, 1), stride=(2, 2)),
    Case("7x7", kernel=(7, 7), padding=(3, 3), channels=(1, 1)),
    Case("large padding", padding=(4, 6)),
    Case("one pixel", size=(1, 1)),
    Case("one row, wider than a gap", size=(1, 40), spread=12.0),
    Case("batch 0", batch=0),
    Case("spread 20 px", spread=20.0),
    Case("spread 20 px, stride 2", spread=20.0, stride=(2, 2)),
    Case("spread 1e9 px", spread=1e9),
    Case("integer positions", spread=0.0),
]
PER_KERNEL = [
    Case("per kernel, groups, stride 2", per_kernel=True, groups=2, channels=(4, 4), stride=(2, 2)),
    Case("per kernel, depthwise, multiplier 2", per_kernel=True, channels=(2, 4), groups=2),
    Case("per kernel, batch 0", per_kernel=True, batch=0),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = ["columns", "fused", "direct"]
FORMS_AND_LAYOUTS = [
    ("columns", torch.contiguous_format),
    ("columns", torch.channels_last),
    ("fused", torch.channels_last),
    ("direct", torch.channels_last),
]
# The interpreter takes a second for a direct case: those that the form is for, and every third of the others.
EACH_CASE = [
    (case, form)
    for number, case in enumerate(CASES)
    for form in FORMS
    if form != "direct" or number % 3 == 0 or case.groups > 1
]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for result, truth in zip(actual, expected, strict=True):
        scale = truth.abs().max().item() if truth.numel() and truth.isfinite().all() else 1.0
        torch.testing.assert_close(result.double(), truth, rtol=0, atol=tolerance * max(scale, 1e-30), equal_nan=True)


def force(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Makes tiny sizes take a form; the full version has only one."""
    monkeypatch.setattr(triton_backend, "_is_direct", lambda w, positions, g: form == "direct" or positions.dim() == 4)
    monkeypatch.setattr(triton_backend, "_FUSED_OUTPUTS", 32 if form == "fused" else 0)


def guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts NaN before and after the planes: a read outside them shows."""
    make = triton_backend._Call.planes

    def guarded(self: triton_backend._Call, images: slice, channels: slice) -> Tensor:
        planes = make(self, images, channels)
        margin = 5000
        around = planes.new_full((planes.numel() + 2 * margin,), float("nan"))
        around[margin:-margin] = planes.flatten()
        return around[margin:-margin].view(planes.shape)

    monkeypatch.setattr(triton_backend._Call, "planes", guarded)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills memory that was not initialised with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
class TestInterpreted:
    """Collected only where the interpreter is on."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(("case", "form"), EACH_CASE, ids=lambda value: getattr(value, "name", value))
    def test_equals_the_reference(self, case: Case, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, form)
        guard(monkeypatch)
        tensors = case.tensors()
        # The backward of the fused form is that of columns.
        results = [case.forward(tensors)] if form == "fused" else case.run(tensors)
        assert_close(results, case.expected(tensors)[: len(results)])

    @pytest.mark.parametrize("case", PER_KERNEL, ids=lambda case: case.name)
    def test_full_version_equals_the_reference(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        guard(monkeypatch)
        tensors = case.tensors()
        assert_close(case.run(tensors), case.expected(tensors))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_half_precision_is_as_good_as_can_be(
        self, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At most twice the error of the formula, written in operators of the same dtype.

        The interpreter cuts bits off where a GPU rounds to bfloat16, so there this allows for twice as much.
        """
        force(monkeypatch, form)
        case = replace(CASES[0], dtype=dtype, channels=(4, 2))
        factor = 4 if dtype == torch.bfloat16 else 2
        tensors = case.tensors()
        truth = case.expected(tensors)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
        plain = operators.formula(*leaves, tensors[3], *case.sizes)
        grads = torch.autograd.grad(plain, leaves, tensors[4])
        plain_results = [plain.detach(), grads[0], grads[1].flatten(2), grads[2]]
        for result, other, exact in zip(case.run(tensors), plain_results, truth, strict=True):
            assert (result - exact).abs().max() <= factor * (other - exact).abs().max()
            assert (result - exact).norm() <= factor * (other - exact).norm()

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("batch", [3, 0])
    def test_float64_positions_and_any_strides(self, form: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, form)
        case = Case(batch=batch)
        input, weight, positions, bias, grad_output = case.tensors()
        wide = torch.full((batch, 9, 5, 4), torch.nan)
        strided = wide.permute(0, 3, 2, 1)[:, 1::2, 1:, 2:8].copy_(input)
        twisted = grad_output.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
        tensors = (strided, weight, positions.double(), bias, twisted)
        assert_close(case.run(tensors), case.expected(tensors))

    @pytest.mark.parametrize(("form", "layout"), FORMS_AND_LAYOUTS)
    def test_small_chunks(self, form: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
        """One image at a time; a part of a group's channels at a time."""
        force(monkeypatch, form)
        monkeypatch.setattr(triton_backend, "_CHUNK_BYTES", 1)
        monkeypatch.setattr(triton_backend, "_IMAGE_BYTES", 2 * 4 * 35 * 4)
        case = Case(channels=(6, 2), groups=2, layout=layout)
        tensors = case.tensors()
        assert_close(case.run(tensors), case.expected(tensors))

    def test_split_sums(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Few pixels, many channels: several programs share a sum."""
        force(monkeypatch, "fused")
        case = Case(channels=(64, 2), size=(2, 3))
        tensors = case.tensors()
        assert_close([case.forward(tensors)], case.expected(tensors)[:1])

    @pytest.mark.parametrize("value", [torch.nan, -torch.inf])
    @pytest.mark.parametrize("form", ["columns", "direct", "per kernel"])
    def test_positions_that_are_no_numbers(self, form: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """They give NaN to what they feed and to nothing else, and read nothing out of bounds."""
        force(monkeypatch, form)
        guard(monkeypatch)
        case = Case(per_kernel=form == "per kernel", groups=2, channels=(4, 2), stride=(2, 1))
        tensors = case.tensors()
        tensors[2].view(-1, 4, 2)[1, 2] = value
        results, expected = case.run(tensors), case.expected(tensors)
        for result, truth in zip(results, expected, strict=True):
            assert 0 < truth.isnan().sum() < truth.numel()
            assert result.isnan().equal(truth.isnan())
        assert_close(results, expected)

    @pytest.mark.parametrize(("form", "layout"), FORMS_AND_LAYOUTS)
    def test_infinite_pixels(self, form: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pixel that is infinite or NaN shows exactly where the equations say, the last one and its gap included."""
        force(monkeypatch, form)
        case = Case(layout=layout)
        tensors = case.tensors()
        tensors[0][0, 1, 2, 0] = torch.inf
        tensors[0][1, 0, 3, 5] = torch.nan
        results, expected = case.run(tensors), case.expected(tensors)
        for result, truth in zip(results, expected, strict=True):
            # Infinity minus infinity depends on the order of a sum.
            finite = truth.isfinite()
            assert result.isfinite().equal(finite)
            torch.testing.assert_close(result.double()[finite], truth[finite], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
    @pytest.mark.parametrize("form", ["columns", "direct"])
    def test_gradients_alone(self, form: str, needs: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, form)
        case = Case()
        input, weight, positions, _, grad_output = case.tensors()
        arguments = (grad_output, input, weight.flatten(2), positions, case.geometry)
        together = triton_backend.backward(*arguments, (True, True, True))
        alone = triton_backend.backward(*arguments, needs)
        for grad, same, wanted in zip(alone, together, needs, strict=True):
            assert (grad is None) if not wanted else torch.equal(grad, same)


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
        for kernel in vars(triton_backend._kernels()).values():
            if isinstance(kernel, triton.runtime.jit.JITFunction):
                kernel.device_caches.clear()
        case.run(case.tensors())
        return [_read_machine_code(kernel, tmp_path) for kernel in launched.values()]

    yield compile_launches
    triton.runtime.driver.set_active(previous)


DENSE = Case("dense", batch=1, size=(41, 41), channels=(16, 64), kernel=(3, 3), bias=False)
CLASSIFIER = replace(DENSE, name="classifier", channels=(64, 21), dilation=(12, 12), padding=(12, 12))
DEPTHWISE = replace(DENSE, name="depthwise", channels=(8, 8), groups=8, kernel=(5, 5), padding=(2, 2))
FULL = replace(DENSE, name="full version", channels=(4, 4), per_kernel=True)

# Most instructions in the longest loop. A pass handles 8 elements a thread, the gathers of the input's gradient 4; slow
# branches and, where there are two, the inner loop are counted too. A change of a layout or mask shows here first.
LOOP_LIMITS = {
    "planes_kernel": 0,
    "columns_kernel": 340,
    "columns_kernel with sums": 570,
    "input_gradient_kernel": 190,
    "fused_forward_kernel": 650,
    "direct_forward_kernel": 400,
    "direct_input_gradient_kernel": 240,
    "direct_kernel_gradient_kernel": 960,
}
OLDER_COMPILER = 1.0 if RELEASE >= (3, 9) else 1.4  # Triton 3.6 makes more of the same code
COLUMNS_BACKWARD = {"columns_kernel with sums", "input_gradient_kernel"}
DIRECT = {"direct_forward_kernel", "direct_input_gradient_kernel", "direct_kernel_gradient_kernel"}


def test_where_it_can_run() -> None:
    assert triton_backend.unavailable(torch.device("cpu")) == "it needs a CUDA device; the input is on cpu"
    assert triton_backend.supports(torch.bfloat16)
    assert not triton_backend.supports(torch.float64)


def test_importing_the_backend_imports_no_kernels() -> None:
    code = "import sys, icnn_zoo.ops.triton_backend; assert 'icnn_zoo.ops.triton_kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_too_large_images_are_refused() -> None:
    input = torch.empty(1, 1, 1, 1).expand(1, 1, 2**15, 2**15)
    geometry = Geometry.of(input.shape[2:], (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    with pytest.raises(ValueError, match="`input` is too large"):
        triton_backend._Call(input, torch.ones(1, 1, 1), torch.zeros(1, 1, 2), geometry)


def test_in_the_interpreter() -> None:
    """Runs the tests of `TestInterpreted`."""
    if INTERPRETED:
        return
    if RELEASE < (3, 9) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 5):
        pytest.skip("the interpreter of Triton before 3.9 needs NumPy before 2.5")
    options = ["-p", "no:cacheprovider", "--noconftest"]
    command = [sys.executable, "-m", "pytest", *options, f"{__file__}::TestInterpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class TestCompiled:
    """Ahead-of-time compilation for GPUs that need not be there."""

    __test__ = not INTERPRETED

    @pytest.mark.parametrize(
        ("case", "launched", "dtype", "capability"),
        [
            (DENSE, {"columns_kernel"} | COLUMNS_BACKWARD, torch.float32, 90),
            (DENSE, {"columns_kernel"} | COLUMNS_BACKWARD, torch.bfloat16, 80),
            (DENSE, {"columns_kernel"} | COLUMNS_BACKWARD, torch.bfloat16, 90),
            (CLASSIFIER, {"fused_forward_kernel"} | COLUMNS_BACKWARD, torch.float32, 90),
            (CLASSIFIER, {"fused_forward_kernel"} | COLUMNS_BACKWARD, torch.bfloat16, 80),
            (CLASSIFIER, {"fused_forward_kernel"} | COLUMNS_BACKWARD, torch.float16, 90),
            (DEPTHWISE, DIRECT, torch.float32, 80),
            (DEPTHWISE, DIRECT, torch.bfloat16, 90),
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
        assert {kernel.full_name for kernel in kernels} == {"planes_kernel"} | launched
        for kernel in kernels:
            name = kernel.full_name
            assert kernel.stack_bytes == 0, f"{name} spills"
            assert kernel.num_registers <= 128, name
            assert kernel.loop_instructions <= LOOP_LIMITS[name] * OLDER_COMPILER, name
            if name == "fused_forward_kernel" and dtype != torch.float32:
                assert kernel.count("HGMMA" if capability == 90 else "HMMA") > 0
