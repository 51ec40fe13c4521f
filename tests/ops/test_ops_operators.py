"""What compilers, exporters and function transforms see of the operator."""

import logging
import subprocess
import sys

import pytest
import torch
from backend_cases import Case
from torch import Tensor, nn

import icnn_zoo
from icnn_zoo.ops import formula, operators, register_backend, unregister_backend
from icnn_zoo.ops.torch_backend import TorchBackend

# torch 2.11 warns of itself while it traces and exports.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

SIZES = ((1, 1), (1, 1, 1, 1), (1, 1), 2)


def arguments(per_kernel: bool = False, requires_grad: bool = True) -> list[Tensor]:
    """Input, weight, positions and bias of a 3x3 layer with two groups."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))
    owners = (6, 2) if per_kernel else (4,)
    moved = grid + torch.rand(*owners, 9, 2, generator=generator) * 0.8 + 0.1
    tensors = [torch.randn(*shape, generator=generator) for shape in ((2, 4, 5, 7), (6, 2, 3, 3), (6,))]
    return [tensor.requires_grad_(requires_grad) for tensor in (*tensors[:2], moved, tensors[2])]


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., 1 : 1 + x.shape[3]],
    "one channel of many": lambda x: x.expand(2, 4, 5, 7).transpose(0, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_kernel", [False, True], ids=["shared", "per kernel"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_opcheck_passes(layout: str, per_kernel: bool, backend: str) -> None:
    input, weight, positions, bias = arguments(per_kernel, requires_grad=False)
    input = LAYOUTS[layout](input)
    forward = torch.ops.icnn_zoo.irregular_conv2d.default
    backward = torch.ops.icnn_zoo.irregular_conv2d_backward.default
    output = forward(input, weight, positions, bias, *SIZES, backend)
    torch.library.opcheck(forward, (input, weight, positions, bias, *SIZES, backend))
    for mask in ([True, True, True], [True, False, False], [False, False, True]):
        torch.library.opcheck(backward, (output, input, weight, positions, *SIZES, mask, backend))


class Network(nn.Module):
    """Two irregular layers with an activation and a pooling in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = icnn_zoo.IrregularConv2d(3, 8, 3, padding=1)
        self.second = icnn_zoo.IrregularConv2d(8, 4, 3, padding=2, dilation=2, groups=2)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.displacement)

    def forward(self, input: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(input)).contiguous())


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Network()


def test_compiled_with_dynamic_shapes_equals_eager_without_recompiling(network: Network) -> None:
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 3, 9, 11), (3, 3, 12, 8), (5, 3, 7, 17)):
            input = torch.randn(size, requires_grad=True)
            leaves = [input, *network.parameters()]
            output, expected = compiled(input), network(input)
            torch.testing.assert_close(output, expected)
            grads, expected_grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (output, expected))
            torch.testing.assert_close(grads, expected_grads)


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager_without_recompiling(network: Network) -> None:
    compiled = torch.compile(network, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 3, 9, 11), (3, 3, 12, 8)):
            input = torch.randn(size, requires_grad=True)
            leaves = [input, *network.parameters()]
            output, expected = compiled(input), network(input)
            torch.testing.assert_close(output, expected)
            grads, expected_grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (output, expected))
            torch.testing.assert_close(grads, expected_grads)


def test_channels_last_inputs_compile_to_channels_last_outputs(network: Network) -> None:
    input = torch.randn(2, 8, 9, 11).contiguous(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(network.second, fullgraph=True, backend="aot_eager")
    output = compiled(input)
    assert output.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(output.sum(), input)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, network.second(input))


def exported(network: Network) -> torch.export.ExportedProgram:
    """The network with batch, height and width left open."""
    sizes = {number: torch.export.Dim(name, min=4, max=64) for number, name in ((0, "b"), (2, "h"), (3, "w"))}
    return torch.export.export(network.eval(), (torch.randn(5, 3, 9, 11),), dynamic_shapes=(sizes,))


def test_exported_network_holds_one_node_a_layer_and_takes_any_size(network: Network) -> None:
    program = exported(network)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.icnn_zoo.irregular_conv2d.default) == 2
    input = torch.randn(4, 3, 13, 6)
    torch.testing.assert_close(program.module()(input), network(input))


def test_exported_network_decomposes_into_standard_operators(network: Network) -> None:
    program = exported(network).run_decompositions(operators.DECOMPOSITIONS)
    assert not [node for node in program.graph.nodes if "icnn_zoo" in str(node.target)]
    input = torch.randn(4, 3, 13, 6)
    torch.testing.assert_close(program.module()(input), network(input), rtol=1e-4, atol=1e-5)


def test_func_grad_equals_autograd() -> None:
    tensors = arguments()

    def loss(*leaves: Tensor) -> Tensor:
        return icnn_zoo.irregular_conv2d(*leaves, padding=1, groups=2).square().sum()

    grads = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*tensors)
    torch.testing.assert_close(grads, torch.autograd.grad(loss(*tensors), tensors))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_inputs_equals_a_loop() -> None:
    input, *rest = arguments(requires_grad=False)
    stack = torch.stack([input, input * 2, input.flip(0)])
    mapped = torch.func.vmap(lambda x: icnn_zoo.irregular_conv2d(x, *rest, padding=1, groups=2))(stack)
    torch.testing.assert_close(
        mapped, torch.stack([icnn_zoo.irregular_conv2d(x, *rest, padding=1, groups=2) for x in stack])
    )


def test_deterministic_algorithms_are_no_complaint() -> None:
    tensors = arguments()
    torch.use_deterministic_algorithms(True)
    try:
        for backend in ("auto", "torch"):
            output = icnn_zoo.irregular_conv2d(*tensors, padding=1, groups=2, backend=backend)
            torch.autograd.grad(output.sum(), tensors)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("per_kernel", [False, True], ids=["shared", "per kernel"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_memory_around_the_input_is_never_read(backend: str, per_kernel: bool) -> None:
    """Every tensor lies between NaNs; taps reach far out."""
    tensors = arguments(per_kernel, requires_grad=False)
    tensors[2] = tensors[2] * 5
    poisoned = []
    for tensor in tensors:
        memory = torch.full((tensor.numel() + 512,), torch.nan)
        memory[256:-256] = tensor.flatten()
        poisoned.append(memory[256:-256].view(tensor.shape).requires_grad_())
    output = icnn_zoo.irregular_conv2d(*poisoned, padding=1, groups=2, backend=backend)
    assert output.isfinite().all()
    for grad in torch.autograd.grad(output.sum(), poisoned):
        assert grad.isfinite().all()


TRIANGLE = {"interpolation": "triangle"}
THREADED = {  # input, weight, leading sizes of positions, options, how far taps are from the grid
    "parts of images": ((2, 40, 33, 33), (20, 40, 3, 3), (40,), {"padding": 1}, 3.0),
    "groups, stride": ((5, 24, 25, 25), (32, 6, 3, 3), (24,), {"padding": 1, "stride": 2, "groups": 4}, 3.0),
    "depthwise": ((9, 16, 21, 21), (16, 1, 5, 5), (16,), {"padding": 2, "groups": 16}, 3.0),
    "full version": ((3, 8, 25, 25), (12, 8, 3, 3), (12, 8), {"padding": 1}, 3.0),
    "a box": ((4, 30, 35, 41), (32, 15, 3, 3), (32, 15), {"padding": 1, "groups": 2}, 0.5),
    "a box, strides": ((2, 54, 18, 30), (16, 54, 3, 3), (16, 54), {"padding": 1, "stride": (2, 1)}, 0.5),
    "a box of many images": ((9, 32, 40, 40), (8, 8, 3, 3), (8, 8), {"padding": 1, "groups": 4}, 0.5),
    "a box of small groups": ((4, 21, 11, 9), (6, 7, 3, 3), (21,), {"padding": 1, "groups": 3}, 0.5),
    "many small images": ((9, 24, 7, 7), (20, 24, 3, 3), (24,), {"padding": 1}, 1.0),
    "the full version, picked": ((3, 32, 25, 25), (32, 32, 3, 3), (32, 32), {"padding": 1}, 1.5),
    "gaussians": ((3, 8, 25, 25), (12, 8, 3, 3), (8,), {"padding": 1, "interpolation": "gaussian"}, 1.0),
    "triangles, strides": ((3, 8, 25, 25), (12, 4, 3, 3), (8,), {"stride": 2, "groups": 2, **TRIANGLE}, 1.0),
    "triangles of the full version": ((3, 8, 25, 25), (12, 8, 3, 3), (12, 8), {"padding": 1, **TRIANGLE}, 1.0),
    "the same, far apart": ((3, 8, 25, 25), (12, 8, 3, 3), (12, 8), {"padding": 1, **TRIANGLE}, 20.0),
    "triangles, depthwise": ((3, 8, 25, 25), (8, 1, 3, 3), (8,), {"padding": 1, "groups": 8, **TRIANGLE}, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", THREADED)
def test_thread_counts_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    *shapes, lead, options, spread = THREADED[name]
    input, weight = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    height, width = weight.shape[2:]
    grid = torch.cartesian_prod(torch.arange(height) - height // 2, torch.arange(width) - width // 2)
    positions = grid + torch.randn(*lead, height * width, 2, generator=generator, dtype=dtype) * spread
    tensors = [tensor.requires_grad_() for tensor in (input, weight, positions)]
    if "interpolation" in options:
        tensors.append(torch.full_like(positions, 1.2).requires_grad_())
        options = {**options, "spread": tensors[-1]}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            output = icnn_zoo.irregular_conv2d(*tensors[:3], **options)
            results.append((output, *torch.autograd.grad(output.square().sum(), tensors)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_a_backend_that_cannot_run_says_why() -> None:
    tensors = arguments(requires_grad=False)
    with pytest.raises(
        RuntimeError, match=r"`backend`='triton' cannot run: it needs a CUDA device; the input is on cpu"
    ):
        icnn_zoo.irregular_conv2d(*tensors, padding=1, groups=2, backend="triton")
    with pytest.raises(
        ValueError, match=r"`backend` must be one of auto, triton, native, torch, reference; got 'cuda'"
    ):
        icnn_zoo.irregular_conv2d(*tensors, padding=1, groups=2, backend="cuda")


def test_automatic_choice_logs_the_same_words_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="icnn_zoo"):
        icnn_zoo.irregular_conv2d(*arguments(requires_grad=False), padding=1, groups=2)
    assert "`backend`='triton' cannot run: it needs a CUDA device; the input is on cpu" in caplog.text


def test_importing_the_package_imports_no_triton_and_starts_no_cuda() -> None:
    code = (
        "import sys, icnn_zoo, torch; icnn_zoo.IrregularConv2d(2, 2, 3)(torch.zeros(1, 2, 5, 5));"
        "assert not torch.cuda.is_initialized(); print([n for n in sys.modules if n.split('.')[0] == 'triton'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_half_precision_is_at_most_twice_as_wrong_as_a_plain_implementation(backend: str, dtype: torch.dtype) -> None:
    """Plain: the formula, its columns and products in half precision."""
    input, weight, positions, _ = arguments(requires_grad=False)
    input, weight = input.to(dtype), weight.to(dtype)
    exact = icnn_zoo.irregular_conv2d(input.double(), weight.double(), positions, None, padding=1, groups=2)
    plain = formula.irregular_conv2d(input, weight, positions, None, *SIZES)
    ours = icnn_zoo.irregular_conv2d(input, weight, positions, None, padding=1, groups=2, backend=backend)
    assert (ours.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


class CountingBackend(TorchBackend):
    """A backend of somebody else: the torch backend, counted."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def unavailable(self, device):
        return None if device.type == "cpu" else "it is for CPUs"

    def supports(self, dtype):
        return dtype == torch.float64

    def forward(self, *arguments):
        self.calls.append("forward")
        return super().forward(*arguments)

    def backward(self, *arguments):
        self.calls.append("backward")
        return super().backward(*arguments)


@pytest.fixture
def counting():
    backend = CountingBackend()
    register_backend("counting", backend)
    yield backend
    unregister_backend("counting")


def test_a_registered_backend_computes_when_it_is_named(counting):
    case = Case()
    tensors = case.tensors()
    expected, output = case.run(case.tensors(), "reference"), case.run(tensors, "counting")
    assert torch.allclose(output, expected)
    output.sum().backward()
    assert counting.calls == ["forward", "backward"]
    case.run(tensors)  # "auto" does not take it
    assert counting.calls == ["forward", "backward"]
    compiled = torch.export.export(_Named(), tuple(case.tensors()[:3]), strict=False)
    assert "icnn_zoo.irregular_conv2d" in compiled.graph_module.code


class _Named(torch.nn.Module):
    def forward(self, input, weight, positions):
        return icnn_zoo.irregular_conv2d(input, weight, positions, padding=1, backend="counting")


def test_a_registered_backend_says_what_it_cannot_do_and_names_are_taken_once(counting):
    case = Case()
    with pytest.raises(RuntimeError, match=r"'counting' cannot run: it does not compute torch.float32"):
        case.run(case.tensors(torch.float32), "counting")
    for name in ("counting", "torch", "auto", "reference"):
        with pytest.raises(ValueError, match="there is a backend"):
            register_backend(name, counting)
    with pytest.raises(TypeError, match="`backend` must have unavailable, supports, forward, backward"):
        register_backend("other", object())
    with pytest.raises(ValueError, match="counting, reference; got 'other'"):
        case.run(case.tensors(), "other")
