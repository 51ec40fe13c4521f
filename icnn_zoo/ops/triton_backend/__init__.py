"""The irregular convolution on CUDA, with kernels in Triton and matrix products by cuBLAS.

Four forms, chosen from static sizes alone, so that nothing synchronises and CUDA graphs can hold the calls:

- *columns*, for dense layers: the input is copied to planes with zeros around them, a kernel reads every (channel, tap)
  at its sub-pixel shift into columns, and a matrix product does the rest, for the whole batch where columns are at most
  512 MiB. The backward makes the columns' gradient by a matrix product; one kernel gathers the input's gradient from
  it, a second reads the planes once for both the positions' gradient and the columns, which overwrite their own
  gradient on the way to the weights' gradient. Kernels work on bands of rows, of which all is read before anything is
  written: each row serves the samples above and below it.
- *few*, for dense layers with few outputs (a classifier), where products run on tensor cores: a product with weights
  spread over boxes of 3 x 3 cells, then a sum at the cells' integer offsets. What lies outside of the boxes is listed
  on the GPU and added by columns. An infinite pixel makes all NaN that a box reaches.
- *drawn*, for depthwise layers: each kernel is drawn on the GPU, as the dense box that is around the taps of its
  neighboring channels' kernels too. A thread keeps outputs that lie below one another in registers and adds a column of
  cells to all of them at once, from images where they lie, whatever their strides. Kernels with a large box are summed
  tap by tap. An infinite pixel makes all NaN in its channel that a box reaches.
- *direct*, for tiny groups and the full version: the taps are summed one by one, without columns. The full version
  costs an interpolation for each output channel, input channel and tap.

Triangle and gaussian interpolation are the torch backend's, see :mod:`icnn_zoo.ops.torch_backend`.

Choice, block sizes and chunk sizes are fixed numbers (``Limits``), not tuned at run time: a sum has the same order on
every run, in deterministic mode without ``CUBLAS_WORKSPACE_CONFIG``.

Positions, fractions and interpolation are float32; a column is rounded once to the dtype of the input; products sum in
float32, and their float32 factors are rounded to TF32 where cuDNN would do so (``torch.backends.cudnn.conv``, PyTorch's
default). What lies outside the input is never read, wherever the positions are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icnn_zoo.ops.backends import BackendError
from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.triton_backend.limits import Limits

if TYPE_CHECKING:
    from icnn_zoo.ops.triton_backend.call import Call

# The oldest GPUs with bfloat16.
_CAPABILITY = (8, 0)


class TritonBackend:
    """The backend "triton".

    Args:
        limits: Sizes to work in.
    """

    joins_unknown = True

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._failures: dict[torch.device, str] = {}
        self._able: set[torch.device] = set()

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on a device, in words that follow "cannot run: ", or None."""
        if device.type != "cuda":
            return f"it needs a CUDA device; the input is on {device}"
        if device in self._failures:
            return self._failures[device]
        if device in self._able:  # asking takes longer than a launch
            return None
        if importlib.util.find_spec("triton") is None:
            return "it needs the package triton (pip install triton)"
        if torch.version.hip is not None:
            return "it was made for NVIDIA's GPUs; this PyTorch is for AMD's"
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            needed, given = (".".join(map(str, version)) for version in (_CAPABILITY, capability))
            return f"it needs compute capability {needed} or newer; this is {given}"
        self._able.add(device)
        return None

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether this backend computes in a dtype."""
        return dtype in (torch.float32, torch.float16, torch.bfloat16)

    def too_large(self, geometry: Geometry) -> str | None:
        """Why images of these sizes are too large for this backend, or None."""
        from icnn_zoo.ops.triton_backend.call import MAX_INT, Numbers

        if Numbers.of(geometry).largest <= MAX_INT:
            return None
        sizes = " and outputs of ".join(
            " x ".join(map(str, size)) for size in (geometry.input_size, geometry.output_size)
        )
        return f"`input` is too large for it, as it numbers pixels with 32 bits: images of {sizes}"

    @torch.no_grad()
    def forward(
        self, input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """Computes the irregular convolution of checked arguments.

        Args:
            input: Images [B, C, H, W] of any strides, in a dtype that :func:`supports` names.
            weight: Weights [N, C / G, T].
            positions: Absolute positions in pixels [C, T, 2], or [N, C / G, T, 2] for the full version.
            bias: Bias [N] or None.
            geometry: Sizes of the call.

        Returns:
            Output [B, N, Ho, Wo] in the memory format of ``input``.
        """
        from icnn_zoo.ops.triton_backend.call import empty_output

        output = empty_output(input, (input.shape[0], weight.shape[0], *geometry.output_size))
        if output.numel() == 0:
            return output
        form = self._form(input, weight, positions, geometry)
        call = self.make_call(input, weight, positions, geometry, form.PLANE_GAP)
        self._run(form.forward, call, None if bias is None else bias.contiguous(), output)
        return output

    @torch.no_grad()
    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        geometry: Geometry,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Computes the gradients of :func:`forward` for input, weight and positions, None where not in ``needs``."""
        from icnn_zoo.ops.triton_backend.call import Gradients, empty_like

        grads = Gradients(
            empty_like(input, memory_format(input)) if needs[0] else None,
            weight.new_empty(weight.shape, dtype=torch.float32) if needs[1] else None,
            positions.new_empty(positions.shape, dtype=torch.float32) if needs[2] else None,
        )
        if grad_output.numel() == 0:
            for grad in (grads.input, grads.weight, grads.positions):
                if grad is not None:
                    grad.zero_()
        else:
            form = self._form(input, weight, positions, geometry)
            call = self.make_call(input, weight, positions, geometry, form.PLANE_GAP)
            self._run(form.backward, call, grad_output, grads)
        return (
            grads.input,
            None if grads.weight is None else grads.weight.to(weight.dtype),
            None if grads.positions is None else grads.positions.to(positions.dtype),
        )

    def make_call(self, input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry, gap: int) -> Call:
        """What forward and backward hand to the kernels, with planes of that gap."""
        from icnn_zoo.ops.triton_backend.call import Call

        return Call(input, weight.contiguous(), positions.contiguous(), geometry, self.limits, gap)

    def _form(self, input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry) -> Any:
        """The module whose ``forward`` and ``backward`` compute."""
        from icnn_zoo.ops.triton_backend import columns, direct, drawn, few

        if weight.shape[1] == 1 and weight.shape[2] <= self.limits.drawn_taps:
            return drawn  # kernels with one input channel and few taps: small boxes
        if self._is_direct(weight, positions, geometry):
            return direct
        return few if few.fits(input, weight, geometry, self.limits) else columns

    def _run(self, form: Callable[..., None], call: Call, *arguments: Any) -> None:
        """Runs kernels on the device of the input; one that cannot be compiled makes the backend unavailable there."""
        with torch.cuda.device_of(call.input):
            try:
                form(call, *arguments)
            except BackendError as error:
                self._failures[call.input.device] = str(error)
                raise

    def _is_direct(self, weight: Tensor, positions: Tensor, geometry: Geometry) -> bool:
        """Whether columns would cost more than they save."""
        group_outputs, group_channels = weight.shape[0] // geometry.groups, weight.shape[1]
        return (
            positions.dim() == 4
            or group_channels <= self.limits.direct_channels
            or group_outputs * group_channels <= self.limits.direct_product
        )
