"""Random calls of the operator, odd ones included: every backend must give the reference's numbers or its error.

A program too, for a C kernel compiled to check every address; see docs/trust.md:

    CC="gcc -fsanitize=address" LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
        python tests/ops/fuzzing.py 2000
"""

import collections
import random
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import icnn_zoo
from icnn_zoo.ops.native_backend import boxes
from icnn_zoo.ops.native_backend.boxes import COLUMN_COST, PICK_COST

BACKENDS = ("native", "torch", "auto")
SPREADS = (0.0, 0.0, 0.7, 0.7, 5.0, 30.0, 1e9)

# Ways to lay a tensor out in memory, all of equal value.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "every second": lambda x: torch.stack([x, torch.full_like(x, 777)], -1)[..., 0],
    "last axis first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "an offset": lambda x: F.pad(x.flatten(), (3, 5), value=777)[3:-5].view(x.shape),
    "negated lazily": lambda x: torch._neg_view(-x),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
}


@dataclass
class Call:
    """One call and the gradient of its output."""

    leaves: dict[str, Tensor]
    options: dict[str, Any]
    regular: bool
    """Whether positions lie on the regular grid, where conv2d gives the same."""
    far: bool
    """Whether padding and stride are such that only "auto" is told to bound its memory."""
    text: str
    wanted: frozenset[str]
    """Leaves of which gradients are asked for in another call; at least one."""

    def run(
        self, convolve: Callable[..., Tensor], wanted: Collection[str] | None = None, **options: Any
    ) -> tuple[Tensor, ...] | Exception:
        """The output and the gradients, of all leaves or of those that are wanted, or what was raised."""
        leaves = {
            name: leaf.detach().requires_grad_(wanted is None or name in wanted) for name, leaf in self.leaves.items()
        }
        try:
            output = convolve(**leaves, **self.options, **options)
        except (ValueError, TypeError) as error:
            return error
        if output.dim() == 0 or not output.requires_grad:
            return (output,)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape).to(output.dtype)
        asked = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return output.detach(), *torch.autograd.grad(output, asked, weights, allow_unused=True)


def make_call(random: random.Random) -> Call:
    """A call, one in eight with a size that is odd."""
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    dtype = random.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    groups = random.choice([1, 1, 1, 2, 3])
    depthwise, per_kernel = random.random() < 0.3, random.random() < 0.3
    group_channels = 1 if depthwise else random.randint(1, 4)
    sizes = {
        "images": random.randint(1, 3),
        "group_channels": group_channels,
        "group_outputs": random.randint(1, 4),
        "height": random.randint(1, 9),
        "width": random.randint(1, 40 if random.random() < 0.2 else 9),
        "rows": random.randint(1, 4),
        "cols": random.randint(1, 4),
    }
    if random.random() < 0.125:
        sizes[random.choice(list(sizes))] = 0
    stride = [random.choice([1, 1, 1, 2, 3, 7]) for _ in range(2)]
    padding = [random.randint(0, 5) for _ in range(2)]
    dilation = [random.choice([1, 1, 2, 3]) for _ in range(2)]
    odd = random.random()
    if odd < 0.04:
        stride[random.randrange(2)] = random.choice([10**8, 2**61, 2**63 - 1, 2**63, 0, -1])
    elif odd < 0.06:
        dilation[random.randrange(2)] = random.choice([10**8, 2**61, 2**64])
    far = 0.06 <= odd < 0.1
    if far:
        padding = [random.choice([10**5, 10**6, 4 * 10**6, 8 * 10**6]) for _ in range(2)]
        stride = [side // random.randint(1, 3) for side in padding]
    channels, outputs = sizes["group_channels"] * groups, sizes["group_outputs"] * groups
    taps = sizes["rows"] * sizes["cols"]
    position_dtype = torch.float64 if dtype == torch.float64 else random.choice([torch.float32, torch.float64])

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    grid = [
        float(min(step, 2**20)) * (torch.arange(size, dtype=torch.float64) - (size - 1) // 2)
        for size, step in zip((sizes["rows"], sizes["cols"]), dilation, strict=True)
    ]
    owners = (outputs, sizes["group_channels"]) if per_kernel else (channels,)
    spread = random.choice(SPREADS)
    positions = torch.cartesian_prod(*grid).reshape(taps, 2) + spread * rand(*owners, taps, 2)
    unknown = positions.numel() > 0 and random.random() < 0.15
    if unknown:
        place = random.randrange(positions.numel())
        positions.view(-1)[place] = random.choice([float("nan"), float("inf"), float("-inf"), 2.0**63, -1e300])
    leaves = {
        "input": rand(sizes["images"], channels, sizes["height"], sizes["width"]).to(dtype),
        "weight": rand(outputs, sizes["group_channels"], sizes["rows"], sizes["cols"]).to(dtype),
        "positions": positions.to(position_dtype),
    }
    if random.random() < 0.6:
        leaves["bias"] = rand(outputs).to(dtype)
    if random.random() < 0.05:  # of another size
        name = random.choice(list(leaves))
        leaves[name] = leaves[name][..., 1:]
    layouts = {name: random.choice(list(LAYOUTS)) for name in leaves}
    for name, layout in layouts.items():
        leaves[name] = LAYOUTS[layout](leaves[name])
    if random.random() < 0.1:  # one number for all
        name = random.choice(list(leaves))
        if leaves[name].numel() > 0:
            leaves[name] = leaves[name].flatten()[:1].expand(leaves[name].numel()).view(leaves[name].shape)
            layouts[name] = "expanded"
            unknown = True
    options: dict[str, Any] = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    wide = not far and random.random() < 0.3
    if wide:
        # Five times the narrowest, 0.2, ends at a pixel, which rounding alone decides to read or not.
        options["interpolation"], least, most = random.choice([("triangle", 1.0, 4.0), ("gaussian", 0.21, 1.5)])
        if random.random() < 0.3:
            options["extent"] = (random.randint(1, 9), random.randint(1, 9))
        position_like = leaves["positions"]
        widths = least + random.choice([0.0, most - least]) * rand(*position_like.shape).abs().clamp(max=1)
        leaves["spread"] = widths.to(position_like.dtype)
    text = f"{sizes}, {options}, {dtype}, per_kernel={per_kernel}, spread={spread}, {layouts}"
    some = [name for name in leaves if random.random() < 0.5]
    wanted = frozenset(some or [random.choice(list(leaves))])
    return Call(leaves, options, spread == 0 and not unknown and not per_kernel and not wide, far, text, wanted)


def check(call: Call) -> str:
    """Runs a call by every backend; returns what kind it was."""
    expected = call.run(icnn_zoo.irregular_conv2d, backend="reference")
    for backend in ("auto",) if call.far else BACKENDS:
        found = call.run(icnn_zoo.irregular_conv2d, backend=backend)
        if isinstance(expected, Exception):
            assert type(found) is type(expected), (backend, found, expected)
            assert str(found) == str(expected)
        else:
            assert not isinstance(found, Exception), (backend, found)
            compare(found, expected, call.leaves["input"].dtype)
            # What is computed for some gradients may be missing where they are not asked for.
            if len(found) > 1 and backend != "auto":
                some = [name for name in call.leaves if name in call.wanted]
                of_all = dict(zip(call.leaves, expected[1:], strict=True))
                found = call.run(icnn_zoo.irregular_conv2d, some, backend=backend)
                compare(found, (expected[0], *(of_all[name] for name in some)), call.leaves["input"].dtype)
    if isinstance(expected, Exception):
        return "refused"
    if not all(leaf.numel() for leaf in call.leaves.values()):
        return "nothing to sum"
    if call.regular and not call.far:
        # PyTorch 2.14 has no gradient for weights of some strides.
        leaves = {name: leaf for name, leaf in call.leaves.items() if name != "positions"}
        conv = Call(
            {name: leaf.double().contiguous() for name, leaf in leaves.items()},
            call.options,
            True,
            False,
            call.text,
            call.wanted,
        )
        regular = conv.run(F.conv2d)
        assert not isinstance(regular, Exception), regular
        output, by_input, by_weight, _, *by_bias = expected
        compare((output, by_input, by_weight, *by_bias), regular, call.leaves["input"].dtype)
        return "like conv2d"
    return "far" if call.far else "irregular"


def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Holds results against the reference's, relative to the largest of each."""
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for result, truth in zip(found, expected, strict=True):
        assert (result is None) == (truth is None)
        if truth is None or truth.numel() == 0:
            assert truth is None or result.shape == truth.shape
            continue
        known = truth.double()[truth.isfinite()].abs()
        scale = max(1.0, known.max().item() if known.numel() else 1.0)
        torch.testing.assert_close(
            result.double(), truth.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
        )


def main(count: int, first: int = 0) -> None:
    """Makes and checks so many calls, numbered from ``first``; a failure says which it was."""
    kinds: collections.Counter[str] = collections.Counter()
    for seed in range(first, first + count):
        call = make_call(random.Random(seed))
        price = 1.0 - seed % 2  # full versions as small as these would hardly ever be picked at their costs
        try:
            with mock.patch.multiple(boxes, PICK_COST=price * PICK_COST, COLUMN_COST=price * COLUMN_COST):
                kinds[check(call)] += 1
        except BaseException:
            print(f"call {seed}: {call.text}", file=sys.stderr)
            raise
    print(f"{count} calls agree: {dict(kinds.most_common())}")


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(2)
    main(int(sys.argv[1]))
