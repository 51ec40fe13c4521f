"""Trains a network with a peer's layers in the place of irregular ones, with the same data, schedule and evaluation.

python -m icnn_zoo.experiments.peers fit -c configs/drawn_voc.yaml --model.start null \
    --model.peer deformable --model.peer_start blocks.4

Peers:

- "deformable": torchvision's deform_conv2d with offsets learned for every pixel from the layer's input (Deformable
  Convolutional Networks, arXiv 1703.06211: zero-initialized, one group of offsets).
- "dcls": Dilated Convolution with Learnable Spacings (arXiv 2112.03740) with Gaussian interpolation of a learned width
  (arXiv 2306.00817), one shape per kernel, as the package DCLS has it: positions begin normal with 0.5 px and have five
  times the rate of weights, without decay. Needs ``pip install 'icnn-zoo[benchmark]'``.
- "dilation": the regular layers with a larger dilation, but the head, whose dilation is chosen already.
- "row": as many taps in one row, 1x9 for 3x3: what somebody would build who knows that context is horizontal.
- "filled": a tap at every pixel of a dilated kernel's extent, 5x5 for 3x3 of dilation 2: more weights, no positions.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torchvision.ops import deform_conv2d

from icnn_zoo.conversion.planning import plan
from icnn_zoo.optim import poly_policy
from icnn_zoo.training.lightning_cli import ZooCLI
from icnn_zoo.training.task import SegmentationTask

Peer = Literal["deformable", "dcls", "dilation", "row", "filled"]
_DCLS_REACH = 6  # pixels to either side, about as far as irregular layers go on the lines of glyphs
_DCLS_RATE = 5.0  # of positions and widths over that of weights, as in DCLS's own training of ConvNeXt


class DeformableConv2d(nn.Module):
    """A convolution whose taps are displaced by what another convolution says at every pixel.

    Args:
        conv: The regular convolution; its weight and bias stay the same Parameters.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        geometry: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        self.offsets: Any = nn.Conv2d(conv.in_channels, 2 * taps, conv.kernel_size, **geometry)  # type: ignore[arg-type]
        nn.init.zeros_(self.offsets.weight)  # the network begins as the regular one
        nn.init.zeros_(self.offsets.bias)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """Offsets for every pixel, and the convolution with them."""
        # deform_conv2d finds the number of groups by the weight's second dimension.
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return deform_conv2d(input, self.offsets(input), self.weight, self.bias, **geometry)


class DclsConv2d(nn.Module):
    """DCLS's layer of as many taps as a regular one.

    Args:
        conv: The regular convolution, whose weights are not kept: DCLS draws its own beside its positions.

    Raises:
        ImportError: The package DCLS is not installed.
        ValueError: A strided or dilated convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        _check_plain(conv)
        try:
            from DCLS.construct.modules import Dcls2d
        except ImportError as error:
            raise ImportError("the peer dcls needs a package: pip install 'icnn-zoo[benchmark]'") from error
        logging.disable(logging.WARNING)  # which kernel it uses
        self.conv = Dcls2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0] * conv.kernel_size[1],
            padding=_DCLS_REACH,
            dilated_kernel_size=2 * _DCLS_REACH + 1,
            groups=conv.groups,
            bias=conv.bias is not None,
            version="gauss",
        )
        logging.disable(logging.NOTSET)

    def forward(self, input: Tensor) -> Tensor:
        """Draws the taps into a dense kernel and convolves with it."""
        return self.conv(input)

    def geometry(self) -> Iterator[nn.Parameter]:
        """Positions and widths."""
        yield from (self.conv.P, self.conv.SIG)

    def clamp(self, *_: object) -> None:
        """Keeps positions within the kernel, as DCLS's own training does after every step."""
        self.conv.clamp_parameters()


def row_of_taps(conv: nn.Conv2d) -> nn.Conv2d:
    """A new convolution with the taps of ``conv`` in one row.

    Raises:
        ValueError: A strided or dilated convolution, or one of an even kernel.
    """
    _check_plain(conv)
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    if taps % 2 == 0:
        raise ValueError(f"the peer row needs an odd number of taps; got a kernel of {conv.kernel_size}.")
    size, padding = (1, taps), (0, taps // 2)
    return nn.Conv2d(
        conv.in_channels, conv.out_channels, size, padding=padding, groups=conv.groups, bias=conv.bias is not None
    )


def filled(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution without dilation over the extent of ``conv``, with new weights of zero: it begins as ``conv``."""
    step = conv.dilation
    size = tuple((length - 1) * gap + 1 for length, gap in zip(conv.kernel_size, step, strict=True))
    geometry: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}
    options = {**geometry, "bias": conv.bias is not None, "device": conv.weight.device}
    # Draws no random numbers: what is drawn after it is what the regular network draws.
    dense: nn.Conv2d = skip_init(nn.Conv2d, conv.in_channels, conv.out_channels, size, **options)
    with torch.no_grad():
        dense.weight.zero_()
        dense.weight[..., :: step[0], :: step[1]] = conv.weight
    dense.bias = conv.bias
    return dense


def _check_plain(conv: nn.Conv2d) -> None:
    if set(conv.stride) | set(conv.dilation) != {1}:
        raise ValueError(
            f"this peer needs layers of stride and dilation 1; got stride {conv.stride} and dilation {conv.dilation}."
        )


_LAYERS = {"deformable": DeformableConv2d, "dcls": DclsConv2d, "row": row_of_taps, "filled": filled}


def _dilate(conv: nn.Conv2d, factor: int) -> None:
    # The size of the output stays: half of what the kernel grows by on either side.
    assert not isinstance(conv.padding, str)  # as replace_layers has checked
    conv.padding = tuple(
        pad + (size - 1) * step * (factor - 1) // 2
        for pad, size, step in zip(conv.padding, conv.kernel_size, conv.dilation, strict=True)
    )
    conv.dilation = tuple(factor * step for step in conv.dilation)


def replace_layers(model: nn.Module, start: str, peer: Peer, dilation: int = 2) -> list[str]:
    """Puts a peer where :func:`icnn_zoo.convert` would put irregular layers.

    Args:
        model: The network, changed in place.
        start: First module with the peer's layers.
        peer: Which peer.
        dilation: Factor of the peer "dilation".

    Returns:
        The names of the replaced layers.

    Raises:
        ValueError: A layer that the peer cannot stand for, or ``dilation`` below 1.
        ImportError: The peer's package is not installed.
    """
    if dilation < 1:
        raise ValueError(f"`dilation` must be at least 1; got {dilation}.")
    names = [layer.name for layer in plan(model, start).converted]
    if peer == "dilation":
        names = [name for name in names if not name.startswith("classifier")]
    for name in names:
        parent, _, child = name.rpartition(".")
        conv = model.get_submodule(name)
        if type(conv) is not nn.Conv2d or isinstance(conv.padding, str):
            raise ValueError(
                f"{name} is a {type(conv).__name__} with padding {conv.padding}; peers need a plain Conv2d."
            )
        if peer == "dilation":
            _dilate(conv, dilation)
        else:
            setattr(model.get_submodule(parent), child, _LAYERS[peer](conv))
    return names


class PeerTask(SegmentationTask):
    """A SegmentationTask with a peer's layers.

    Args:
        peer: Which peer.
        peer_start: First module with its layers, as ``start``.
        peer_dilation: Factor of the dilation for the peer "dilation".
        **task: Arguments of SegmentationTask; ``start`` must be None.
    """

    architecture = (*SegmentationTask.architecture, "peer", "peer_start", "peer_dilation")

    def __init__(
        self, peer: Peer = "deformable", peer_start: str = "classifier", peer_dilation: int = 2, **task: Any
    ) -> None:
        if task.get("start") is not None:
            raise ValueError(f"`start` must be null where a peer is trained; got {task['start']!r}.")
        super().__init__(**task)
        replace_layers(self.model, peer_start, peer, peer_dilation)

    def configure_optimizers(self) -> Any:
        """Those of the task; DCLS's positions and widths get a rate of their own, and no decay."""
        configured = super().configure_optimizers()
        layers = [module for module in self.model.modules() if isinstance(module, DclsConv2d)]
        if not layers:
            return configured
        optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
        geometry = [parameter for layer in layers for parameter in layer.geometry()]
        own = {id(parameter) for parameter in geometry}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        optimizer.add_param_group(
            {"name": "geometry", "params": geometry, "lr": _DCLS_RATE * self.lr, "weight_decay": 0.0}
        )
        for layer in layers:
            optimizer.register_step_post_hook(layer.clamp)
        schedule["scheduler"] = poly_policy(optimizer, schedule["scheduler"].max_steps, self.poly_power)
        return configured


class PeerCLI(ZooCLI):
    """The command line of the package for :class:`PeerTask`."""

    task = PeerTask


if __name__ == "__main__":
    PeerCLI.run(sys.argv[1:])
