"""The CPU backends against the oracle in float64, and against conv2d and deform_conv2d."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from backend_cases import CASES, KINDS, PLAIN, Case, gradients, oracle
from torch import Tensor
from torchvision.ops import deform_conv2d

from icnn_zoo.ops.sharing import SHAPES, Shapes

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@torch.no_grad()
def away_from_integers(positions: Tensor) -> None:
    """Keep numeric differences on one side of the kinks."""
    positions.copy_(positions.floor() + 0.2 + 0.6 * positions.frac().abs())


@each_case
def test_output_and_all_gradients_equal_the_reference(case: Case, cpu_path: str) -> None:
    output = case.run(tensors := case.tensors(), cpu_path)
    expected, expected_grads = oracle(case)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, tensors), expected_grads)


@each_case
def test_float32_is_as_near_to_the_reference_as_float32_allows(case: Case, cpu_path: str) -> None:
    output = case.run(tensors := case.tensors(torch.float32), cpu_path)
    assert output.dtype == torch.float32
    expected, expected_grads = oracle(case)
    close = {"rtol": 1e-4, "atol": 2e-4, "check_dtype": False}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(gradients(output, tensors), expected_grads, **close)


def test_many_images_and_large_maps_equal_the_reference(cpu_path: str) -> None:
    """More output pixels than one slab of images holds."""
    case = Case(channels=(1, 1), kernel=(1, 2), padding=0, size=(70, 70), spread=3.0)
    output = case.run(tensors := case.tensors(), cpu_path)
    expected, expected_grads = oracle(case)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, tensors), expected_grads)


@each_case
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # F.conv2d copies its input
def test_regular_positions_equal_conv2d(case: Case, cpu_path: str) -> None:
    input, weight, _, *bias = case.tensors()
    arguments = (weight, *(bias or [None]), case.stride, case.padding, case.dilation, case.groups)
    expected = F.conv2d(input, *arguments)
    regular = [input, weight, case.regular_positions(), *bias]
    output, leaves = case.run(regular, cpu_path), [input, weight, *bias]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, leaves), gradients(expected, leaves))
    if expected.numel() > 0 and case.size != (
        1,
        1,
    ):  # negative control: the taps in reverse are another kernel
        regular[2] = regular[2].roll(1, 0).flip(-2) if case.kernel != (1, 1) else regular[2] + 1
        assert not torch.allclose(case.run(regular, cpu_path), expected)


@pytest.mark.parametrize(
    "case",
    [
        PLAIN,
        Case("stride, dilation", stride=(2, 1), dilation=(1, 2), padding=2),
        Case("groups", groups=2),
        Case("depthwise, multiplier 2", channels=(3, 6), groups=3),
        Case("even, far", kernel=(2, 4), spread=6.0),
    ],
    ids=lambda case: case.name,
)
def test_equals_deform_conv2d_with_constant_offsets(case: Case, cpu_path: str) -> None:
    input, weight, positions, bias = tensors = case.tensors()
    output = case.run(tensors, cpu_path)
    per_tap = (positions - case.regular_positions()).detach().flatten()  # channel, tap, then row and col
    offset = per_tap[None, :, None, None].repeat(case.batch, 1, *output.shape[2:]).requires_grad_()
    expected = deform_conv2d(input, offset, weight, bias, case.stride, case.padding, case.dilation)
    torch.testing.assert_close(output, expected)
    grads = gradients(output, tensors)
    expected_grads = gradients(expected, [input, weight, offset, bias])
    summed = expected_grads[2].sum((0, 2, 3)).view_as(positions)
    torch.testing.assert_close(grads, (*expected_grads[:2], summed, expected_grads[3]))


@pytest.mark.parametrize(
    "case",
    [
        Case("shared", size=(3, 4), channels=(2, 2), stride=(1, 2)),
        Case("depthwise", size=(3, 4), channels=(2, 2), groups=2),
        Case("per kernel", size=(3, 4), channels=(2, 2), kernel=(2, 2), shapes="kernel"),
    ],
    ids=lambda case: case.name,
)
def test_gradcheck_away_from_integers(case: Case, cpu_path: str) -> None:
    tensors = case.tensors()
    away_from_integers(tensors[2])
    assert torch.autograd.gradcheck(lambda *arguments: case.run(list(arguments), cpu_path), tensors)


@pytest.mark.parametrize("shapes", ["channel", "kernel"], ids=KINDS)
def test_second_derivatives_are_right(shapes: Shapes, cpu_path: str) -> None:
    case = Case(size=(2, 3), channels=(2, 2), kernel=(1, 2), padding=0, shapes=shapes, groups=1 + (shapes == "kernel"))
    tensors = case.tensors()
    away_from_integers(tensors[2])
    assert torch.autograd.gradgradcheck(lambda *arguments: case.run(list(arguments), cpu_path), tensors)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_unbatched_input_is_a_batch_of_one(backend: str, shapes: Shapes) -> None:
    case = Case(batch=1, shapes=shapes)
    input, *rest = case.tensors()
    assert torch.equal(case.run([input[0], *rest], backend), case.run([input, *rest], backend)[0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], 3).repeat_interleave(2, 2)[:, :, ::2, : x.shape[3]],
    "expanded": lambda x: x[:1, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [PLAIN, Case(groups=2, shapes="kernel", stride=2)], ids=["shared", "per kernel"])
def test_any_strides_give_the_result_of_contiguous_tensors(case: Case, layout: str, cpu_path: str) -> None:
    input, weight, positions, bias = case.tensors()
    strided = LAYOUTS[layout](input.detach()).requires_grad_()
    contiguous = strided.detach().contiguous().requires_grad_()
    odd_weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    odd_positions = positions.detach().flip(-1).contiguous().flip(-1).transpose(0, -2).contiguous()
    odd_positions = odd_positions.transpose(0, -2).requires_grad_()
    tensors, plain = [strided, odd_weight, odd_positions, bias], [contiguous, weight, positions, bias]
    output, expected = case.run(tensors, cpu_path), case.run(plain, cpu_path)
    torch.testing.assert_close(output, expected)
    assert layout != "channels_last" or output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradients(output, tensors), gradients(expected, plain))


def test_only_the_gradients_that_are_asked_for_are_needed() -> None:
    expected = gradients(PLAIN.run(tensors := PLAIN.tensors()), tensors)
    for wanted in range(4):
        some = [tensor.detach().requires_grad_(number == wanted) for number, tensor in enumerate(tensors)]
        (grad,) = gradients(PLAIN.run(some), [some[wanted]])
        torch.testing.assert_close(grad, expected[wanted])


@pytest.mark.parametrize("shapes", ["layer", "group"])
def test_a_shared_shape_is_that_of_each_channel_and_gathers_their_gradients(shapes: Shapes, cpu_path: str) -> None:
    case = Case(groups=2, shapes=shapes)
    input, weight, positions, bias = case.tensors()
    written_out = positions.detach().repeat_interleave(4 // len(positions), dim=0).requires_grad_()
    outputs = [case.run([input, weight, shape, bias], cpu_path) for shape in (positions, written_out)]
    torch.testing.assert_close(*outputs)
    by_shape, by_channel = (
        gradients(output, [shape])[0] for output, shape in zip(outputs, (positions, written_out), strict=True)
    )
    torch.testing.assert_close(by_shape, by_channel.unflatten(0, (len(positions), -1)).sum(1))
