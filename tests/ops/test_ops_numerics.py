"""The CPU backends where numbers are odd: not finite, huge or in half precision; and the same bits on every run."""

from dataclasses import replace

import pytest
import torch
from backend_cases import KINDS, PLAIN, Case, gradients
from torch import Tensor


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "case",
    [
        Case("shared", groups=2),
        Case("per kernel", groups=2, shapes="kernel"),
        Case("depthwise", channels=(4, 4), groups=4),
    ],
    ids=lambda case: case.name,
)
def test_a_position_that_is_not_finite_gives_nan_and_never_a_made_up_number(
    case: Case, value: float, cpu_path: str
) -> None:
    tensors = case.tensors()
    with torch.no_grad():
        tensors[2].view(-1)[5] = value
    output, expected = case.run(tensors, cpu_path), case.run(tensors, "reference")
    assert torch.equal(output.isnan(), expected.isnan())
    assert output.isnan().any()
    assert output.isfinite().any()
    _, _, grad_positions, grad_bias = gradients(output, tensors)
    assert grad_positions.view(-1, 2)[2].isnan().all()
    assert grad_bias.isfinite().all()


@pytest.mark.parametrize("value", [1e30, -1e30, 3e9, -(2.0**31), 2.0**31 - 1, 2.0**63])
@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, shapes="kernel")], ids=KINDS)
def test_huge_positions_are_dead_taps(case: Case, value: float, cpu_path: str) -> None:
    tensors = case.tensors(torch.float32)
    with torch.no_grad():
        tensors[2].view(-1)[::7] = value
    expected, output = case.run(tensors, "reference"), case.run(tensors, cpu_path)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(gradients(output, tensors), gradients(expected, tensors), **close)


@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, shapes="kernel")], ids=KINDS)
def test_two_runs_agree_bit_for_bit(case: Case, cpu_path: str) -> None:
    tensors = case.tensors(torch.float32)
    first, second = case.run(tensors, cpu_path), case.run(tensors, cpu_path)
    assert torch.equal(first, second)
    for one, other in zip(gradients(first, tensors), gradients(second, tensors), strict=True):
        assert torch.equal(one, other)


def test_a_wide_depthwise_kernel_in_bfloat16_comes_to_an_end(cpu_path: str) -> None:
    """PyTorch's own convolution does not, drawn like this."""
    case = Case(size=(6, 34), channels=(2, 2), kernel=(2, 4), groups=2, stride=(2, 1), padding=2, spread=5.0)
    input, weight, _, bias = case.tensors(torch.bfloat16)
    input = input.detach().contiguous(memory_format=torch.channels_last)
    output = case.run([input, weight, case.tensors(torch.float32)[2], bias], cpu_path)
    assert output.isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [PLAIN, Case(groups=2, shapes="kernel")], ids=KINDS)
def test_half_precision_tensors_take_float32_positions(case: Case, half: torch.dtype, cpu_path: str) -> None:
    input, weight, _, bias = case.tensors(half)
    tensors = [input, weight, case.tensors(torch.float32)[2], bias]
    output = case.run(tensors, cpu_path)
    assert output.dtype == half
    same = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = case.run(same, "reference")
    close = {"rtol": 3e-2, "atol": 0.3, "check_dtype": False}
    torch.testing.assert_close(output, expected, **close)
    grads = gradients(output, tensors)
    assert [grad.dtype for grad in grads] == [half, half, torch.float32, half]
    torch.testing.assert_close(grads, gradients(expected, same), **close)


@pytest.mark.parametrize("reference", [False, True])
def test_autocast_gives_bfloat16_outputs_and_leaves_positions_float32(reference: bool, cpu_path: str) -> None:
    backend = "reference" if reference else cpu_path
    tensors = PLAIN.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = PLAIN.run(tensors, backend)
    assert output.dtype == torch.bfloat16
    grads = gradients(output, tensors)
    assert all(grad.dtype == torch.float32 for grad in grads)
    # 12.03 rounds to 12 in bfloat16: there this tap would read another mixture of pixels.
    fine = Case(channels=(1, 1), kernel=(1, 1), padding=0, size=(1, 40), batch=1, bias=False)
    input, weight = torch.zeros(1, 1, 1, 40), torch.ones(1, 1, 1, 1)
    input[..., 13] = 1.0
    with torch.autocast("cpu", torch.bfloat16):
        output = fine.run([input, weight, torch.tensor([[[0.0, 12.03]]])], backend)
    assert output[0, 0, 0, 0].item() == pytest.approx(0.03, rel=1e-2)


@pytest.mark.parametrize(
    "case", [PLAIN, Case("depthwise", channels=(4, 4), groups=4), Case("per kernel", shapes="kernel")]
)
def test_autocast_changes_no_bit_of_what_bfloat16_tensors_give(case: Case, cpu_path: str) -> None:
    """Nothing inside the operator is cast a second time."""
    tensors = case.tensors(torch.float32)
    half = [tensors[0].bfloat16(), tensors[1].bfloat16(), tensors[2], tensors[3].bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        output = case.run(tensors, cpu_path)
        grads = gradients(output, tensors)
    expected = case.run(half, cpu_path)
    assert torch.equal(output, expected)
    for grad, other in zip(grads, gradients(expected, tensors), strict=True):
        assert torch.equal(grad, other)


@pytest.mark.parametrize(
    "case",
    [
        Case("shared", size=(40, 40), channels=(8, 8), spread=3.0),
        Case("per kernel", size=(40, 40), channels=(8, 8), spread=3.0, shapes="kernel"),
    ],
    ids=lambda case: case.name,
)
def test_what_is_kept_for_the_backward_is_no_more_than_the_arguments(case: Case, cpu_path: str) -> None:
    """Columns would be 9 times the input, expanded inputs of the full version 8 times."""
    tensors = case.tensors(torch.float32)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.run(tensors, cpu_path)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert num_bytes <= 1.1 * sum(tensor.nbytes for tensor in tensors)


def test_an_infinite_pixel_reaches_what_reads_it_alone(cpu_path: str) -> None:
    # Columns may hold what lies beside a row, which must not be multiplied with the zeros that it meets.
    case = Case("valid", size=(5, 24), padding=0)
    tensors = case.tensors()
    with torch.no_grad():
        tensors[0][0, 0, -1] = tensors[0][0, 1, :, 0] = torch.inf
    output, expected = case.run(tensors, cpu_path), case.run(tensors, "reference")
    assert torch.equal(output.isfinite(), expected.isfinite())
    weight_gradients = (gradients(result, tensors)[1].isfinite() for result in (output, expected))
    first, second = weight_gradients
    assert torch.equal(first, second)
    assert first[:, 0].any()
    assert first[:, 1].any()
