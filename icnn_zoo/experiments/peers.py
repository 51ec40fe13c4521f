"""Trains a network with a peer's layers in the place of irregular ones, with the same data, schedule and evaluation.

python -m icnn_zoo.experiments.peers fit -c configs/drawn_voc.yaml --model.start null \
    --model.peer deformable --model.peer_start blocks.4

Peers: "deformable", torchvision's deform_conv2d with offsets learned for every pixel from the layer's input (Deformable
Convolutional Networks, arXiv 1703.06211: zero-initialised, one group of offsets); "dilation", the regular layers with
twice the dilation, but the head, whose dilation is chosen already.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from icnn_zoo.conversion.planning import plan
from icnn_zoo.training.lightning_cli import ZooCLI
from icnn_zoo.training.task import SegmentationTask

Peer = Literal["deformable", "dilation"]


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


def replace_layers(model: nn.Module, start: str, peer: Peer) -> list[str]:
    """Puts a peer where :func:`icnn_zoo.convert` would put irregular layers.

    Returns:
        The names of the replaced layers.
    """
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
        if peer == "deformable":
            setattr(model.get_submodule(parent), child, DeformableConv2d(conv))
        else:
            conv.dilation = tuple(2 * step for step in conv.dilation)
            # The size of the output stays: (k - 1) d / 2 more on either side for twice the dilation.
            conv.padding = tuple(
                pad + (size - 1) * step // 4
                for pad, size, step in zip(conv.padding, conv.kernel_size, conv.dilation, strict=True)
            )
    return names


class PeerTask(SegmentationTask):
    """A SegmentationTask with a peer's layers.

    Args:
        peer: Which peer.
        peer_start: First module with its layers, as ``start``.
        **task: Arguments of SegmentationTask; ``start`` must be None.
    """

    def __init__(self, peer: Peer = "deformable", peer_start: str = "classifier", **task: Any) -> None:
        if task.get("start") is not None:
            raise ValueError(f"`start` must be null where a peer is trained; got {task['start']!r}.")
        super().__init__(**task)
        replace_layers(self.model, peer_start, peer)


class PeerCLI(ZooCLI):
    """The command line of the package for :class:`PeerTask`."""

    task = PeerTask


if __name__ == "__main__":
    PeerCLI.run(sys.argv[1:])
