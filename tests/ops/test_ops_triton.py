"""The Triton backend without a GPU: its kernels in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import (
    CASES,
    DRAWN,
    DTYPES,
    FEW,
    FEW_CASES,
    FORMS,
    INTERPRETED,
    PER_KERNEL,
    RELEASE,
    Case,
    Guarded,
    assert_close,
    surround,
)

import icnn_zoo
from icnn_zoo.ops import backends, formula
from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.torch_backend import TorchBackend
from icnn_zoo.ops.triton_backend import TritonBackend, boxes, call, columns, few, products

FORMS_AND_LAYOUTS = [
    ("columns", torch.contiguous_format),
    ("columns", torch.channels_last),
    ("direct", torch.channels_last),
]
# The interpreter takes a second for a direct case: every third.
EACH_CASE = [(case, form) for number, case in enumerate(CASES) for form in FORMS if form != "direct" or number % 3 == 0]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills memory that was not initialized with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # by Triton before 3.9
class TestInterpreted:
    """Collected only where the interpreter is on."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(("case", "form"), EACH_CASE, ids=lambda value: getattr(value, "name", value))
    def test_equals_the_reference(self, case: Case, form: str) -> None:
        backend = Guarded(FORMS[form])
        tensors = case.tensors()
        assert_close(case.run(tensors, backend), case.expected(tensors))

    @pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.name)
    @pytest.mark.parametrize("chunk_bytes", [1, 2**29])
    def test_few_outputs_equal_the_reference(self, case: Case, chunk_bytes: int) -> None:
        backend = Guarded(replace(FEW, chunk_bytes=chunk_bytes))
        tensors = case.tensors()
        assert_close(case.run(tensors, backend), case.expected(tensors))

    @pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
    def test_drawn_kernels_equal_the_reference(self, case: Case) -> None:
        input, *parameters, grad_output = case.tensors()
        tensors = (surround(input), *parameters, surround(grad_output))
        assert_close(case.run(tensors), case.expected(tensors))

    @pytest.mark.parametrize("case", PER_KERNEL, ids=lambda case: case.name)
    def test_full_version_equals_the_reference(self, case: Case) -> None:
        backend = Guarded()
        tensors = case.tensors()
        assert_close(case.run(tensors, backend), case.expected(tensors))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_half_precision_is_as_good_as_can_be(self, dtype: torch.dtype, form: str) -> None:
        """At most twice the error of the formula, written in operators of the same dtype.

        The interpreter cuts bits off where a GPU rounds to bfloat16, so there this allows for twice as much.
        """
        backend = TritonBackend(FORMS[form])
        case = replace(CASES[0], dtype=dtype, channels=(4, 2))
        factor = 4 if dtype == torch.bfloat16 else 2
        tensors = case.tensors()
        truth = case.expected(tensors)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
        plain = formula.irregular_conv2d(*leaves, tensors[3], *case.sizes)
        grads = torch.autograd.grad(plain, leaves, tensors[4])
        plain_results = [plain.detach(), grads[0], grads[1].flatten(2), grads[2]]
        for result, other, exact in zip(case.run(tensors, backend), plain_results, truth, strict=True):
            assert (result - exact).abs().max() <= factor * (other - exact).abs().max()
            assert (result - exact).norm() <= factor * (other - exact).norm()

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("batch", [3, 0])
    def test_float64_positions_and_any_strides(self, form: str, batch: int) -> None:
        backend = TritonBackend(FORMS[form])
        case = Case(batch=batch)
        input, weight, positions, bias, grad_output = case.tensors()
        wide = torch.full((batch, 9, 5, 4), torch.nan)
        strided = wide.permute(0, 3, 2, 1)[:, 1::2, 1:, 2:8].copy_(input)
        twisted = grad_output.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
        tensors = (strided, weight, positions.double(), bias, twisted)
        assert_close(case.run(tensors, backend), case.expected(tensors))

    @pytest.mark.parametrize(("form", "layout"), FORMS_AND_LAYOUTS)
    def test_small_chunks(self, form: str, layout: torch.memory_format) -> None:
        """One image at a time; a part of a group's channels at a time."""
        backend = TritonBackend(replace(FORMS[form], chunk_bytes=1, image_bytes=2 * 4 * 35 * 4))
        case = Case(channels=(6, 2), groups=2, layout=layout)
        tensors = case.tensors()
        assert_close(case.run(tensors, backend), case.expected(tensors))

    def test_tensors_that_require_gradients(self) -> None:
        """As an exported network calls the operator: autograd is not the backend's task."""
        case = Case(channels=(2, 2), size=(2, 3))
        tensors = case.tensors()
        for tensor in tensors[:4]:
            tensor.requires_grad_()
        assert not any(result.requires_grad for result in case.run(tensors, TritonBackend(FORMS["columns"])))

    @pytest.mark.parametrize("value", [(torch.nan, torch.nan), (-torch.inf, 0.5), (0.5, torch.nan)])
    @pytest.mark.parametrize("form", ["columns", "direct", "few", "drawn", "per kernel"])
    def test_positions_that_are_no_numbers(self, form: str, value: tuple[float, float]) -> None:
        """They give NaN to what they feed and to nothing else, and read nothing out of bounds."""
        limits = {**FORMS, "few": FEW}.get(form)  # others take their form anyway
        backend = Guarded(limits)
        groups = {"few": 1, "drawn": 4}.get(form, 2)
        shapes = "kernel" if form == "per kernel" else "channel"
        case = Case(shapes=shapes, groups=groups, channels=(4, max(2, groups)), stride=(2, 1))
        tensors = case.tensors()
        tensors[2].view(-1, 4, 2)[1, 2] = torch.tensor(value)
        results, expected = case.run(tensors, backend), case.expected(tensors)
        for result, truth in zip(results, expected, strict=True):
            assert truth.isnan().any()
            assert groups == 1 or not truth.isnan().all()
            assert result.isnan().equal(truth.isnan())
        assert_close(results, expected)

    @pytest.mark.parametrize(("form", "layout"), FORMS_AND_LAYOUTS)
    def test_infinite_pixels(self, form: str, layout: torch.memory_format) -> None:
        """A pixel that is infinite or NaN shows exactly where the equations say, the last one and its gap included."""
        backend = TritonBackend(FORMS[form])
        case = Case(layout=layout)
        tensors = case.tensors()
        tensors[0][0, 1, 2, 0] = torch.inf
        tensors[0][1, 0, 3, 5] = torch.nan
        results, expected = case.run(tensors, backend), case.expected(tensors)
        for result, truth in zip(results, expected, strict=True):
            # Infinity minus infinity depends on the order of a sum.
            finite = truth.isfinite()
            assert result.isfinite().equal(finite)
            torch.testing.assert_close(result.double()[finite], truth[finite], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("form", ["columns", "direct"])
    def test_the_gradient_of_weights_does_not_depend_on_them(self, form: str) -> None:
        """Not even where they are no numbers: products of columns cover more than the pixels."""
        case = Case(layout=torch.channels_last)
        tensors = case.tensors()
        tensors[1][0, 0, 0, 0] = torch.nan
        result, expected = case.run(tensors, TritonBackend(FORMS[form]))[2], case.expected(tensors)[2]
        assert expected.isfinite().all()
        assert_close([result], [expected])

    @pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
    @pytest.mark.parametrize("form", ["columns", "direct"])
    def test_gradients_alone(self, form: str, needs: tuple[bool, bool, bool]) -> None:
        backend = TritonBackend(FORMS[form])
        case = Case()
        input, weight, positions, _, grad_output = case.tensors()
        arguments = (grad_output, input, weight.flatten(2), positions, case.geometry)
        together = backend.backward(*arguments, (True, True, True))
        alone = backend.backward(*arguments, needs)
        for grad, same, wanted in zip(alone, together, needs, strict=True):
            assert (grad is None) if not wanted else torch.equal(grad, same)


def test_where_it_can_run() -> None:
    assert TritonBackend().unavailable(torch.device("cpu")) == "it needs a CUDA device; the input is on cpu"
    assert TritonBackend().supports(torch.bfloat16)
    assert not TritonBackend().supports(torch.float64)


def test_importing_the_backend_imports_no_kernels() -> None:
    code = (
        "import sys, icnn_zoo; from icnn_zoo.ops.triton_backend import TritonBackend; TritonBackend();"
        "assert not [name for name in sys.modules if name.endswith('_kernels') or name == 'triton']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_auto_leaves_images_that_are_too_large_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self, device: None)
    arguments = (torch.device("cpu"), torch.bfloat16)
    small, large = (Geometry.of((size, size), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1) for size in (9, 2**15))
    assert backends.choose_backend("auto", *arguments, small) == "triton"
    assert backends.choose_backend("auto", *arguments, large) != "triton"
    with pytest.raises(RuntimeError, match=r"`input` is too large for it.*images of 32768 x 32768"):
        backends.choose_backend("triton", *arguments, large)


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="Triton runs here")
def test_a_kernel_that_does_not_compile_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TritonBackend()  # Triton finds no driver here
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self, device: self._failures.get(device))
    monkeypatch.setattr(backends, "_packaged", {"triton": backend, "torch": TorchBackend()}.__getitem__)
    monkeypatch.setattr(backends, "PACKAGED", {"triton": "", "torch": ""})
    input, weight, positions = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3), torch.randn(2, 9, 2)
    with pytest.raises(RuntimeError, match="`backend`='triton' cannot run: its kernel planes_kernel cannot be"):
        icnn_zoo.irregular_conv2d(input, weight, positions, backend="triton")
    backend._failures.clear()
    with pytest.warns(RuntimeWarning, match="'triton' cannot run on cpu: its kernel planes_kernel cannot be compiled"):
        output = icnn_zoo.irregular_conv2d(input, weight, positions)
    assert output.equal(icnn_zoo.irregular_conv2d(input, weight, positions))  # warns no more


class Operators(TorchDispatchMode):
    """Counts the operators that run, without views: on a GPU each takes the CPU as long as a small kernel runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not operator.is_view
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("form", "most"), [("columns", (6, 14)), ("few", (10, 20))])
def test_few_operators_run_beside_the_kernels(
    form: str, most: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = FEW if form == "few" else FORMS[form]
    for each in (boxes, call, columns, few):
        monkeypatch.setattr(each, "launch", lambda *arguments, **constants: None)
    case = Case(channels=(8, 8), layout=torch.channels_last, bias=False)
    input, weight, positions, _, grad_output = case.tensors()
    with Operators() as forward:
        case.forward((input, weight, positions, None, grad_output), TritonBackend(limits))
    with Operators() as backward:
        arguments = (grad_output, input, weight.flatten(2), positions, case.geometry)
        TritonBackend(limits).backward(*arguments, (True, True, True))
    assert forward.count <= most[0]
    assert backward.count <= most[1]


def test_products_follow_what_is_set_for_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """And deterministic mode asks for no environment variable; afterwards all is as before."""
    matmul = torch.backends.cuda.matmul
    seen: list[tuple[bool, int]] = []
    multiply = torch.bmm

    def bmm(*arguments: object, **options: object) -> Tensor:
        seen.append((matmul.allow_tf32, torch.get_deterministic_debug_mode()))
        return multiply(*arguments, **options)

    monkeypatch.setattr(torch, "bmm", bmm)
    ones = torch.ones(1, 2, 2)
    before = matmul.fp32_precision
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    torch.set_deterministic_debug_mode("warn")
    try:
        products.multiply(ones, ones)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            products.multiply(ones, ones)
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode("default")
    assert seen == [(True, 0), (False, 0)]
    assert (matmul.allow_tf32, matmul.fp32_precision) == (False, before)


def test_in_the_interpreter() -> None:
    """Runs the tests of `TestInterpreted`."""
    if INTERPRETED:
        return
    if RELEASE < (3, 9) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.9 needs NumPy before 2.4")
    options = ["-p", "no:cacheprovider", "--noconftest"]
    command = [sys.executable, "-m", "pytest", *options, f"{__file__}::TestInterpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
