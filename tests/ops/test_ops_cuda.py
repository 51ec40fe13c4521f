"""The Triton backend on a GPU: the same numbers as the reference, bit for bit the same on every run."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_cases import (
    CASES,
    DRAWN,
    DTYPES,
    FEW,
    FEW_CASES,
    FORMS,
    INTERPRETED,
    PER_KERNEL,
    Case,
    Guarded,
    Tensors,
    assert_close,
)
from wide_cases import KINDS, LAYOUTS, arguments, run

from icnn_zoo.ops import formula
from icnn_zoo.ops.triton_backend import Limits, TritonBackend, few

REASON = TritonBackend().unavailable(torch.device("cuda")) if torch.cuda.is_available() else "it needs a CUDA device"
if REASON is not None or INTERPRETED:
    pytest.skip(f"the Triton backend cannot run: {REASON or 'its interpreter is on'}", allow_module_level=True)

# Sizes of real layers, and what is odd about them: more than one block, rows of columns that need padding.
LARGE = [
    Case("dense", size=(41, 41), channels=(256, 256), kernel=(3, 3), padding=(2, 2), dilation=(2, 2)),
    Case("dense, 21 outputs", size=(41, 41), channels=(512, 21), kernel=(3, 3), padding=(12, 12), dilation=(12, 12)),
    Case("dense, stride 2", size=(65, 67), channels=(64, 128), kernel=(3, 3), stride=(2, 2)),
    Case("groups of 16", size=(28, 28), channels=(128, 128), kernel=(3, 3), groups=8),
    Case("groups of 4", size=(28, 28), channels=(128, 128), kernel=(3, 3), groups=32),
    Case("depthwise 5x5", size=(20, 20), channels=(672, 672), kernel=(5, 5), padding=(2, 2), groups=672),
    Case("depthwise 7x7, batch 65", batch=65, size=(7, 7), channels=(96, 96), kernel=(7, 7), padding=(3, 3), groups=96),
    Case("full version", size=(20, 20), channels=(32, 32), kernel=(3, 3), shapes="kernel"),
]
MEMORY = [torch.contiguous_format, torch.channels_last]


def on_gpu(case: Case) -> Tensors:
    input, weight, positions, bias, grad_output = case.tensors()
    bias = None if bias is None else bias.cuda()
    return input.cuda(), weight.cuda(), positions.cuda(), bias, grad_output.cuda()


def differentiate(case: Case, tensors: Tensors, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients by autograd through the formula, every step in one dtype."""
    input, weight, positions, bias, grad_output = tensors
    leaves = [input.to(dtype), weight.to(dtype), positions.double() if dtype == torch.float64 else positions]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = formula.irregular_conv2d(*leaves, None if bias is None else bias.to(dtype), *case.sizes)
    grads = torch.autograd.grad(output, leaves, grad_output.to(dtype))
    return [output.detach(), grads[0], grads[1].flatten(2), grads[2]]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reduced precision within cuBLAS and cuDNN is the user's choice; errors are measured without it."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [*CASES, *PER_KERNEL], ids=lambda case: case.name)
def test_equals_the_reference(case: Case, form: str) -> None:
    backend = Guarded(FORMS[form])
    tensors = on_gpu(case)
    assert_close(case.run(tensors, backend), case.expected(tensors))


@pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.name)
def test_few_outputs_equal_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which takes this way only with TF32: the products are made exact behind its back."""
    monkeypatch.setattr(few, "uses_tensor_cores", lambda dtype: True)
    tensors = on_gpu(case)
    assert_close(case.run(tensors, Guarded(FEW)), case.expected(tensors))


@pytest.mark.parametrize(("stride", "extent"), [(1, None), (2, (3, 5))])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_triangles_and_gaussians_equal_the_reference(kind, layout, stride, extent) -> None:
    """By standard operators, which is what "auto" takes for them."""
    tensors = arguments(kind, layout)
    there = [tensor.detach().float().cuda().requires_grad_() for tensor in tensors]
    expected = run(tensors, kind, layout, stride, extent, "reference")
    output = run(there, kind, layout, stride, extent, "auto")
    wanted = [expected, *torch.autograd.grad(expected.square().sum(), tensors)]
    found = [output, *torch.autograd.grad(output.square().sum(), there)]
    for ours, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
def test_drawn_kernels_equal_the_reference(case: Case) -> None:
    tensors = on_gpu(case)
    assert_close(case.run(tensors, Guarded()), case.expected(tensors))


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_error_is_at_most_twice_that_of_plain_operators(
    case: Case, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    case = replace(case, dtype=dtype, layout=layout)
    tensors = on_gpu(case)
    truth, plain = differentiate(case, tensors, torch.float64), differentiate(case, tensors, dtype)
    for result, other, exact in zip(case.run(tensors), plain, truth, strict=True):
        rounding = torch.finfo(torch.float32).eps * exact.abs().max()  # in float32 a single error is luck
        assert (result - exact).norm() <= 2 * (other - exact).norm() + rounding
        assert (result - exact).abs().max() <= 2 * (other - exact).abs().max() + rounding


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_two_runs_are_equal_bit_for_bit(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    case = replace(case, dtype=dtype, layout=layout)
    tensors = on_gpu(case)
    first = case.run(tensors)
    occupied = torch.randn(2**24, device="cuda")  # other memory, other neighbors
    for result, again in zip(first, case.run(tensors), strict=True):
        assert torch.equal(result, again)
    del occupied


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_chunks_do_not_matter(case: Case, layout: torch.memory_format) -> None:
    case = replace(case, layout=layout)
    tensors = on_gpu(case)
    whole = case.run(tensors)
    small = TritonBackend(Limits(chunk_bytes=1, image_bytes=2**20))
    for result, same in zip(case.run(tensors, small), whole, strict=True):
        torch.testing.assert_close(result, same, rtol=1e-4, atol=1e-5 * same.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_positions_that_are_no_numbers(value: float, dtype: torch.dtype, form: str) -> None:
    backend = Guarded(FORMS[form])
    case = Case(groups=2, channels=(4, 2), stride=(2, 1), dtype=dtype)
    tensors = on_gpu(case)
    tensors[2][1, 2] = value
    for result, truth in zip(case.run(tensors, backend), case.expected(tensors), strict=True):
        assert 0 < truth.isnan().sum() < truth.numel()
        assert result.isnan().equal(truth.to(result.device).isnan())


@pytest.mark.parametrize("form", FORMS)
def test_infinite_pixels(form: str) -> None:
    backend = TritonBackend(FORMS[form])
    case = Case()
    tensors = on_gpu(case)
    tensors[0][0, 1, 2, 0] = torch.inf
    tensors[0][1, 0, 3, 5] = torch.nan
    for result, truth in zip(case.run(tensors, backend), case.expected(tensors), strict=True):
        assert result.isfinite().equal(truth.to(result.device).isfinite())


@pytest.mark.parametrize("form", FORMS)
def test_strided_input(form: str) -> None:
    backend = TritonBackend(FORMS[form])
    case = Case()
    input, *others = on_gpu(case)
    wide = torch.full((2, 9, 5, 4), torch.nan, device="cuda")
    strided = wide.permute(0, 3, 2, 1)[:, 1::2, 1:, 2:8].copy_(input)
    assert_close(case.run((strided, *others), backend), case.expected((input, *others)))


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_nothing_synchronises_and_a_graph_replays_it(case: Case) -> None:
    case = replace(case, dtype=torch.bfloat16, layout=torch.channels_last)
    tensors = on_gpu(case)
    expected = case.run(tensors)  # compiles
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            case.run(tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.run(tensors)
    graph.replay()
    torch.cuda.synchronize()
    for result, same in zip(results, expected, strict=True):
        torch.testing.assert_close(result, same)


@pytest.mark.parametrize("form", FORMS)
def test_grad_mode_and_deterministic_mode(form: str) -> None:
    """As an exported network calls it, and with no CUBLAS_WORKSPACE_CONFIG."""
    case, backend = Case(), TritonBackend(FORMS[form])
    tensors = on_gpu(case)
    expected = case.run(tensors, backend)
    for tensor in tensors[:3]:
        tensor.requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        results = case.run(tensors, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.equal(same) for result, same in zip(results, expected, strict=True))


def test_tf32_is_what_it_is_for_cudnn() -> None:
    case = LARGE[0]
    tensors = on_gpu(case)
    exact = case.run(tensors)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        rounded = case.run(tensors)
    errors = [((result - truth).norm() / truth.norm()).item() for result, truth in zip(rounded, exact, strict=True)]
    assert all(1e-5 < error < 1e-2 for error in errors)


def test_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties("cuda").total_memory < 60 * 2**30:
        pytest.skip("needs a GPU with 60 GiB")
    backend, channels, size = TritonBackend(), 66, (5800, 5800)
    case = Case("huge", batch=1, size=size, channels=(channels, channels), groups=channels, bias=False)
    input = torch.randn(1, channels, *size, device="cuda", dtype=torch.bfloat16)
    assert input.numel() > 2**31
    weight = torch.randn(channels, 1, 4, device="cuda", dtype=torch.bfloat16)
    positions = torch.randn(channels, 4, 2, device="cuda")
    output = backend.forward(input, weight, positions, None, case.geometry)
    grads = backend.backward(output, input, weight, positions, case.geometry, (True, True, True))
    one = replace(case, channels=(1, 1), groups=1).geometry
    last = slice(channels - 1, channels)
    alone = backend.forward(input[:, last], weight[last], positions[last], None, one)
    assert torch.equal(output[:, last], alone)
    grads_alone = backend.backward(alone, input[:, last], weight[last], positions[last], one, (True, True, True))
    assert torch.equal(grads[0][:, last], grads_alone[0])
    for grad, grad_alone in zip(grads[1:], grads_alone[1:], strict=True):
        torch.testing.assert_close(grad[last], grad_alone, rtol=1e-2, atol=1e-3 * grad_alone.abs().max().item())
