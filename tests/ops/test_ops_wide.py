"""Triangle and gaussian interpolation: against the reference, written formulas, and what is refused."""

import math

import pytest
import torch
from torch import Tensor
from wide_cases import KINDS, LAYOUTS, arguments, run

import icnn_zoo
from icnn_zoo.ops import formula, register_backend, unregister_backend
from icnn_zoo.ops.backends import choose_backend
from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.torch_backend import TorchBackend, dense
from icnn_zoo.ops.torch_backend.limits import Limits


@pytest.mark.parametrize("far", [0.0, 30.0], ids=["near", "one tap far away"])
@pytest.mark.parametrize(("stride", "extent"), [(1, None), (2, (3, 5))])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_equal_the_reference(kind, layout, stride, extent, far):
    tensors = arguments(kind, layout, far)
    expected = run(tensors, kind, layout, stride, extent, "reference")
    cotangent = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    grads = torch.autograd.grad(expected, tensors, cotangent)
    for backend in ("auto", "torch"):
        output = run(tensors, kind, layout, stride, extent, backend)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(torch.autograd.grad(output, tensors, cotangent), grads)


@pytest.mark.parametrize("stride", [1, 2])
def test_windows_of_more_pixels_than_a_processor_has_registers(stride):
    tensors = list(arguments("gaussian", "channel"))
    tensors[3] = (tensors[3].detach() + 1.8).requires_grad_()  # 20 rows and columns and more
    expected = run(tensors, "gaussian", "channel", stride, None, "reference")
    grads = torch.autograd.grad(expected.square().sum(), tensors)
    output = run(tensors, "gaussian", "channel", stride, None, "auto")
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), tensors), grads)


def test_a_tap_at_no_number_leaves_other_channels_gradients_alone():
    torch.manual_seed(0)
    grid = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))
    for width in range(5, 40):
        positions = grid + torch.rand(3, 9, 2) * 4 - 2
        tensors = torch.randn(1, 3, 9, width), torch.randn(4, 3, 3, 3), torch.randn(1, 4, 9, width)

        def gradients(positions: Tensor, tensors: tuple[Tensor, ...] = tensors) -> list[Tensor]:
            asked = [tensor.clone().requires_grad_() for tensor in (*tensors[:2], positions)]
            output = icnn_zoo.irregular_conv2d(*asked, padding=1, interpolation="gaussian", spread=0.7)
            by_input, by_weight, by_positions = torch.autograd.grad(output, asked, tensors[2])
            return [by_input[:, 1:], by_weight[:, 1:], by_positions[1:]]

        expected = gradients(positions)
        positions[0, width % 9, width % 2] = math.nan
        torch.testing.assert_close(gradients(positions), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_gradients_that_are_asked_for_are_needed(layout, stride):
    tensors = arguments("gaussian", layout)
    expected = torch.autograd.grad(run(tensors, "gaussian", layout, stride, None, "auto").square().sum(), tensors)
    for wanted, grad in enumerate(expected):
        some = [tensor.detach().requires_grad_(number == wanted) for number, tensor in enumerate(tensors)]
        output = run(some, "gaussian", layout, stride, None, "auto")
        torch.testing.assert_close(torch.autograd.grad(output.square().sum(), some[wanted])[0], grad)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_the_formula_of_higher_derivatives(kind):
    tensors = [tensor.detach()[:1, :2, :3, :4].requires_grad_() for tensor in arguments(kind, "channel")[:1]]
    _, weight, positions, spread, bias = arguments(kind, "depthwise")
    tensors += [t.detach()[:2].requires_grad_() for t in (weight, positions, spread, bias)]

    def call(*tensors: Tensor) -> Tensor:
        input, weight, positions, spread, bias = tensors
        return icnn_zoo.irregular_conv2d(
            input, weight, positions, bias, 1, 1, groups=2, interpolation=kind, spread=spread
        )

    assert torch.autograd.gradcheck(call, tensors)
    taps = torch.cat([tensors[2], tensors[3]], dim=-1)
    sizes = ((1, 1), (1, 1, 1, 1), (1, 1), 2)
    by_formula = formula.irregular_conv2d(tensors[0], tensors[1], taps, tensors[4], *sizes, "auto", kind)
    torch.testing.assert_close(by_formula, call(*tensors))
    assert torch.autograd.gradgradcheck(call, tensors, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pixel_is_read_with_the_written_weight(kind):
    impulse = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    impulse[..., 4, 4] = 1
    spread, row, col = 1.3, 0.4, -0.7
    positions = torch.tensor([[[row, col]]], dtype=torch.float64)
    output = icnn_zoo.irregular_conv2d(
        impulse, torch.ones(1, 1, 1, 1).double(), positions, interpolation=kind, spread=spread
    )

    def weights(position: float) -> list[float]:
        raw = [
            max(0.0, spread - abs(k - position))
            if kind == "triangle"
            else math.exp(-(((k - position) / spread) ** 2) / 2)
            for k in range(-7, 8)
        ]
        return [value / sum(raw) for value in raw]

    expected = torch.tensor([[a * b for b in weights(col)] for a in weights(row)])
    torch.testing.assert_close(output[0, 0].flip(0, 1).float(), expected[3:12, 3:12].float(), atol=2e-6, rtol=1e-5)


def test_a_triangle_of_one_pixel_is_bilinear_also_in_its_gradients_at_integers():
    input, weight, positions, _, bias = arguments("triangle", "channel")
    positions = positions.detach().round().requires_grad_()
    results = []
    for options in ({}, {"interpolation": "triangle", "spread": 1.0}):
        output = icnn_zoo.irregular_conv2d(input, weight, positions, bias, 1, 1, 1, 2, **options)
        results.append((output, *torch.autograd.grad(output.square().sum(), [input, weight, positions])))
    torch.testing.assert_close(*results)


def test_a_narrow_gaussian_on_the_grid_is_conv2d_and_its_gradient_reaches_as_far_as_it_is_wide():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    image = torch.rand(1, 3, 7, 8)
    layer = icnn_zoo.IrregularConv2d.from_conv2d(conv, epsilon=0.0, interpolation="gaussian", spread=0.2)
    torch.testing.assert_close(layer(image), conv(image), atol=2e-5 * 27, rtol=0)
    far = torch.zeros(1, 1, 1, 9, dtype=torch.float64)
    far[..., 7] = 1  # three pixels from the tap
    for spread, reaches in ((0.2, False), (1.5, True)):
        position = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
        output = icnn_zoo.irregular_conv2d(
            far, torch.ones(1, 1, 1, 1).double(), position, interpolation="gaussian", spread=spread
        )
        (by_position,) = torch.autograd.grad(output[..., 4].sum(), position)
        assert bool(by_position[0, 0, 1] > 0.01) == reaches


def test_on_gpus_standard_operators_compute():
    geometry = Geometry.of((9, 9), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, "gaussian")
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16, geometry) == "torch"


class _Drawing(TorchBackend):
    """Draws every layer into boxes, as is done on devices other than CPUs."""

    def _dense_box(self, weight: Tensor, positions: Tensor, geometry: Geometry) -> dense.Box | None:
        return dense.measure_box(positions, geometry)


@pytest.mark.parametrize("at_once", [1, 2**24])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_layers_can_be_drawn(kind: str, groups: int, at_once: int) -> None:
    """With a shape for each channel too, some outputs at a time or all."""
    input, _, positions, spread, bias = arguments(kind, "channel")
    weight = torch.rand(4, 4 // groups, 2, 3, dtype=torch.float64, requires_grad=True)
    tensors = [input, weight, positions, spread, bias]

    def grads_and_output(backend: str) -> list[Tensor]:
        options = {"interpolation": kind, "spread": spread, "backend": backend}
        output = icnn_zoo.irregular_conv2d(input, weight, positions, bias, 1, 1, 1, groups, **options)
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    register_backend("drawing", _Drawing(Limits(kernel_elements=at_once)))
    try:
        torch.testing.assert_close(grads_and_output("drawing"), grads_and_output("reference"))
    finally:
        unregister_backend("drawing")


REFUSED = {
    "unknown": ({"interpolation": "cubic"}, "`interpolation` must be one of bilinear, triangle, gaussian; got 'cubic'"),
    "bilinear with a spread": ({"spread": 1.0}, "`spread` must be left out"),
    "none": ({"interpolation": "gaussian"}, "`spread` must be given for gaussian"),
    "zero": ({"interpolation": "gaussian", "spread": 0.0}, "`spread` must be 0.2 to 5 pixels .* got 0 to 0"),
    "negative": ({"interpolation": "gaussian", "spread": -1.0}, "`spread` must be 0.2 to 5"),
    "narrow triangle": ({"interpolation": "triangle", "spread": 0.5}, "`spread` must be 1.0 to 5"),
    "no number": ({"interpolation": "gaussian", "spread": math.nan}, "`spread` must be .* got nan"),
    "beyond the map": ({"interpolation": "gaussian", "spread": 9.0}, "`spread` must be 0.2 to 5 .* got 9"),
    "shape": ({"interpolation": "gaussian", "spread": torch.ones(3, 1, 2)}, "broadcast to `positions` .* got .3, 1, 2"),
    "extent": ({"interpolation": "gaussian", "spread": 1.0, "extent": 0}, "`extent` must be"),
    "backend": ({"interpolation": "gaussian", "spread": 1.0, "backend": "triton"}, "does not compute gaussian"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name):
    options, message = REFUSED[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        icnn_zoo.irregular_conv2d(torch.zeros(1, 2, 4, 5), torch.ones(1, 2, 1, 1), torch.zeros(2, 1, 2), **options)
