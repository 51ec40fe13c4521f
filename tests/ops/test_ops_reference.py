"""The oracle itself: numbers worked out by hand, conv2d, numeric differences, and what must differ."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icnn_zoo.ops import reference

ONE = (1, 1)
NO_PADDING = (0, 0, 0, 0)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def regular_positions(num_channels: int, kernel: tuple[int, int], dilation: tuple[int, int] = ONE) -> Tensor:
    rows, cols = (d * (torch.arange(k) - (k - 1) // 2) for d, k in zip(dilation, kernel, strict=True))
    return torch.cartesian_prod(rows, cols).reshape(-1, 2).double().repeat(num_channels, 1, 1)


def one_tap(image: list[list[float]], row: float, col: float, weight: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """A picture, a 1x1 kernel with one weight, and its tap's position."""
    values = torch.tensor(image, dtype=torch.float64)[None, None]
    position = torch.tensor([[[row, col]]], dtype=torch.float64)
    return values, torch.full((1, 1, 1, 1), weight, dtype=torch.float64), position


def forward(
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = ONE,
    padding: tuple[int, int, int, int] = NO_PADDING,
    dilation: tuple[int, int] = ONE,
    groups: int = 1,
) -> Tensor:
    return reference.irregular_conv2d_forward(input, weight, positions, bias, stride, padding, dilation, groups)


def test_one_tap_between_four_pixels_by_hand() -> None:
    input, weight, positions = one_tap([[1.0, 2.0], [4.0, 8.0]], 0.25, 0.75)
    output = forward(input, weight, positions, torch.tensor([100.0]))
    # Rows weigh 0.75 and 0.25, columns 0.25 and 0.75; neighbors outside are zero.
    top_left = 100 + 2 * (0.75 * (0.25 * 1 + 0.75 * 2) + 0.25 * (0.25 * 4 + 0.75 * 8))
    top_right = 100 + 2 * (0.75 * 0.25 * 2 + 0.25 * 0.25 * 8)
    bottom_left = 100 + 2 * 0.75 * (0.25 * 4 + 0.75 * 8)
    bottom_right = 100 + 2 * 0.75 * 0.25 * 8
    assert output.tolist() == [[[[top_left, top_right], [bottom_left, bottom_right]]]]


def test_gradients_of_one_tap_by_hand() -> None:
    input, weight, positions = one_tap([[1.0, 2.0], [4.0, 8.0]], 0.25, 0.75)
    grad_output = torch.tensor([[[[10.0, 0.0], [0.0, 0.0]]]])
    grads = reference.irregular_conv2d_backward(
        grad_output, input, weight, positions, torch.zeros(1), ONE, NO_PADDING, ONE, 1
    )
    grad_input, grad_weight, grad_positions, grad_bias = grads
    share = 10 * 2 * torch.tensor([[0.75 * 0.25, 0.75 * 0.75], [0.25 * 0.25, 0.25 * 0.75]], dtype=torch.float64)
    assert torch.equal(grad_input[0, 0], share)
    assert grad_weight.item() == 10 * (0.75 * (0.25 * 1 + 0.75 * 2) + 0.25 * (0.25 * 4 + 0.75 * 8))
    down = (0.25 * 4 + 0.75 * 8) - (0.25 * 1 + 0.75 * 2)
    right = 0.75 * (2 - 1) + 0.25 * (8 - 4)
    assert grad_positions.tolist() == [[[10 * 2 * down, 10 * 2 * right]]]
    assert grad_bias is not None
    assert grad_bias.item() == 10.0


@pytest.mark.parametrize(
    ("row", "col", "slopes"),
    [
        (1.0, 1.0, [7.0 - 5.0, 11.0 - 5.0]),  # the cell to the right and below, not 5 - 3 and not the mean
        (0.0, 0.0, [4.0 - 1.0, 2.0 - 1.0]),
        (2.0, 2.0, [0.0 - 9.0, 0.0 - 9.0]),  # the last row: what follows is outside, hence zero
        (-1.0, 0.0, [1.0, 0.0]),  # just above the picture: reads zero, but would see a pixel if it moved down
    ],
)
def test_slope_at_an_integer_is_that_of_the_cell_that_floor_names(row: float, col: float, slopes: list[float]) -> None:
    image = [[1.0, 2.0, 0.0], [4.0, 5.0, 11.0], [8.0, 7.0, 9.0]]
    input, weight, positions = one_tap(image, row, col, weight=1.0)
    grad_output = torch.zeros_like(input)
    grad_output[..., 0, 0] = 1.0
    grads = reference.irregular_conv2d_backward(grad_output, input, weight, positions, None, ONE, NO_PADDING, ONE, 1)
    assert grads[2].flatten().tolist() == slopes


def test_first_row_and_column_of_the_output_count_in_the_position_gradient() -> None:
    """Eq. 6 as printed drops them."""
    input, weight, positions = one_tap([[1.0, 2.0], [4.0, 8.0]], 0.25, 0.75, weight=1.0)
    for pixel in range(4):
        grad_output = torch.zeros(1, 1, 2, 2).flatten().scatter(0, torch.tensor([pixel]), 1.0).view(1, 1, 2, 2)
        grads = reference.irregular_conv2d_backward(
            grad_output, input, weight, positions, None, ONE, NO_PADDING, ONE, 1
        )
        assert (grads[2] != 0).all()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
        ((3, 3), (2, 1), (0, 2, 1, 3), (1, 2), 2),
        ((2, 4), (1, 3), (2, 2, 3, 3), (2, 1), 1),
        ((1, 5), (1, 1), (0, 0, 2, 2), (1, 1), 4),
        ((4, 4), (1, 1), (3, 3, 3, 3), (2, 2), 1),
        ((1, 1), (2, 2), (1, 1, 1, 1), (1, 1), 1),
    ],
)
def test_equals_conv2d_on_the_regular_grid(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    input, weight, bias = rand(2, 4, 6, 7), rand(4, 4 // groups, *kernel, seed=1), rand(4, seed=2)
    input.requires_grad_()
    weight.requires_grad_()
    positions = regular_positions(4, kernel, dilation)
    top, bottom, left, right = padding
    padded = F.pad(input, (left, right, top, bottom))
    expected = F.conv2d(padded, weight, bias, stride, 0, dilation, groups)
    output = reference.irregular_conv2d(input, weight, positions, bias, stride, padding, dilation, groups)
    torch.testing.assert_close(output, expected)
    grad_output = rand(*expected.shape, seed=3)
    for grad, expected_grad in zip(
        torch.autograd.grad(output, (input, weight), grad_output),
        torch.autograd.grad(expected, (input, weight), grad_output),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("per_kernel", [False, True])
def test_gradients_equal_numeric_differences(per_kernel: bool) -> None:
    input, weight, bias = rand(1, 4, 4, 3), rand(4, 2, 2, 2, seed=1), rand(4, seed=2)
    shape = (4, 2, 4, 2) if per_kernel else (4, 4, 2)
    # Away from the kinks at integers.
    positions = rand(*shape, seed=3).round() + 0.2 + 0.6 * rand(*shape, seed=4).sigmoid()
    geometry = ((2, 1), (1, 1, 0, 1), (1, 2), 2)
    arguments = [tensor.requires_grad_() for tensor in (input, weight, positions, bias)]
    assert torch.autograd.gradcheck(lambda *tensors: reference.irregular_conv2d(*tensors, *geometry), arguments)


@pytest.mark.parametrize("change", [lambda p: p.flip(-2), lambda p: p.flip(-1)], ids=["taps", "row and col"])
def test_flipped_taps_and_swapped_axes_are_different_convolutions(change: Callable[[Tensor], Tensor]) -> None:
    input, weight, positions = rand(1, 1, 5, 6), rand(1, 1, 3, 3, seed=1), regular_positions(1, (3, 3))
    assert not torch.allclose(forward(input, weight, positions), forward(input, weight, change(positions)))


def test_rows_come_first() -> None:
    input, weight, positions = one_tap([[1.0, 2.0], [4.0, 8.0]], 1.0, 0.0, weight=1.0)
    assert forward(input, weight, positions).tolist() == [[[[4.0, 8.0], [0.0, 0.0]]]]


@pytest.mark.parametrize("far", [50.0, -50.0, 1e30, -1e30])
def test_a_tap_far_outside_reads_zero_and_has_zero_gradient(far: float) -> None:
    input, weight, positions = one_tap([[1.0, 2.0], [4.0, 8.0]], far, 0.5)
    assert forward(input, weight, positions).eq(0).all()
    grads = reference.irregular_conv2d_backward(
        torch.ones(1, 1, 2, 2), input, weight, positions, None, ONE, NO_PADDING, ONE, 1
    )
    assert all(grad.eq(0).all() for grad in grads[:3])
    assert grads[3] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_position_that_is_not_finite_gives_nan_where_its_tap_takes_part(value: float) -> None:
    input, weight = rand(1, 2, 3, 3), rand(2, 1, 1, 2, seed=1)
    positions = regular_positions(2, (1, 2))
    positions[0, 1, 1] = value
    output = forward(input, weight, positions, groups=2)
    assert output[:, 0].isnan().all()
    assert output[:, 1].isfinite().all()
    grads = reference.irregular_conv2d_backward(
        torch.ones_like(output), input, weight, positions, None, ONE, NO_PADDING, ONE, 2
    )
    grad_input, grad_weight, grad_positions, _ = grads
    assert grad_input[:, 0].isnan().all()
    assert grad_input[:, 1].isfinite().all()
    assert grad_weight.isnan().flatten().tolist() == [False, True, False, False]
    assert grad_positions.isnan().any(-1).flatten().tolist() == [False, True, False, False]


def test_equal_shapes_per_kernel_are_the_shared_shape() -> None:
    input, weight, shared = rand(1, 4, 4, 4), rand(6, 2, 2, 2, seed=1), rand(4, 4, 2, seed=2)
    full = shared.view(2, 1, 2, 4, 2).expand(2, 3, 2, 4, 2).reshape(6, 2, 4, 2)
    assert torch.equal(forward(input, weight, shared, groups=2), forward(input, weight, full, groups=2))
    grad_output = rand(1, 6, 3, 3, seed=3)
    of_shared, of_full = (
        reference.irregular_conv2d_backward(grad_output, input, weight, positions, None, ONE, NO_PADDING, ONE, 2)
        for positions in (shared, full)
    )
    torch.testing.assert_close(of_shared[2], of_full[2].view(2, 3, 2, 4, 2).sum(1).view(4, 4, 2))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    input = rand(batch, 1, 3, 3).requires_grad_()
    output = reference.irregular_conv2d(
        input, rand(2, 1, 3, 3), regular_positions(1, (3, 3)), None, ONE, NO_PADDING, ONE, 1
    )
    assert output.shape == (batch, 2, 1, 1)
    output.sum().backward()
    assert input.grad is not None
    assert input.grad.shape == input.shape


def test_computes_in_float64_and_answers_in_the_dtype_of_each_argument() -> None:
    input, weight, bias = rand(1, 1, 3, 3).float(), rand(1, 1, 2, 2).float(), rand(1).float()
    positions = rand(1, 4, 2, seed=1)
    arguments = [tensor.requires_grad_() for tensor in (input, weight, positions, bias)]
    output = reference.irregular_conv2d(*arguments, ONE, NO_PADDING, ONE, 1)
    exact = forward(input.double(), weight.double(), positions, bias.double())
    assert output.dtype == torch.float32
    assert torch.equal(output, exact.float())
    assert forward(input, weight, positions).dtype == torch.float64
    output.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == tensor.dtype for tensor in arguments)


@pytest.mark.parametrize("loss", [torch.sum, lambda output: output.square().sum()], ids=["linear", "square"])
@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_second_derivative_is_a_clear_error_and_never_zero(
    loss: Callable[[Tensor], Tensor], first: int, second: int
) -> None:
    tensors = [rand(1, 1, 3, 3), rand(1, 1, 2, 2), rand(1, 4, 2), rand(1)]
    output = reference.irregular_conv2d(*[tensor.requires_grad_() for tensor in tensors], ONE, NO_PADDING, ONE, 1)
    (grad,) = torch.autograd.grad(loss(output), tensors[first], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        torch.autograd.grad(grad.sum(), tensors[second], allow_unused=True)
