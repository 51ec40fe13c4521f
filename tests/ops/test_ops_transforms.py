"""torch.func, FLOP counters, meta tensors, other devices and reloading: what wraps the operator from outside."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from backend_cases import Case
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

import icnn_zoo
from icnn_zoo.ops import operators, reference

# torch loads its own decompositions with its own deprecated functions.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")

SMALL = [
    Case("shared", size=(3, 4), channels=(2, 2), kernel=(1, 2), padding=0, stride=(1, 2), batch=1),
    Case("depthwise", size=(3, 4), channels=(2, 2), kernel=(2, 1), groups=2, batch=1),
    Case("per kernel", size=(3, 4), channels=(2, 4), kernel=(1, 2), groups=2, shapes="kernel", batch=1),
]
each_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)


def leaves_of(case: Case) -> list[Tensor]:
    """Arguments with positions away from the kinks."""
    tensors = [tensor.detach() for tensor in case.tensors()]
    tensors[2] = tensors[2].floor() + 0.2 + 0.6 * tensors[2].frac().abs()
    return tensors


@forward_mode
@each_case
def test_forward_mode_equals_numeric_differences(case: Case) -> None:
    tensors = [tensor.requires_grad_() for tensor in leaves_of(case)]
    options = {"check_forward_ad": True, "check_backward_ad": False, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(lambda *leaves: case.run(list(leaves)), tensors, **options)


@forward_mode
@each_case
def test_jacobians_and_hessians_are_the_same_in_both_modes(case: Case) -> None:
    tensors = leaves_of(case)
    every = (0, 1, 2, 3)

    def run(*leaves: Tensor) -> Tensor:
        return case.run(list(leaves))

    for ahead, back in zip(jacfwd(run, every)(*tensors), jacrev(run, every)(*tensors), strict=True):
        torch.testing.assert_close(ahead, back)

    def loss(*leaves: Tensor) -> Tensor:
        return run(*leaves).pow(3).sum()

    for row, other in zip(hessian(loss, every)(*tensors), jacrev(jacrev(loss, every), every)(*tensors), strict=True):
        for one, two in zip(row, other, strict=True):
            torch.testing.assert_close(one, two)


@forward_mode
def test_a_third_derivative_forward_equals_numeric_differences() -> None:
    case = SMALL[0]
    input, *rest = leaves_of(case)
    positions = rest[1]

    def loss(positions: Tensor) -> Tensor:
        return case.run([input, rest[0], positions, rest[2]]).pow(3).sum()

    def second(positions: Tensor) -> Tensor:
        return jvp(torch.func.grad(loss), (positions,), (torch.ones_like(positions),))[1].sum()

    _, pullback = torch.func.vjp(loss, positions)
    (outside,) = jvp(lambda one: pullback(one)[0], (torch.tensor(1.0).double(),), (torch.tensor(1.0).double(),))[1:]
    torch.testing.assert_close(outside, torch.func.grad(loss)(positions))

    ahead = jvp(second, (positions,), (torch.ones_like(positions),))[1]
    step = 1e-5
    assert torch.allclose(ahead, (second(positions + step) - second(positions - step)) / (2 * step), rtol=1e-5)


# Which of input, weight, positions and bias have a member for each, and along which axis.
IN_DIMS = [(0, None, None, None), (1, None, None, None), (None, 0, 0, 0), (3, 1, 2, 0), (None, None, 0, None)]
IN_DIMS += [(0, 0, None, None), (None, None, None, 1)]


@pytest.mark.parametrize("in_dims", IN_DIMS)
@each_case
def test_vmap_equals_a_loop_with_gradients_of_each_member(case: Case, in_dims: tuple[int | None, ...]) -> None:
    tensors, members = leaves_of(case), 3

    def stacked(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor if dim is None else torch.stack([tensor * scale for scale in (1.0, 0.7, -0.9)], dim)

    def member(number: int) -> list[Tensor]:
        return [
            tensor if dim is None else tensor.select(dim, number) for tensor, dim in zip(batch, in_dims, strict=True)
        ]

    def run(*leaves: Tensor) -> Tensor:
        return case.run(list(leaves))

    def loss(*leaves: Tensor) -> Tensor:
        return run(*leaves).square().sum()

    batch = [stacked(tensor, dim) for tensor, dim in zip(tensors, in_dims, strict=True)]
    torch.testing.assert_close(
        vmap(run, in_dims)(*batch), torch.stack([run(*member(number)) for number in range(members)])
    )
    gradients = torch.func.grad(loss, (0, 1, 2, 3))
    loop = zip(*(gradients(*member(number)) for number in range(members)), strict=True)
    for mapped, each in zip(vmap(gradients, in_dims)(*batch), loop, strict=True):
        torch.testing.assert_close(mapped, torch.stack(each))


def test_an_ensemble_runs_while_anomalies_are_detected() -> None:
    networks = [icnn_zoo.IrregularConv2d(2, 3, 3) for _ in range(2)]
    parameters, buffers = stack_module_state(networks)
    input = torch.randn(1, 2, 5, 5)

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(networks[0], (parameters, buffers), (input,))

    with torch.autograd.set_detect_anomaly(True):
        output = vmap(run)(parameters, buffers)
        torch.testing.assert_close(output, torch.stack([network(input) for network in networks]))
        broken = {**parameters, "displacement": parameters["displacement"] * torch.nan}
        with pytest.raises(ValueError, match="`positions` must be finite; got nan"):
            vmap(run)(broken, buffers)


def count(function: nn.Module, input: Tensor, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        output = function(input)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, 1 + 4 / 6),
        ({"groups": 2, "stride": 2, "padding": 1}, 1 + 4 / 3),
        ({"shapes": "kernel"}, 5),
    ],
    ids=["shared", "groups", "per kernel"],
)
def test_flop_counters_see_conv2ds_products_and_the_interpolation(options: dict, times: float) -> None:
    conv_options = {name: value for name, value in options.items() if name != "shapes"}
    conv, layer = nn.Conv2d(4, 6, 3, **conv_options), icnn_zoo.IrregularConv2d(4, 6, 3, **options)
    input = torch.randn(2, 4, 9, 8)
    regular = count(conv, input)
    assert count(layer, input) == round(times * regular)
    assert count(layer.to("meta"), input.to("meta")) == round(times * regular)
    layer, input = icnn_zoo.IrregularConv2d(4, 6, 3, **options), input.requires_grad_()
    # Two products, as conv2d's backward, and an interpolation for each of the three gradients.
    assert count(layer, input, backward=True) == round((3 + 4 * (times - 1)) * regular)


@pytest.mark.parametrize("order", ["icnn_zoo, torch.utils.flop_counter", "torch.utils.flop_counter, icnn_zoo"])
def test_formulas_are_registered_whatever_is_imported_first(order: str) -> None:
    code = (
        f"import torch, {order}; print(torch.ops.icnn_zoo.irregular_conv2d in torch.utils.flop_counter.flop_registry)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_meta_tensor_gets_the_shape() -> None:
    layer = icnn_zoo.IrregularConv2d(3, 4, 3, stride=2, device="meta")
    input = torch.empty(1, 3, 9, 9, device="meta").contiguous(memory_format=torch.channels_last)
    output = layer(input)
    assert (output.shape, output.device.type) == ((1, 4, 4, 4), "meta")
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert layer.displacement.grad.shape == layer.displacement.shape


def test_any_device_computes_by_standard_operators() -> None:
    """Every case of the backends on a device that has no kernels of this package and no float64."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("other_device.py"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    device, error, cases = done.stdout.splitlines()
    assert device.startswith("privateuseone")
    assert error.startswith("`backend`='native' cannot run: it needs a CPU; the input is on privateuseone")
    assert cases.endswith("cases")


def test_a_reloaded_module_takes_the_place_of_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, input = icnn_zoo.IrregularConv2d(2, 3, 3), torch.randn(1, 2, 5, 5)
    expected = layer(input)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(operators)
    assert torch.equal(layer(input), expected)
    monkeypatch.setattr(operators, "_forward", lambda *arguments: torch.zeros(1, 3, 3, 3))
    assert not layer(input).any()


@pytest.mark.parametrize("backend", ["auto", "torch", "native", "reference"])
@pytest.mark.parametrize("per_kernel", [False, True])
@pytest.mark.parametrize("sizes", [(0, 2, 3), (1, 0, 3), (1, 2, 0), (0, 0, 0)], ids=str)
def test_nothing_to_sum_is_the_bias(sizes: tuple[int, int, int], per_kernel: bool, backend: str) -> None:
    images, channels, outputs = sizes
    owners = (outputs, channels) if per_kernel else (channels,)
    shapes = [(images, channels, 5, 5), (outputs, channels, 3, 3), (*owners, 9, 2), (outputs,)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    output = icnn_zoo.irregular_conv2d(*leaves, padding=1, backend=backend)
    assert torch.equal(output, leaves[3][:, None, None].expand(images, outputs, 5, 5))
    grads = torch.autograd.grad(output.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert torch.equal(grads[3], torch.full((outputs,), 25.0 * images))
    assert icnn_zoo.irregular_conv2d(*leaves[:3], padding=1, backend=backend).eq(0).all()


@pytest.mark.parametrize("kernel", [(0, 3), (3, 0), (0, 0)])
def test_a_kernel_without_taps_is_refused(kernel: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=f"`weight` must have a kernel of at least 1 x 1, or one tap; got {kernel[0]} x"
    ):
        icnn_zoo.irregular_conv2d(torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, *kernel), torch.zeros(2, 0, 2))


@pytest.mark.parametrize("stride", [10**8, 2**61, 2**63 - 1])
@pytest.mark.parametrize("backend", ["auto", "torch", "native", "reference"])
def test_a_stride_beyond_the_input_is_any_stride(stride: int, backend: str) -> None:
    tensors = Case().tensors()
    one, other = (icnn_zoo.irregular_conv2d(*tensors, step, 1, backend=backend) for step in (stride, 1000))
    assert one.shape[2:] == (1, 1)
    assert torch.equal(one, other)


@pytest.mark.parametrize("stride", [(2**63, 1), 2**70])
def test_a_stride_beyond_64_bits_is_refused(stride: object) -> None:
    with pytest.raises(ValueError, match="`stride` must be an int or a pair"):
        icnn_zoo.irregular_conv2d(*Case().tensors(), stride)


@pytest.mark.parametrize("case", [Case(), Case(groups=4, channels=(4, 4)), Case(shapes="kernel")], ids=str)
def test_memory_does_not_grow_with_padding_that_strides_jump_over(case: Case) -> None:
    """A plane of this padding would take 100 TB."""
    tensors = case.tensors()
    sizes = ((4_000_000, 4_000_000), (4_000_000,) * 4, (1, 1), case.groups)
    with torch.no_grad():
        tensors[2].view(-1)[5] = torch.nan
    output = icnn_zoo.irregular_conv2d(*tensors, sizes[0], 4_000_000, groups=case.groups)
    expected = reference.irregular_conv2d(*tensors, *sizes)
    torch.testing.assert_close(output, expected, equal_nan=True)
    grads, expected_grads = (torch.autograd.grad(each.sum(), tensors) for each in (output, expected))
    torch.testing.assert_close(grads, expected_grads, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_every_pixel_below_a_position_that_is_no_number_has_no_gradient(backend: str) -> None:
    """Also one that strides jump over."""
    input, positions = torch.ones(1, 1, 1, 1, requires_grad=True), torch.full((1, 1, 2), torch.nan)
    output = icnn_zoo.irregular_conv2d(input, torch.ones(1, 1, 1, 1), positions, None, (1, 3), (0, 2), backend=backend)
    (grad,) = torch.autograd.grad(output.sum(), input)
    assert output.isnan().all()
    assert grad.isnan().all()


def test_integers_of_numpy_are_integers() -> None:
    tensors = Case(groups=2).tensors()
    two = np.int64(2)
    assert torch.equal(
        icnn_zoo.irregular_conv2d(*tensors, two, np.array([1, 2]), (two, 1), two),
        icnn_zoo.irregular_conv2d(*tensors, 2, (1, 2), (2, 1), 2),
    )
