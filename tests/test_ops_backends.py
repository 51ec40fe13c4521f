"""The CPU backends against the oracle in float64, and against conv2d and deform_conv2d."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

import icnn_zoo
from icnn_zoo.ops import columns, dense, operators, torch_backend

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One call: sizes, geometry, and how far positions lie from the regular grid."""

    name: str = "plain 3x3"
    size: Pair = (5, 7)
    channels: Pair = (4, 6)
    kernel: Pair = (3, 3)
    stride: int | Pair = 1
    padding: int | Pair | str = 1
    dilation: int | Pair = 1
    groups: int = 1
    batch: int = 2
    spread: float = 0.7
    bias: bool = True
    per_kernel: bool = False

    def regular_positions(self) -> Tensor:
        """The regular grid in the shape of the positions."""
        dilation = self.dilation if isinstance(self.dilation, tuple) else (self.dilation, self.dilation)
        rows, cols = (d * (torch.arange(k) - (k - 1) // 2) for d, k in zip(dilation, self.kernel, strict=True))
        grid = torch.cartesian_prod(rows, cols).reshape(-1, 2).double()
        owners = (self.channels[1], self.channels[0] // self.groups) if self.per_kernel else self.channels[:1]
        return grid.expand(*owners, *grid.shape).contiguous()

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Input, weight, positions and bias, as leaves; the same numbers in each dtype."""
        generator = torch.Generator().manual_seed(1)
        in_channels, out_channels = self.channels

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        regular = self.regular_positions()
        tensors = [
            rand(self.batch, in_channels, *self.size),
            rand(out_channels, in_channels // self.groups, *self.kernel),
            regular + self.spread * rand(*regular.shape),
        ]
        if self.bias:
            tensors.append(rand(out_channels))
        return [tensor.float().to(dtype).requires_grad_() for tensor in tensors]

    def run(self, tensors: list[Tensor], backend: str = "auto") -> Tensor:
        """Call the public function."""
        bias = tensors[3] if self.bias else None
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return icnn_zoo.irregular_conv2d(*tensors[:3], bias, *geometry, backend=backend)


PLAIN = Case()
CASES = [
    PLAIN,
    Case("no bias", bias=False),
    Case("stride 2", stride=2),
    Case("unequal strides", stride=(3, 2), size=(8, 6)),
    Case("dilation 2", dilation=2, padding=2),
    Case("unequal dilations", dilation=(1, 3), padding=(0, 3)),
    Case("stride and dilation", stride=(2, 1), dilation=(2, 3), padding=(3, 2)),
    Case("groups", groups=2),
    Case("depthwise", channels=(4, 4), groups=4),
    Case("depthwise, multiplier 2", channels=(3, 6), groups=3),
    Case("depthwise, stride 2", channels=(4, 4), groups=4, stride=2),
    Case("one input channel", channels=(1, 3)),
    Case("2x2", kernel=(2, 2)),
    Case("4x4, dilation 2, same", kernel=(4, 4), dilation=2, padding="same"),
    Case("2x3, same", kernel=(2, 3), padding="same"),
    Case("valid", padding="valid"),
    Case("1x5", kernel=(1, 5), padding=(0, 2)),
    Case("5x1", kernel=(5, 1), padding=(2, 0)),
    Case("1x1", kernel=(1, 1), padding=0),
    Case("1x1, stride 2, padding 1", kernel=(1, 1), stride=2),
    Case("7x7", kernel=(7, 7), padding=3, channels=(2, 2)),
    Case("large padding", padding=(4, 6)),
    Case("kernel larger than the input", size=(2, 3), kernel=(5, 5), padding=2),
    Case("one pixel", size=(1, 1)),
    Case("one row", size=(1, 9), padding=(1, 0)),
    Case("batch 0", batch=0),
    Case("batch 1", batch=1),
    Case("spread 20 px", spread=20.0),
    Case("spread 20 px, stride 2", spread=20.0, stride=2),
    Case("spread 1000 px", spread=1000.0),
    Case("spread 20 px, depthwise", spread=20.0, channels=(4, 4), groups=4),
    Case("integer positions", spread=0.0),
    Case("per kernel", per_kernel=True),
    Case("per kernel, groups, stride 2", per_kernel=True, groups=2, stride=2),
    Case("per kernel, depthwise, multiplier 2", per_kernel=True, channels=(3, 6), groups=3),
    Case("per kernel, spread 20 px", per_kernel=True, spread=20.0),
    Case("per kernel, even, unequal dilations", per_kernel=True, kernel=(2, 4), dilation=(2, 1)),
    Case("per kernel, batch 0", per_kernel=True, batch=0),
]

KINDS = ["shared", "per kernel"]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(params=["dense kernels", "columns", "columns in small blocks", "native", "native in small blocks"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force each way to compute: tiny sizes would take the first wherever it exists."""
    name = str(request.param)
    backend = "native" if "native" in name else "torch"
    if backend == "native" and (reason := operators.why_unavailable("native", torch.device("cpu"), torch.float32)):
        pytest.skip(reason)
    monkeypatch.setattr(operators, "BACKENDS", (backend, "torch"))
    monkeypatch.setattr(dense, "MAX_CELLS_PER_TAP", 10**9 if name == "dense kernels" else 0)
    if "small blocks" in name:
        monkeypatch.setattr(columns, "_BLOCK_ELEMENTS", 500)
        monkeypatch.setattr(torch_backend, "_COPIED_ELEMENTS", 500)
    else:
        monkeypatch.setattr(dense, "_KERNEL_ELEMENTS", 500)
    return name


def gradients(output: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of the output."""
    grad_output = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad(output, tensors, grad_output.to(output.dtype))


@torch.no_grad()
def away_from_integers(positions: Tensor) -> None:
    """Keep numeric differences on one side of the kinks."""
    positions.copy_(positions.floor() + 0.2 + 0.6 * positions.frac().abs())


@functools.cache
def oracle(case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of the reference in float64."""
    tensors = case.tensors()
    output = case.run(tensors, "reference")
    return output.detach(), gradients(output, tensors)


@each_case
@pytest.mark.usefixtures("path")
def test_output_and_all_gradients_equal_the_reference(case: Case) -> None:
    output = case.run(tensors := case.tensors())
    expected, expected_grads = oracle(case)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, tensors), expected_grads)


@each_case
@pytest.mark.usefixtures("path")
def test_float32_is_as_near_to_the_reference_as_float32_allows(case: Case) -> None:
    output = case.run(tensors := case.tensors(torch.float32))
    assert output.dtype == torch.float32
    expected, expected_grads = oracle(case)
    close = {"rtol": 1e-4, "atol": 2e-4, "check_dtype": False}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(gradients(output, tensors), expected_grads, **close)


@pytest.mark.usefixtures("path")
def test_many_images_and_large_maps_equal_the_reference() -> None:
    """More output pixels than one slab of images holds."""
    case = Case(channels=(1, 1), kernel=(1, 2), padding=0, size=(70, 70), spread=3.0)
    output = case.run(tensors := case.tensors())
    expected, expected_grads = oracle(case)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, tensors), expected_grads)


@each_case
@pytest.mark.usefixtures("path")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # F.conv2d copies its input
def test_regular_positions_equal_conv2d(case: Case) -> None:
    input, weight, _, *bias = case.tensors()
    arguments = (weight, *(bias or [None]), case.stride, case.padding, case.dilation, case.groups)
    expected = F.conv2d(input, *arguments)
    regular = [input, weight, case.regular_positions(), *bias]
    output, leaves = case.run(regular), [input, weight, *bias]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, leaves), gradients(expected, leaves))
    if expected.numel() > 0 and case.size != (
        1,
        1,
    ):  # negative control: the taps in reverse are another kernel
        regular[2] = regular[2].roll(1, 0).flip(-2) if case.kernel != (1, 1) else regular[2] + 1
        assert not torch.allclose(case.run(regular), expected)


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
@pytest.mark.usefixtures("path")
def test_equals_deform_conv2d_with_constant_offsets(case: Case) -> None:
    input, weight, positions, bias = tensors = case.tensors()
    output = case.run(tensors)
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
        Case("per kernel", size=(3, 4), channels=(2, 2), kernel=(2, 2), per_kernel=True),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.usefixtures("path")
def test_gradcheck_away_from_integers(case: Case) -> None:
    tensors = case.tensors()
    away_from_integers(tensors[2])
    assert torch.autograd.gradcheck(lambda *arguments: case.run(list(arguments)), tensors)


@pytest.mark.parametrize("per_kernel", [False, True], ids=KINDS)
@pytest.mark.usefixtures("path")
def test_second_derivatives_are_right(per_kernel: bool) -> None:
    case = Case(size=(2, 3), channels=(2, 2), kernel=(1, 2), padding=0, per_kernel=per_kernel, groups=1 + per_kernel)
    tensors = case.tensors()
    away_from_integers(tensors[2])
    assert torch.autograd.gradgradcheck(lambda *arguments: case.run(list(arguments)), tensors)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("per_kernel", [False, True])
def test_unbatched_input_is_a_batch_of_one(backend: str, per_kernel: bool) -> None:
    case = Case(batch=1, per_kernel=per_kernel)
    input, *rest = case.tensors()
    assert torch.equal(case.run([input[0], *rest], backend), case.run([input, *rest], backend)[0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], 3).repeat_interleave(2, 2)[:, :, ::2, : x.shape[3]],
    "expanded": lambda x: x[:1, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [PLAIN, Case(groups=2, per_kernel=True, stride=2)], ids=["shared", "per kernel"])
@pytest.mark.usefixtures("path")
def test_any_strides_give_the_result_of_contiguous_tensors(case: Case, layout: str) -> None:
    input, weight, positions, bias = case.tensors()
    strided = LAYOUTS[layout](input.detach()).requires_grad_()
    contiguous = strided.detach().contiguous().requires_grad_()
    odd_weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    odd_positions = positions.detach().flip(-1).contiguous().flip(-1).transpose(0, -2).contiguous()
    odd_positions = odd_positions.transpose(0, -2).requires_grad_()
    tensors, plain = [strided, odd_weight, odd_positions, bias], [contiguous, weight, positions, bias]
    output, expected = case.run(tensors), case.run(plain)
    torch.testing.assert_close(output, expected)
    assert layout != "channels_last" or output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradients(output, tensors), gradients(expected, plain))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "case",
    [
        Case("shared", groups=2),
        Case("per kernel", groups=2, per_kernel=True),
        Case("depthwise", channels=(4, 4), groups=4),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.usefixtures("path")
def test_a_position_that_is_not_finite_gives_nan_and_never_a_made_up_number(case: Case, value: float) -> None:
    tensors = case.tensors()
    with torch.no_grad():
        tensors[2].view(-1)[5] = value
    output, expected = case.run(tensors), case.run(tensors, "reference")
    assert torch.equal(output.isnan(), expected.isnan())
    assert output.isnan().any()
    assert output.isfinite().any()
    _, _, grad_positions, grad_bias = gradients(output, tensors)
    assert grad_positions.view(-1, 2)[2].isnan().all()
    assert grad_bias.isfinite().all()


@pytest.mark.parametrize("value", [1e30, -1e30, 3e9, -(2.0**31), 2.0**31 - 1, 2.0**63])
@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, per_kernel=True)], ids=KINDS)
@pytest.mark.usefixtures("path")
def test_huge_positions_are_dead_taps(case: Case, value: float) -> None:
    tensors = case.tensors(torch.float32)
    with torch.no_grad():
        tensors[2].view(-1)[::7] = value
    expected, output = case.run(tensors, "reference"), case.run(tensors)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(gradients(output, tensors), gradients(expected, tensors), **close)


@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, per_kernel=True)], ids=KINDS)
@pytest.mark.usefixtures("path")
def test_two_runs_agree_bit_for_bit(case: Case) -> None:
    tensors = case.tensors(torch.float32)
    first, second = case.run(tensors), case.run(tensors)
    assert torch.equal(first, second)
    for one, other in zip(gradients(first, tensors), gradients(second, tensors), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [PLAIN, Case(groups=2, per_kernel=True)], ids=KINDS)
@pytest.mark.usefixtures("path")
def test_half_precision_tensors_take_float32_positions(case: Case, half: torch.dtype) -> None:
    input, weight, _, bias = case.tensors(half)
    tensors = [input, weight, case.tensors(torch.float32)[2], bias]
    output = case.run(tensors)
    assert output.dtype == half
    same = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = case.run(same, "reference")
    close = {"rtol": 3e-2, "atol": 0.3, "check_dtype": False}
    torch.testing.assert_close(output, expected, **close)
    grads = gradients(output, tensors)
    assert [grad.dtype for grad in grads] == [half, half, torch.float32, half]
    torch.testing.assert_close(grads, gradients(expected, same), **close)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.usefixtures("path")
def test_autocast_gives_bfloat16_outputs_and_leaves_positions_float32(backend: str) -> None:
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
    "case", [PLAIN, Case("depthwise", channels=(4, 4), groups=4), Case("per kernel", per_kernel=True)]
)
@pytest.mark.usefixtures("path")
def test_autocast_changes_no_bit_of_what_bfloat16_tensors_give(case: Case) -> None:
    """Nothing inside the operator is cast a second time."""
    tensors = case.tensors(torch.float32)
    half = [tensors[0].bfloat16(), tensors[1].bfloat16(), tensors[2], tensors[3].bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        output = case.run(tensors)
        grads = gradients(output, tensors)
    expected = case.run(half)
    assert torch.equal(output, expected)
    for grad, other in zip(grads, gradients(expected, tensors), strict=True):
        assert torch.equal(grad, other)


@pytest.mark.parametrize(
    "case",
    [
        Case("shared", size=(40, 40), channels=(8, 8), spread=3.0),
        Case("per kernel", size=(40, 40), channels=(8, 8), spread=3.0, per_kernel=True),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.usefixtures("path")
def test_what_is_kept_for_the_backward_is_no_more_than_the_arguments(case: Case) -> None:
    """Columns would be 9 times the input, expanded inputs of the full version 8 times."""
    tensors = case.tensors(torch.float32)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.run(tensors)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert num_bytes <= 1.1 * sum(tensor.nbytes for tensor in tensors)


def test_only_the_gradients_that_are_asked_for_are_needed() -> None:
    expected = gradients(PLAIN.run(tensors := PLAIN.tensors()), tensors)
    for wanted in range(4):
        some = [tensor.detach().requires_grad_(number == wanted) for number, tensor in enumerate(tensors)]
        (grad,) = gradients(PLAIN.run(some), [some[wanted]])
        torch.testing.assert_close(grad, expected[wanted])
