"""The irregular convolution as a layer."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from icnn_zoo.nn.conv_rules import ConvRules, find_rules, plain_weight, reason_to_refuse, static_padding
from icnn_zoo.nn.free_taps import scatter_taps
from icnn_zoo.nn.layer_reading import TapReading
from icnn_zoo.nn.spreads import Interpolation, SpreadPer, initial_spread, spread_shape
from icnn_zoo.nn.step_watch import StepWatch
from icnn_zoo.nn.tap_restriction import Axes, Limit, restrict
from icnn_zoo.ops.functional import irregular_conv2d
from icnn_zoo.ops.geometry import at_least_one, pair
from icnn_zoo.ops.sharing import Shapes, rename_per_kernel, shape_owners
from icnn_zoo.ops.wide_interpolation import NARROWEST

_EXACT = (torch.float32, torch.float64)
_LEARNED = ("displacement", "widening")  # in pixels: never in half precision
_SMALLEST = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}


class IrregularConv2d(TapReading, nn.Module):
    """A convolution whose taps sit at learned real-valued positions; see :func:`icnn_zoo.irregular_conv2d`.

    Takes what ``nn.Conv2d`` takes and has its attributes, but is not an ``nn.Conv2d``: code that looks for one would
    fuse, prune or re-initialize it wrongly. Stride, padding and dilation may be edited later, as those of an
    ``nn.Conv2d``: the displacement stays, and the regular grid follows.

    The parameter ``displacement`` holds positions minus the regular grid, in pixels. Learning it is the same as
    learning the positions; a recipe that decays every parameter then pulls towards the regular shape and not into the
    center, and a checkpoint survives a change of dilation. ``displacement`` stays float32 after ``.half()``,
    ``.bfloat16()`` and under autocast (bfloat16 has a spacing of 0.0625 px at 8 to 16 px), and follows ``.double()``;
    so do the tensors of a parametrization of it (``torch.nn.utils.parametrize``), and ``widening``.

    A layer with triangle or gaussian interpolation learns spreads too: the parameter ``widening`` is what they have
    over the narrowest one, 1 pixel of a triangle and 0.2 of a gaussian. Its sign does not matter: none gets narrower.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels N of the output.
        kernel_size: Taps (rows, columns) or one int for both. The center of an even kernel is tap ``(k - 1) // 2``.
        stride: Step between output pixels.
        padding: Int, pair, "same" or "valid".
        dilation: Spacing of the regular grid in pixels; positions are absolute.
        groups: Number of groups, from 1 to C.
        bias: Whether there is a bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular". Positions beyond the padding read zeros.
        device: Device of the parameters.
        dtype: Type of weight and bias. The displacement is float32, or float64 for a float64 layer.
        epsilon: Initial displacement in pixels (Eq. 5). Bilinear interpolation has a kink at integers; epsilon says on
            which side to start. At 0 the layer equals ``nn.Conv2d`` exactly.
        shapes: "channel" for the paper's shape per input channel, shared by all kernels: displacement [C, kh * kw, 2].
            "layer" for one shape of all (ACU): [1, kh * kw, 2]. "group" for one per group: [groups, kh * kw, 2].
            "kernel" for the full version, one shape per kernel: [N, C / groups, kh * kw, 2].
        interpolation: "bilinear" reads four pixels, "triangle" and "gaussian" all within reach of a learned spread.
        spread: Initial spread in pixels; None for 1 (triangle: bilinear interpolation) or 0.5 (gaussian). A gaussian of
            0.2 on the regular grid is ``nn.Conv2d`` within 2e-5 of its input's size; wider ones blur, and move further.
        spread_per: Who has a spread of its own: each "tap", each "channel" (each shape), or the "layer".
        taps: None for ``kernel_size`` taps on the regular grid; a number for so many free ones: ``weight`` is then
            [N, C / groups, taps], ``kernel_size`` the extent they lie in, ``displacement`` their position.

    Attributes:
        backend: What computes it, "auto" at first; see :func:`icnn_zoo.irregular_conv2d`.
        regular_grid: Positions of the regular kernel [kh * kw, 2], integers times dilation, origin at the center tap.

    Raises:
        TypeError: A forward with a displacement in half precision, which only code around ``.to()`` can make.
        ValueError: An argument does not fit; the message names it.

    Example:
        >>> import torch, icnn_zoo
        >>> layer = icnn_zoo.IrregularConv2d(8, 16, 3, padding=2, dilation=2)
        >>> layer(torch.randn(1, 8, 21, 33)).shape
        torch.Size([1, 16, 21, 33])
        >>> layer.positions.shape
        torch.Size([8, 9, 2])
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    displacement: Tensor
    widening: Tensor | None
    step_watch: StepWatch | None
    axes: Axes = "both"
    limit: Limit = None
    _grid: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        epsilon: float = 1e-3,
        shapes: Shapes = "channel",
        interpolation: Interpolation = "bilinear",
        spread: float | None = None,
        spread_per: SpreadPer = "tap",
        taps: int | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else device
        # nn.Conv2d's own constructor checks the arguments it shares and brings them to one form.
        regular = nn.Conv2d(
            in_channels,
            out_channels,
            pair("kernel_size", kernel_size, 1),
            pair("stride", stride, 1),
            padding if isinstance(padding, str) else pair("padding", padding, 0),
            pair("dilation", dilation, 1),
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]  # checked by the callee
            device="meta",
            dtype=dtype,
        )
        if taps is not None and interpolation != "bilinear" and regular.dilation != (1, 1):
            pairs = zip(regular.kernel_size, regular.dilation, strict=True)
            size = tuple(step * (extent - 1) + 1 for extent, step in pairs)
            raise ValueError(
                f"`dilation` must be 1 for free taps with {interpolation} interpolation, which read within "
                f"`kernel_size`; got {regular.dilation}. Take kernel_size={size}, in which taps may start anywhere."
            )
        self._adopt(regular, ConvRules(), epsilon, shapes, interpolation, spread, spread_per)
        shape = regular.weight.shape if taps is None else (*regular.weight.shape[:2], at_least_one("taps", taps))
        self.weight = nn.Parameter(regular.weight.new_empty(shape, device=device))
        self.bias = None if regular.bias is None else nn.Parameter(torch.empty_like(regular.bias, device=device))
        self._add_displacement(self.weight)
        self.reset_parameters()

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        *,
        epsilon: float = 1e-3,
        shapes: Shapes = "channel",
        interpolation: Interpolation = "bilinear",
        spread: float | None = None,
        spread_per: SpreadPer = "tap",
    ) -> IrregularConv2d:
        """Makes an irregular layer of a regular one, with everything it holds.

        Weight, bias and other parameters are the same Parameter objects; buffers, hooks (their handles stay valid),
        training mode and the attributes that other code reads or has set come along. ``conv`` itself stays as it is.

        Args:
            conv: An nn.Conv2d, timm's Conv2dSame, StdConv2d, ScaledStdConv2d and their Same versions, a subclass of
                these without a forward of its own, or a class given to :func:`icnn_zoo.register_conv_rules`; of any
                kernel size.
            epsilon: Initial displacement in pixels.
            shapes: Who shares a shape; see the class, also for what follows.
            interpolation: What a tap reads.
            spread: Initial spread in pixels.
            spread_per: Who has a spread.

        Returns:
            A layer in the training mode, dtype and device of ``conv``, whose displacement is trainable if the weight
            is.

        Raises:
            TypeError: ``conv`` is of another class; its forward may do more than a convolution.
            ValueError: ``epsilon`` is not finite, ``shapes`` is unknown, or ``conv`` is not a plain module now: see
                :func:`icnn_zoo.convert`.
        """
        rules, reason = find_rules(conv), reason_to_refuse(conv)
        if rules is None:
            raise TypeError(f"`conv`: {reason}.")
        if reason is not None:
            raise ValueError(f"`conv`: {reason}.")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(conv, rules, epsilon, shapes, interpolation, spread, spread_per)
        layer._add_displacement(conv.weight)
        for name in _LEARNED:
            if getattr(layer, name) is not None:
                getattr(layer, name).requires_grad_(conv.weight.requires_grad)
        return layer

    def _adopt(
        self,
        conv: nn.Conv2d,
        rules: ConvRules,
        epsilon: float,
        shapes: Shapes,
        interpolation: Interpolation,
        spread: float | None,
        spread_per: SpreadPer,
    ) -> None:
        if not (isinstance(epsilon, SupportsFloat) and math.isfinite(epsilon)):
            raise ValueError(f"`epsilon` must be a finite number of pixels; got {epsilon!r}.")
        shape_owners(shapes, conv)  # which checks it
        spread = initial_spread(interpolation, spread)
        spread_shape(spread_per, (1, 1, 2))
        # Hooks stay the very same dictionaries, which their handles point to; what gets new members is copied.
        vars(self).update(vars(conv))
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[name] = vars(conv)[name].copy()
        self.padding_rule = rules.padding
        self.weight_rule = rules.weight
        for name in _SMALLEST:
            setattr(self, name, getattr(conv, name))
        for name in ("in_channels", "out_channels", "groups"):
            setattr(self, name, operator.index(getattr(conv, name)))
        self.epsilon = float(epsilon)
        self.shapes: Shapes = shapes
        self.interpolation: Interpolation = interpolation
        self.initial_spread = spread
        self.spread_per: SpreadPer = spread_per
        self.backend = "auto"
        self.step_watch = None

    def _add_displacement(self, weight: Tensor) -> None:
        taps = math.prod(weight.shape[2:])
        owners = shape_owners(self.shapes, self)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.displacement = nn.Parameter(
            torch.full((*owners, taps, 2), self.epsilon, dtype=dtype, device=weight.device)
        )
        self.register_buffer("_grid", self._make_grid(), persistent=False)
        self.register_parameter("widening", None)
        if self.initial_spread is not None:
            widening = self.displacement.new_empty(spread_shape(self.spread_per, self.displacement.shape))
            self.widening = nn.Parameter(widening)
            self._reset_widening()

    def _reset_widening(self) -> None:
        if self.widening is not None and self.initial_spread is not None:
            nn.init.constant_(self.widening, self.initial_spread - NARROWEST[self.interpolation])

    @property
    def regular_grid(self) -> Tensor:
        """Positions of the regular kernel [kh * kw, 2], by kernel size and dilation; zeros [T, 2] for free taps."""
        grid = self._grid
        fits = grid.device == self.displacement.device and grid.dtype == self.displacement.dtype
        return grid if fits else self._make_grid()

    def _make_grid(self) -> Tensor:
        like = self.displacement
        if self.has_free_taps:
            return like.new_zeros(like.shape[-2:])
        rows, cols = (
            dilation * (torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) // 2)
            for size, dilation in zip(self.kernel_size, self.dilation, strict=True)
        )
        return torch.cartesian_prod(rows, cols).reshape(-1, 2)

    def __setattr__(self, name: str, value: Any) -> None:
        # What a rule of a person's own makes of its padding is its business.
        free = name == "padding" and (isinstance(value, str) or self.padding_rule is not static_padding)
        if name in _SMALLEST and not free:
            value = pair(name, value, _SMALLEST[name])
        super().__setattr__(name, value)
        if name == "dilation" and "_grid" in self._buffers:
            self._grid = self._make_grid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"interpolation": "bilinear", "initial_spread": None, "spread_per": "tap", **rename_per_kernel(state)}
        state["_parameters"].setdefault("widening", None)
        super().__setstate__(state)

    def reset_parameters(self) -> None:
        """Draws weight and bias as nn.Conv2d does, puts every tap epsilon off the regular grid, resets spreads."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(self.weight[0].numel(), 1))  # 0 without input channels
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.constant_(self.displacement, self.epsilon)
        if self.has_free_taps:
            scatter_taps(self.displacement, self.kernel_size)
        self._reset_widening()

    @property
    def positions(self) -> Tensor:
        """Absolute positions (row, col) in pixels, in the shape of ``displacement``."""
        displacement = self.displacement
        if displacement.dtype not in _EXACT:
            raise TypeError(
                f"`displacement` must be float32 or float64, but something has made it {displacement.dtype}, which "
                "rounds positions. Module.to() does not; for FSDP2's mixed precision see icnn_zoo.whole_displacements."
            )
        return restrict(self, self.regular_grid + displacement)

    def forward(self, input: Tensor) -> Tensor:
        """Convolves [B, C, H, W] or [C, H, W] to the size nn.Conv2d gives."""
        traced: Any = input
        if isinstance(traced, fx.Proxy):  # any tracer keeps the layer whole, as torch.fx does with torch.nn's own
            tracer: Any = traced.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        if self.step_watch is not None and self.training and not torch.compiler.is_compiling():
            self.step_watch.check(self.displacement, self.smooth_interval)
        padding: int | Sequence[int] | str = self.padding
        if self.padding_rule is not static_padding or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            top, bottom, left, right = self.padding_rule(self, input)
            input = F.pad(input, (left, right, top, bottom), mode=mode)
            padding = 0
        return irregular_conv2d(
            input,
            self.weight_rule(self),
            self.positions,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            interpolation=self.interpolation,
            spread=self.spread,
            extent=self.reading.extent,
            backend=self.backend,
        )

    def _tensors_of(self, name: str) -> list[Tensor]:
        parametrizations: Any = self._modules.get("parametrizations", {})
        if name not in parametrizations:
            return [] if getattr(self, name) is None else [getattr(self, name)]
        return [*parametrizations[name].parameters(), *parametrizations[name].buffers()]

    def displacement_parameters(self) -> list[nn.Parameter]:
        """The displacement, or what a parametrization (``torch.nn.utils.parametrize``) computes it from."""
        return [tensor for tensor in self._tensors_of("displacement") if isinstance(tensor, nn.Parameter)]

    def spread_parameters(self) -> list[nn.Parameter]:
        """The widening, or what a parametrization computes it from; empty for bilinear interpolation."""
        return [tensor for tensor in self._tensors_of("widening") if isinstance(tensor, nn.Parameter)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IrregularConv2d:
        # Module.half() and friends end here. Positions must not be rounded to half precision, not even on the way.
        exact = [tensor for name in _LEARNED for tensor in self._tensors_of(name)]
        exact += [tensor.grad for tensor in exact if tensor.is_leaf and tensor.grad is not None]
        ids = {id(tensor) for tensor in exact}

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            rounds = id(tensor) in ids and result.is_floating_point() and result.dtype not in _EXACT
            return tensor.to(result.device) if rounds else result

        self._grid = self.regular_grid  # which may have been left behind on another device
        super()._apply(apply, recurse)
        self._grid = self._make_grid()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in _LEARNED:
            loaded = getattr(self, name)
            if isinstance(loaded, nn.Parameter) and loaded.dtype not in _EXACT:
                # load_state_dict(assign=True) takes the dtype of what is loaded.
                setattr(self, name, nn.Parameter(loaded.float(), loaded.requires_grad))
        self._grid = self.regular_grid
        if self.step_watch is not None:
            self.step_watch.forget()

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros", "shapes": "channel"}
        defaults |= {"axes": "both", "limit": None, "interpolation": "bilinear", "spread_per": "tap"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        if self.padding_rule is not static_padding:
            text += f", padding_rule={self.padding_rule.__name__}"
        if self.weight_rule is not plain_weight:
            text += f", weight_rule={self.weight_rule.__name__}"
        return text if self.bias is not None else text + ", bias=False"


def irregular_layers(model: nn.Module) -> dict[str, IrregularConv2d]:
    """The irregular layers of a network by dotted name, in registration order, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IrregularConv2d)}
