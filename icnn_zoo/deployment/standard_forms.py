"""One irregular layer in standard convolutions: the forms there are, what they cost, and the choice.

Interpolation is linear in the input, so a layer equals ordinary convolutions with drawn kernels. Three forms:

- *dense*: one convolution with the box around all taps. Best for small boxes and for depthwise layers.
- *taps*: for every tap a depthwise convolution with the tap's own box, then a 1x1 convolution; summed. Its cost does
  not depend on the dilation. Shared shapes only.
- *stacked*: one convolution from C to T * N channels with the box around all displacements, then a sparse convolution
  on the regular grid that shifts and adds the T parts. Best for few outputs, and for the full version when dilated.

Each is joined, where that is cheaper, by a branch for *outliers*, (channel, tap) pairs far from the others, so that
these do not widen the box of all: their planes are picked, shifted by whole pixels one binary digit of the distance
after the other (a 3x3 convolution with one weight, dilation and padding 2^i: exact for every input size, and its cost
is logarithmic in the distance), interpolated, and mixed.

Letters used in shapes: N outputs, C inputs, G groups, T taps, n = N / G, c = C / G.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from icnn_zoo.deployment.form_costs import MAX_DISTANCE, Box, Layout, Plan, Reads, conv_cost, count_digits, plans
from icnn_zoo.nn.conv_rules import dynamic_same_padding, static_padding
from icnn_zoo.nn.irregular_conv import IrregularConv2d
from icnn_zoo.ops.geometry import resolve_padding
from icnn_zoo.ops.sharing import expand_shapes
from icnn_zoo.ops.tap_reading import tabulate

# Larger depthwise kernels get their zeros from a module of its own: PyTorch 2.15 takes 10 times longer on a CPU
# when the convolution pads (measured from 15x15 on).
MAX_PADDED_KERNEL = 13

_PADDING_MODULES = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "circular": nn.CircularPad2d}


class StandardForm(NamedTuple):
    """What a layer was rewritten into."""

    module: nn.Module
    form: str
    """"dense", "taps" or "stacked"."""
    box: tuple[int, int]
    """Rows and columns of the (largest) drawn kernel."""
    outliers: int
    """(Channel, tap) pairs in the branch of their own."""
    cost: float
    """Modelled time over that of the regular convolution."""


def has_standard_form(layer: IrregularConv2d) -> bool:
    """Whether it is known how to pad for this layer: a rule of a person's own could do anything."""
    return layer.padding_rule in (static_padding, dynamic_same_padding)


def standard_form(layer: IrregularConv2d, weight: Tensor, bias: Tensor | None) -> StandardForm:
    """Rewrites a layer, in the form that costs least.

    Args:
        layer: The layer, all its positions finite.
        weight: The weight it convolves with, or one with a normalization folded in, [N, C / G, kh, kw].
        bias: Its bias, likewise.

    Returns:
        The module and what it is. Its parts are torch.nn modules: a torch.nn.Sequential, or, where branches are added
        up or the padding depends on the input's size, a torch.fx.GraphModule that calls them (torch.nn has no module
        for a sum). Weights are drawn in float64, on the CPU, and have the dtype and device of the layer's.
    """
    padding = _static_padding(layer) if _pads_with_zeros(layer) else (0, 0, 0, 0)
    reach = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    origin = [
        step * ((size - 1) // 2) - before
        for step, size, before in zip(layer.dilation, layer.kernel_size, padding[::2], strict=True)
    ]
    taps = expand_shapes(layer.read_taps.detach(), layer.in_channels).cpu().double()
    per_group = layer.out_channels // layer.groups
    shape = (layer.groups, per_group if taps.dim() == 4 else 1, layer.in_channels // layer.groups)
    taps = taps.reshape(*shape, -1, taps.shape[-1])
    (first_row, rows), (first_col, cols) = (tabulate(taps, axis, layer.reading) for axis in range(2))
    reads = Reads(torch.stack([first_row, first_col], dim=-1), rows, cols)
    layout = Layout(
        weight=weight.detach().cpu().double().reshape(layer.groups, per_group, shape[2], -1),
        bias=None if bias is None else bias.detach().cpu().double(),
        offsets=taps[..., :2] + torch.tensor(origin),
        reads=reads.moved(torch.tensor(origin)),
        first=(-padding[0], -padding[2]),
        surplus=(padding[0] + padding[1] - reach[0] - 1, padding[2] + padding[3] - reach[1] - 1),
        kernel_size=layer.kernel_size,
        dilation=layer.dilation,
        stride=layer.stride,
        like=layer.weight.detach(),
    )
    form, plan = min(plans(layout), key=lambda item: item[1].cost)
    main = _BUILDERS[form](layout, plan)
    outliers = _outlier_branch(layout, plan.outliers)
    box = (max(box.height for box in plan.boxes), max(box.width for box in plan.boxes))
    regular = conv_cost(layout.num_outputs, layout.group_inputs, layout.taps)
    module = _with_attributes(_join(layer, main, outliers), layer)
    return StandardForm(module, form, box, int(plan.outliers.sum()), plan.cost / regular)


def _convolution(
    layout: Layout,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    margins: tuple[int, int, int, int] = (0, 0, 0, 0),
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> list[nn.Module]:
    """A convolution with ``weight`` [out, in / groups, rows, cols] of an input padded by ``margins``.

    Margins are (left, right, top, bottom); negative ones crop.
    """
    left, right, top, bottom = margins
    pads_itself = left == right >= 0 and top == bottom >= 0
    if groups > 1 and max(weight.shape[2:]) > MAX_PADDED_KERNEL:
        pads_itself = False
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        (stride[0], stride[1]),
        (top, left) if pads_itself else 0,
        (dilation[0], dilation[1]),
        groups,
        bias=bias is not None,
        device="meta",
    )
    conv.weight = nn.Parameter(weight.to(layout.like).contiguous(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.to(layout.like), requires_grad=False)
    return [conv] if pads_itself else [*_padding(margins), conv]


def _padding(margins: Sequence[int]) -> list[nn.Module]:
    # Zeros first: maps may be smaller than what is cropped.
    parts = (tuple(max(margin, 0) for margin in margins), tuple(min(margin, 0) for margin in margins))
    return [nn.ZeroPad2d(part) for part in parts if any(part)]  # type: ignore[arg-type]  # four ints each


def _margins(layout: Layout, box: Box) -> tuple[int, int, int, int]:
    """What to pad so that a kernel on ``box`` reads right and gives the layer's number of outputs for every input."""
    rows, cols = layout.surplus
    return -box.col, cols + box.width + box.col, -box.row, rows + box.height + box.row


def _dense(layout: Layout, plan: Plan) -> nn.Module:
    (box,) = plan.boxes
    rows, cols = layout.reads.draw(box)
    weight = layout.weight * ~plan.outliers
    shared = layout.is_shared
    kernels = [  # of one output of each group at a time, which bounds the memory
        (weight[:, output, ..., None] * rows[:, 0 if shared else output]).mT @ cols[:, 0 if shared else output]
        for output in range(weight.shape[1])
    ]
    drawn = torch.stack(kernels, dim=1).flatten(0, 1)
    margins = _margins(layout, box)
    parts = _convolution(layout, drawn, layout.bias, margins=margins, stride=layout.stride, groups=layout.groups)
    return nn.Sequential(*parts)


def _taps(layout: Layout, plan: Plan) -> nn.Module:
    used = [tap for tap in range(layout.taps) if not plan.outliers[..., tap].all()] or [0]
    margins = torch.tensor([_margins(layout, plan.boxes[tap]) for tap in used])
    # All taps crop one padded copy.
    common = margins.amax(0).clamp(min=0)
    branches: list[nn.Module] = []
    for tap, own in zip(used, margins, strict=True):
        rows, cols = layout.reads.select((slice(None), 0, slice(None), tap)).draw(plan.boxes[tap])
        kernels = (rows[..., None] * cols[..., None, :]).flatten(0, 1)[:, None]
        weight = (layout.weight * ~plan.outliers)[..., tap].flatten(0, 1)[..., None, None]
        branches.append(
            nn.Sequential(
                *_padding((own - common).tolist()),
                *_convolution(layout, kernels, stride=layout.stride, groups=layout.num_inputs),
                *_convolution(layout, weight, layout.bias if tap == used[0] else None, groups=layout.groups),
            )
        )
    return _Sum(_padding(common.tolist()), branches)


def _stacked(layout: Layout, plan: Plan) -> nn.Module:
    (box,) = plan.boxes
    rows, cols = layout.reads.moved(-layout.grid()).draw(box)
    weight = layout.weight * ~plan.outliers
    # Outputs of the first convolution are ordered (group, output, tap), those of one output side by side.
    kernels = weight[..., None, None] * rows[..., None] * cols[..., None, :]  # [G, n, c, T, height, width]
    drawn = kernels.transpose(2, 3).flatten(0, 2)
    halo = (box.width - 1, box.width - 1, box.height - 1, box.height - 1)
    first = _convolution(layout, drawn, margins=halo, groups=layout.groups)
    one_hot = torch.eye(layout.taps).unflatten(1, layout.kernel_size)
    extent = [step * (size - 1) + 1 for step, size in zip(layout.dilation, layout.kernel_size, strict=True)]
    # The first result starts halo pixels before the input.
    left, _, top, _ = _margins(layout, box)
    margins = (
        left - halo[0],
        layout.surplus[1] + extent[1] - left,
        top - halo[2],
        layout.surplus[0] + extent[0] - top,
    )
    second = _convolution(
        layout,
        one_hot.expand(layout.num_outputs, *one_hot.shape),
        layout.bias,
        margins=margins,
        stride=layout.stride,
        dilation=layout.dilation,
        groups=layout.num_outputs,
    )
    return nn.Sequential(*first, *second)


_BUILDERS: dict[str, Callable[[Layout, Plan], nn.Module]] = {"dense": _dense, "taps": _taps, "stacked": _stacked}


def _outlier_branch(layout: Layout, outliers: Tensor) -> list[nn.Module]:
    """Picks planes, shifts them by whole pixels, interpolates, mixes; nothing if there are no outliers."""
    pairs = outliers & (layout.offsets.abs() < MAX_DISTANCE).all(-1)
    group, output, channel, tap = pairs.nonzero().unbind(1)
    count, device = len(group), outliers.device
    if count == 0:
        return []
    plane = group * layout.group_inputs + channel
    mix = torch.zeros(layout.groups, layout.weight.shape[1], count, dtype=torch.double, device=device)
    order = torch.arange(count, device=device)
    if layout.is_shared:
        mix[group, :, order] = layout.weight[group, :, channel, tap]
    else:
        mix[group, output, order] = layout.weight[group, output, channel, tap]
    reads = layout.reads.select(pairs)
    low, high = reads.ends()
    # Shifts go towards zero, so what a plane loses at its edge is never needed again: what is left to read lies on the
    # side where the input has ended, or on both sides of a plane that was not shifted.
    shift = low.clamp(min=0) + high.clamp(max=0)
    # Maps grow where the layer's output is larger than its input.
    rows, cols = (max(0, surplus + 1) for surplus in layout.surplus)
    parts = _convolution(layout, F.one_hot(plane, layout.num_inputs).double()[..., None, None])
    parts += _padding((0, cols, 0, rows))
    for digit in range(count_digits(shift)):
        step = shift.sign().long() * (shift.abs().long() >> digit & 1)
        if step.any():
            one = F.one_hot(step + 1, 3).double()  # [count, 2, 3]
            width = 2**digit
            parts += _convolution(
                layout,
                (one[:, 0, :, None] * one[:, 1, None])[:, None],
                margins=(width, width, width, width),
                dilation=(width, width),
                groups=count,
            )
    down, right = reads.rows.shape[-1] - 1, reads.cols.shape[-1] - 1
    kernels = reads.moved(-shift).draw(Box(-down, -right, 2 * down + 1, 2 * right + 1))
    parts += _convolution(
        layout,
        (kernels[0][:, :, None] * kernels[1][:, None])[:, None],
        margins=(right, layout.surplus[1] + 1 + right - cols, down, layout.surplus[0] + 1 + down - rows),
        stride=layout.stride,
        groups=count,
    )
    return parts + _convolution(layout, mix.flatten(0, 1)[..., None, None])


def _with_attributes(module: nn.Module, layer: IrregularConv2d) -> nn.Module:
    """Gives a form the attributes of the layer that a network's own code may read (timm's davit does)."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")
    if isinstance(module, nn.Conv2d) and all(getattr(module, name) == getattr(layer, name) for name in names):
        return module
    # On a container of their own: a convolution has true ones that exporters read, and a graph loses them in a copy.
    container = nn.Sequential(module)
    for name in (*names, "padding", "padding_mode"):
        setattr(container, name, getattr(layer, name))
    return container


class _Sum(nn.Module):
    """Branches that read the same padded input and are added up; only there to be traced."""

    def __init__(self, before: Sequence[nn.Module], branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.before = nn.Sequential(*before)
        self.branches = nn.ModuleList(branches)

    def forward(self, input: Tensor) -> Tensor:
        input = self.before(input)
        first, *others = self.branches
        output: Tensor = first(input)
        for branch in others:
            output = output + branch(input)
        return output


class _Join(nn.Module):
    """Padding by input size and the branch of the outliers; only there to be traced."""

    def __init__(
        self, layer: IrregularConv2d, before: list[nn.Module], main: nn.Module, outliers: list[nn.Module]
    ) -> None:
        super().__init__()
        self.before = nn.Sequential(*before)
        self.main = main
        self.outliers = nn.Sequential(*outliers)
        self.mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.kernel = tuple(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))
        self.is_dynamic = _is_dynamic(layer)

    def forward(self, input: Tensor) -> Tensor:
        if self.is_dynamic:
            margins: list[Any] = []  # ints, symbolic ones in an export
            for size, (taps, stride, dilation) in zip(
                (input.shape[-1], input.shape[-2]), self.kernel[::-1], strict=True
            ):
                # What dynamic_same_padding computes, in words that can be traced. The maximum is left out where it
                # changes nothing: it would pile up in the symbolic sizes of an export.
                reach = dilation * (taps - 1) + 1
                total: Any = (size + stride - 1) // stride * stride - size + reach - stride
                if reach < stride:
                    total = torch.sym_max(total, 0)
                margins += [total // 2, total - total // 2]
            input = F.pad(input, margins, self.mode)
        input = self.before(input)
        output: Tensor = self.main(input)
        return output + self.outliers(input) if len(self.outliers) else output


def _join(layer: IrregularConv2d, main: nn.Module, outliers: list[nn.Module]) -> nn.Module:
    before: list[nn.Module] = []
    if not _is_dynamic(layer) and not _pads_with_zeros(layer):
        top, bottom, left, right = _static_padding(layer)
        before = [_PADDING_MODULES[layer.padding_mode]((left, right, top, bottom))]
    if isinstance(main, nn.Sequential) and not outliers and not _is_dynamic(layer):
        parts = [*before, *main]
        return parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    joined = _Join(layer, before, main, outliers)
    graph = fx.Tracer().trace(joined)
    for node in graph.nodes:
        node.type = None  # an annotation as a string, which older PyTorch cannot pickle
    return fx.GraphModule(joined, graph, "StandardConvolutions")


def _static_padding(layer: IrregularConv2d) -> tuple[int, int, int, int]:
    padding = "same" if layer.padding_rule is dynamic_same_padding else layer.padding
    return resolve_padding(padding, layer.kernel_size, layer.stride, layer.dilation)


def _is_dynamic(layer: IrregularConv2d) -> bool:
    # At stride 1 SAME does not depend on the size.
    return layer.padding_rule is dynamic_same_padding and layer.stride != (1, 1)


def _pads_with_zeros(layer: IrregularConv2d) -> bool:
    return layer.padding_mode == "zeros" and not _is_dynamic(layer)
