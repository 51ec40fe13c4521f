"""The kernels in CUDA C++ without a GPU: emulated on the CPU, compiled for GPUs that need not be there, and kept."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

import triton
from triton_cases import Case, assert_close

from icnn_zoo.ops import kernel_cache
from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.triton_backend import TritonBackend, columns, nvrtc, staged
from icnn_zoo.ops.triton_backend.call import Call
from icnn_zoo.ops.triton_backend.limits import Limits

STAGED = TritonBackend(Limits(staged=True))
EMULATOR = Path(__file__).with_name("emulated_cuda.cpp")
KERNELS = ("make_columns", "gather_gradient")


class Emulated:
    """In the place of a kernel on a GPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launches = 0

    def launch(self, blocks: int, task: staged.Task) -> None:
        self.library.emulate(blocks, ctypes.byref(task))
        self.launches += 1


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++, to emulate CUDA")
    folder, known = tmp_path_factory.mktemp("emulated"), {}

    def build(name: str, constants: dict[str, object]) -> ctypes.CDLL:
        macros = [f"-D{key}={value}" for key, value in {**constants, "KERNEL": name}.items()]
        key = tuple(macros)
        if key not in known:
            target = folder / f"{len(known)}.so"
            flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f'-DKERNELS="{staged.SOURCE}"']
            subprocess.run(["g++", *flags, *macros, str(EMULATOR), "-o", str(target)], check=True)
            known[key] = ctypes.CDLL(str(target))
        return known[key]

    return build


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, libraries: Callable[..., ctypes.CDLL]) -> dict[str, Emulated]:
    """Kernels run on the CPU; those that were loaded, by name."""
    kernels = {}

    def load(source: Path, name: str, device: int, threads: int, memory: int, **constants: object) -> Emulated:
        assert source == staged.SOURCE
        assert memory <= nvrtc.shared_memory(device)
        assert constants["THREADS"] == threads
        kernels[name] = Emulated(libraries(name, constants))
        return kernels[name]

    monkeypatch.setattr(nvrtc, "load", load)
    monkeypatch.setattr(nvrtc, "shared_memory", lambda device: 99 * 1024)
    monkeypatch.setattr(columns, "copy_planes", lambda planes, target: target.copy_(planes))  # by Triton otherwise
    for launch in (staged.columns_launch, staged.gradient_launch):
        launch.cache_clear()
    yield kernels
    for launch in (staged.columns_launch, staged.gradient_launch):
        launch.cache_clear()


DENSE = Case("dense", channels=(6, 5), kernel=(3, 3))
CASES = [
    DENSE,
    replace(DENSE, name="channels_last, vectors", channels=(8, 8), layout=torch.channels_last),
    replace(DENSE, name="channels_last, odd channels", channels=(7, 3), layout=torch.channels_last, bias=False),
    replace(DENSE, name="groups", groups=2, channels=(8, 6)),
    replace(DENSE, name="taps far away", spread=9.0, size=(9, 7), dilation=(2, 3), padding=(1, 4)),
    replace(DENSE, name="a larger output", size=(3, 4), padding=(4, 3), batch=3),
    replace(DENSE, name="a smaller output", size=(9, 12), padding=(0, 0), batch=1),
    replace(DENSE, name="several bands", size=(35, 5), channels=(4, 3), batch=1, layout=torch.channels_last),
    replace(DENSE, name="wide", size=(2, 71), channels=(4, 3), batch=1),
    replace(DENSE, name="one row", size=(1, 9), kernel=(1, 3), padding=(0, 1)),
    replace(DENSE, name="float16", dtype=torch.float16, layout=torch.channels_last, channels=(8, 4)),
    replace(DENSE, name="bfloat16", dtype=torch.bfloat16, layout=torch.channels_last, channels=(16, 4)),
    replace(DENSE, name="bfloat16, an odd size", dtype=torch.bfloat16, size=(5, 7), batch=3),
]


class TestEmulated:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_equals_the_reference(self, case: Case, emulated: dict[str, Emulated]) -> None:
        tensors = case.tensors()
        results = case.run(tensors, STAGED)
        assert emulated["make_columns"].launches == 2  # the weights' gradient needs them too
        assert emulated["gather_gradient"].launches == 1
        if case.dtype == torch.float32:
            assert_close(results, case.expected(tensors))
            return
        # As good as what rounds once to this dtype and sums in float32 can be.
        rounding = 2.0**-8 if case.dtype == torch.bfloat16 else 2.0**-11
        for result, truth in zip(results, case.expected(tensors), strict=True):
            assert (result - truth).norm() <= 3 * rounding * truth.norm()

    @pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
    def test_gradients_alone(self, needs: tuple[bool, bool, bool], emulated: dict[str, Emulated]) -> None:
        input, weight, positions, _, grad_output = DENSE.tensors()
        arguments = (grad_output, input, weight.flatten(2), positions, DENSE.geometry)
        together = STAGED.backward(*arguments, (True, True, True))
        for grad, same, wanted in zip(STAGED.backward(*arguments, needs), together, needs, strict=True):
            assert (grad is None) if not wanted else torch.equal(grad, same)

    def test_small_chunks(self, emulated: dict[str, Emulated]) -> None:
        """One image at a time; a part of a group's channels at a time."""
        case = replace(DENSE, groups=2, channels=(12, 6))
        limits = Limits(staged=True, chunk_bytes=1, image_bytes=2 * 9 * 24 * 4)
        tensors = case.tensors()
        assert_close(case.run(tensors, TritonBackend(limits)), case.expected(tensors))
        assert emulated["gather_gradient"].launches > 4

    @pytest.mark.parametrize("value", [(torch.nan, torch.nan), (-torch.inf, 0.5), (0.5, torch.nan)])
    def test_positions_that_are_no_numbers(self, value: tuple[float, float], emulated: dict[str, Emulated]) -> None:
        case = replace(DENSE, groups=2, channels=(8, 6))
        tensors = case.tensors()
        tensors[2].view(-1, 9, 2)[1, 2] = torch.tensor(value)
        results, expected = case.run(tensors, STAGED), case.expected(tensors)
        for result, truth in zip(results, expected, strict=True):
            assert truth.isnan().any()
            assert result.isnan().equal(truth.isnan())
        assert_close(results, expected)

    def test_infinite_pixels(self, emulated: dict[str, Emulated]) -> None:
        """A pixel that is infinite or NaN shows exactly where the equations say, and in all taps of its channel."""
        tensors = DENSE.tensors()
        tensors[0][0, 1, 2, 0] = torch.inf
        tensors[0][1, 0, 3, 5] = torch.nan
        results, expected = DENSE.run(tensors, STAGED), DENSE.expected(tensors)
        expected[3][:2] = torch.nan
        for result, truth in zip(results, expected, strict=True):
            finite = truth.isfinite()
            assert result.isfinite().equal(finite)
            torch.testing.assert_close(result.double()[finite], truth[finite], rtol=1e-4, atol=1e-4)

    def test_float64_positions_and_any_strides(self, emulated: dict[str, Emulated]) -> None:
        input, weight, positions, bias, grad_output = DENSE.tensors()
        wide = torch.full((2, 9, 5, 14), torch.nan)
        strided = wide.permute(0, 3, 2, 1)[:, 1:13:2, 1:, 2:8].copy_(input)
        tensors = (strided, weight, positions.double(), bias, grad_output)
        assert_close(DENSE.run(tensors, STAGED), DENSE.expected(tensors))

    def test_strides_are_left_to_other_kernels(self, emulated: dict[str, Emulated]) -> None:
        geometry = Geometry.of((5, 7), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1)
        assert geometry.canonical().stride == (2, 2)
        input, weight, positions, *_ = DENSE.tensors()
        call = Call(input, weight.flatten(2), positions, geometry, STAGED.limits)
        assert columns._staged(staged.columns_launch, call, slice(0, 2), None) is None


def sizes(height: int, width: int, **changes: object) -> staged.Sizes:
    geometry = Geometry.of((height, width), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    return replace(staged.Sizes(geometry, 16, 256, 9, torch.bfloat16, torch.float32, 0), **changes)


class TestSizes:
    """Which maps fit, and what is compiled for them."""

    @pytest.fixture
    def loaded(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, dict[str, object]]]:
        calls = []
        monkeypatch.setattr(nvrtc, "load", lambda source, name, device, *how, **more: calls.append((name, *how, more)))
        return calls

    @pytest.mark.parametrize(
        ("size", "memory", "columns", "gradient"),
        [
            ((41, 41), 227, True, True),
            ((65, 65), 227, True, True),
            ((76, 76), 227, True, True),
            ((77, 77), 227, False, True),
            ((100, 100), 227, False, True),
            ((101, 101), 227, False, False),
            ((41, 41), 99, True, True),
            ((65, 65), 99, False, True),
        ],
    )
    def test_what_fits(
        self,
        size: tuple[int, int],
        memory: int,
        columns: bool,
        gradient: bool,
        loaded: list,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(nvrtc, "shared_memory", lambda device: memory * 1024)
        found = [staged.columns_launch.__wrapped__(sizes(*size)), staged.gradient_launch.__wrapped__(sizes(*size))]
        assert [launch is not None for launch in found] == [columns, gradient]
        assert all(2 * how[1] <= memory * 1024 for _, *how, _ in loaded)

    def test_few_images_are_divided_among_more_blocks(self, loaded: list, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nvrtc, "shared_memory", lambda device: 227 * 1024)
        assert staged.gradient_launch.__wrapped__(sizes(41, 41)).blocks == 16 * 256 // 8
        assert staged.gradient_launch.__wrapped__(sizes(41, 41, images=2)).blocks == 2 * 256 // 2

    def test_none_without_a_gpu(self) -> None:
        assert nvrtc.shared_memory(-1) == 0
        assert staged.columns_launch(sizes(5, 5, device=-1)) is None
        assert staged.gradient_launch(sizes(5, 5, device=-1)) is None

    def test_none_without_the_drivers_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(device: int) -> int:
            raise ModuleNotFoundError("No module named 'cuda'")

        monkeypatch.setattr(nvrtc, "shared_memory", fail)
        monkeypatch.setattr(staged, "_failed", set())
        with pytest.warns(RuntimeWarning, match="slower: No module named 'cuda'"):
            assert staged.columns_launch.__wrapped__(sizes(5, 5)) is None

    def test_what_cannot_be_compiled_is_said_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("kernel.cu(3): error: no")

        monkeypatch.setattr(nvrtc, "load", fail)
        monkeypatch.setattr(nvrtc, "shared_memory", lambda device: 227 * 1024)
        monkeypatch.setattr(staged, "_failed", set())
        with pytest.warns(
            RuntimeWarning, match=r"without its kernels in CUDA C\+\+, slower: kernel.cu\(3\): error: no\.$"
        ):
            assert staged.columns_launch.__wrapped__(sizes(5, 5)) is None
        assert staged.gradient_launch.__wrapped__(sizes(5, 5)) is None


class TestCompiled:
    """By NVRTC, for GPUs that need not be there."""

    @pytest.fixture(autouse=True)
    def compiler(self) -> None:
        pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings, which comes with PyTorch for CUDA")

    @pytest.mark.parametrize("name", KERNELS)
    @pytest.mark.parametrize(
        ("dtype", "architecture"),
        [(torch.bfloat16, "sm_80"), (torch.bfloat16, "sm_90"), (torch.float16, "sm_89"), (torch.float32, "sm_120")],
    )
    def test_registers(
        self, name: str, dtype: torch.dtype, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        monkeypatch.setattr(nvrtc, "shared_memory", lambda device: 227 * 1024)
        monkeypatch.setattr(nvrtc, "load", lambda *how, **more: asked.append(more))
        find = staged.columns_launch if name == "make_columns" else staged.gradient_launch
        find.__wrapped__(sizes(41, 41, dtype=dtype))
        options = (*nvrtc.OPTIONS, *(f"-D{key}={value}" for key, value in asked[0].items()))
        path = tmp_path / "kernel.cubin"
        path.write_bytes(nvrtc.compile_for(staged.SOURCE.read_text(), architecture, options))
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(rf"Function {name}:\n\s+REG:(\d+) STACK:(\d+)", usage).groups())
        assert stack == 0
        assert registers <= (64 if name == "make_columns" else 104)

    def test_machine_code_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        source = tmp_path / "twice.cu"
        source.write_text('extern "C" __global__ void twice(int *value) { *value *= FACTOR; }\n')
        code = nvrtc._machine_code(source, "sm_90", ("-DFACTOR=2",))
        (kept,) = (tmp_path / "icnn_zoo" / "cuda").iterdir()
        monkeypatch.setattr(nvrtc, "compile_for", lambda *_: pytest.fail("compiled again"))
        assert nvrtc._machine_code(source, "sm_90", ("-DFACTOR=2",)) == code
        kept.write_bytes(kept.read_bytes()[:-70])
        with pytest.raises(pytest.fail.Exception):
            nvrtc._machine_code(source, "sm_90", ("-DFACTOR=2",))

    def test_code_that_cannot_be_kept_is_used_all_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(path: Path) -> None:
            raise OSError("No space left on device")

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(kernel_cache, "seal", fail)
        source = tmp_path / "nothing.cu"
        source.write_text('extern "C" __global__ void nothing() {}\n')
        assert nvrtc._machine_code(source, "sm_90", ())
        assert list((tmp_path / "icnn_zoo" / "cuda").iterdir()) == []

    def test_an_error_is_the_compilers(self) -> None:
        with pytest.raises(RuntimeError, match=r'kernel.cu\(1\): error: identifier "nothing" is undefined'):
            nvrtc.compile_for("__device__ int x = nothing;", "sm_90", ())
