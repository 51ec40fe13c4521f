"""Times single layers in bfloat16: cuDNN, this package (as called, and without gaps between kernels), deform_conv2d.

"graph" is the time of a replayed CUDA graph: what the GPU needs. "eager" is what a caller waits for, "enqueue" what the
CPU needs to launch it. Where eager is much more than graph, the CPU holds the GPU back. deform_conv2d has no bfloat16
on CUDA: it computes in float16, offsets constant over the image.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import rehearsing
from benchmarks.gpu.shapes import REHEARSED_TIMED, TIMED, Layer

Call = Callable[[], Any]
REPEATS = 3


class Clock:
    """Times calls in milliseconds on CUDA; on a CPU, where times mean nothing, just once."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def eager(self, call: Call, calls: int = 10) -> tuple[float, float]:
        """Milliseconds of a call, and of the CPU to launch it."""
        if not self.on_gpu:
            begin = time.perf_counter()
            call()
            return ((time.perf_counter() - begin) * 1e3,) * 2
        for _ in range(3):
            call()
        elapsed, enqueued = [], []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin = time.perf_counter()
            start.record()
            for _ in range(calls):
                call()
            end.record()
            enqueued.append((time.perf_counter() - begin) / calls * 1e3)
            torch.cuda.synchronize()
            elapsed.append(start.elapsed_time(end) / calls)
        return statistics.median(elapsed), statistics.median(enqueued)

    def graph(self, call: Call, calls: int = 20) -> float:
        """Milliseconds of a replay."""
        if not self.on_gpu:
            return self.eager(call)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.eager(graph.replay, calls)[0]

    def peak_mib(self, call: Call) -> float | None:
        """Peak of the memory that a call needs above what is held."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def conv_calls(layer: Layer, tensors: list[Tensor]) -> tuple[Call, Call]:
    """Forward and backward of cuDNN."""
    input, weight, _, _, grad = tensors
    (stride, padding, dilation, groups), weight = (
        layer.geometry.values(),
        weight.contiguous(memory_format=torch.channels_last),
    )
    pairs = ((stride,) * 2, (padding,) * 2, (dilation,) * 2, False, (0, 0), groups, (True, True, False))
    return (
        lambda: F.conv2d(input, weight, None, stride, padding, dilation, groups),
        lambda: torch.ops.aten.convolution_backward(grad, input, weight, None, *pairs),
    )


def irregular_calls(layer: Layer, tensors: list[Tensor], backend: str) -> tuple[Call, Call]:
    """This package's forward and backward."""
    input, weight, positions, _, grad = tensors
    operators = torch.ops.icnn_zoo
    name = "staged" if layer.staged else backend
    how = (name if layer.interpolation == "bilinear" else "auto", layer.interpolation)
    return (
        lambda: operators.irregular_conv2d(input, weight, positions, None, *layer.sizes, *how),
        lambda: operators.irregular_conv2d_backward(
            grad, input, weight, positions, *layer.sizes, [True, True, True], *how
        ),
    )


def deformable_call(layer: Layer, device: str) -> Call:
    """Forward and backward of torchvision's operator, which takes an offset for every pixel."""
    from torchvision.ops import deform_conv2d

    dtype = torch.float16 if device == "cuda" else torch.float32
    input, weight, positions, _, grad = layer.tensors(device, dtype, torch.contiguous_format)
    steps = layer.dilation * (torch.arange(layer.kernel) - (layer.kernel - 1) // 2).float()
    offsets = (positions - torch.cartesian_prod(steps, steps).to(device)).to(dtype).reshape(1, -1, 1, 1)
    options = {key: value for key, value in layer.geometry.items() if key != "groups"}

    def call() -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in (input, weight, offsets)]
        with torch.enable_grad():
            spread = leaves[2].expand(len(input), -1, *grad.shape[-2:])
            torch.autograd.grad(deform_conv2d(leaves[0], spread, leaves[1], **options), leaves, grad)

    return call


def time_layer(layer: Layer, device: str, backend: str) -> dict[str, Any]:
    """All numbers of a layer."""
    clock = Clock(device)
    tensors = layer.tensors(device, torch.bfloat16 if device == "cuda" else torch.float32)
    row: dict[str, Any] = {"layer": layer.as_record()}
    with torch.no_grad():
        for name, calls in (
            ("conv2d", conv_calls(layer, tensors)),
            ("icnn_zoo", irregular_calls(layer, tensors, backend)),
        ):
            row[name] = {"peak_mib": [], "graph_ms": [], "eager_ms": [], "enqueue_ms": []}
            for call in calls:
                call()  # compiles
                row[name]["peak_mib"].append(clock.peak_mib(call))
                eager, enqueue = clock.eager(call)
                row[name]["eager_ms"].append(eager)
                row[name]["enqueue_ms"].append(enqueue)
                graph = layer.interpolation == "bilinear" or name == "conv2d"
                row[name]["graph_ms"].append(clock.graph(call) if graph else eager)
            if device == "cuda" and name == "icnn_zoo":
                row[name]["kernels"] = [top_kernels(call) for call in calls]
    del tensors
    if not layer.per_kernel and layer.interpolation == "bilinear" and not layer.staged:
        try:
            deformable = deformable_call(layer, device)
            row["deform_conv2d"] = {"peak_mib": clock.peak_mib(deformable), "eager_ms": clock.eager(deformable, 2)[0]}
        except (ImportError, RuntimeError) as error:  # one that is out of memory among them
            row["deform_conv2d"] = {"reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]}
    return row


def top_kernels(call: Call) -> list[str]:
    """Where the GPU's time goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)[:8]
    return [f"{event.key[:60]} x{event.count}: {event.self_device_time_total:.0f} us" for event in events]


def main(folder: Path, seconds: float, *, rehearsal: bool = False) -> None:
    """Times the layers that layers.json does not have yet, most important first."""
    begin, device, path = time.monotonic(), "cpu" if rehearsal else "cuda", folder / "layers.json"
    rows = json.loads(path.read_text()) if path.is_file() else {}
    torch.backends.cudnn.benchmark = True
    with rehearsing.backend(rehearsal) as backend:
        for name, layer in (REHEARSED_TIMED if rehearsal else TIMED).items():
            if name in rows:
                continue
            if time.monotonic() - begin > seconds - 10:
                sys.exit(3)  # unfinished
            try:
                rows[name] = time_layer(layer, device, backend)
            except RuntimeError as error:
                if rehearsal:
                    raise
                rows[name] = {"layer": layer.as_record(), "reason": str(error)[:500]}
            print(name, json.dumps(rows[name]), flush=True)
            path.write_text(json.dumps(rows, indent=1) + "\n")
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
