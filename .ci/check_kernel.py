"""The native backend runs here, computes what the reference does, and to the same bits with any threads.

``--wheel``: with the kernel of an installed wheel, in an environment without a compiler.
"""

import os
import platform
import sys

if "--wheel" in sys.argv:
    os.environ["PATH"] = ""
    os.environ.pop("CC", None)

import torch

import icnn_zoo
from icnn_zoo.ops import backends
from icnn_zoo.ops.native_backend import build, wheel

# Input, weight, leading sizes of positions, groups, how far apart taps are.
CASES = {
    "dense": ((2, 10, 9, 11), (6, 10, 3, 3), (10,), 1, 2.0),
    "groups": ((2, 8, 9, 11), (6, 4, 3, 3), (8,), 2, 2.0),
    "depthwise": ((3, 4, 9, 9), (8, 1, 5, 5), (4,), 4, 2.0),
    "full version": ((2, 4, 9, 9), (6, 4, 3, 3), (6, 4), 1, 2.0),
    "a box": ((2, 6, 7, 9), (6, 3, 3, 3), (6, 3), 2, 0.7),
    "picked": ((1, 32, 5, 7), (32, 32, 2, 2), (32, 32), 1, 1.4),
}


def run(tensors: list[torch.Tensor], groups: int, backend: str) -> tuple[torch.Tensor, ...]:
    """The output and all gradients."""
    output = icnn_zoo.irregular_conv2d(*tensors, padding=1, groups=groups, backend=backend)
    return output, *torch.autograd.grad(output.square().sum(), tensors)


kind = wheel.find_kind()
reason = backends.why_unavailable("native", torch.device("cpu"), torch.float32)
print(
    f"{platform.machine()}, torch {torch.__version__}: kernel {kind or 'compiled here'}: {reason or 'runs'}", flush=True
)
if reason is not None or (kind is None and "--wheel" in sys.argv):
    sys.exit(1)
pool, generator = build.find_parallel(), torch.Generator().manual_seed(0)
for name, (input, weight, lead, groups, spread) in CASES.items():
    for dtype in (torch.float32, torch.float64):
        tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in (input, weight)]
        tensors.append(torch.randn(*lead, weight[2] * weight[3], 2, generator=generator) * spread)
        tensors = [tensor.requires_grad_() for tensor in tensors]
        oracle = run(tensors, groups, "reference")
        for address in {pool, None}:  # PyTorch's threads, and the kernel's own
            build.find_parallel = lambda address=address: address
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(run(tensors, groups, "native"))
            assert all(torch.equal(one, two) for one, two in zip(*results, strict=True)), name
            for mine, truth in zip(results[0], oracle, strict=True):
                torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())
    print(f"{name}: as the reference", flush=True)
