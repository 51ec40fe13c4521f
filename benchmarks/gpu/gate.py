"""Is the operator right on this GPU? Every form, dtype and layout against the formula in float64, and more.

A line a check, and gate.json. One failure ends nothing. Each form is checked in a process of its own, as compiling its
kernels takes most of the time.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import icnn_zoo
from benchmarks.gpu import rehearsing
from benchmarks.gpu.shapes import FORMS, REHEARSED_FORMS, Layer
from icnn_zoo.ops import formula
from icnn_zoo.ops.geometry import Geometry

LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # error / norm of the true result
NAMES = ("output", "input gradient", "weight gradient", "position gradient", "bias gradient")
LAYOUTS = (torch.channels_last, torch.contiguous_format)


def run(layer: Layer, tensors: list[Tensor], grad: Tensor, backend: str) -> list[Tensor]:
    """Output and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = icnn_zoo.irregular_conv2d(*leaves, **layer.geometry, backend=backend)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def truth(layer: Layer, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The same by the formula in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = formula.irregular_conv2d(*leaves, *layer.sizes)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.double())]


def errors(results: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Norms of the errors relative to those of the expected results."""
    pairs = zip(results, expected, strict=True)
    return [((result.double() - true).norm() / true.norm().clamp_min(1e-12)).item() for result, true in pairs]


def staged_kernels(layer: Layer, dtype: torch.dtype) -> int:
    """How many of a form's two kernels in CUDA C++ can be used; a card may have too little memory for a block."""
    from icnn_zoo.ops.triton_backend import staged

    geometry = Geometry.of(layer.size, (layer.kernel, layer.kernel), *layer.sizes).canonical()
    sizes = staged.Sizes(geometry, layer.batch, layer.channels[0], layer.kernel**2, dtype, torch.float32, 0)
    return sum(find(sizes) is not None for find in (staged.columns_launch, staged.gradient_launch))


class Checks:
    """Runs checks and keeps what came of them.

    Args:
        backend: The backend to check.
        device: Where.
        known: The checks that were run before.
        deadline: When ``time.monotonic`` is there, no check begins.
    """

    def __init__(self, backend: str, device: str, known: frozenset[str], deadline: float) -> None:
        self.backend, self.device, self.known, self.deadline = backend, device, known, deadline
        self.results: list[dict[str, object]] = []
        self.skipped: list[str] = []

    def attempt(self, name: str, check: Callable[[], str | None]) -> None:
        """Runs a check that was not run before; an exception is a failure, with its text."""
        if name in self.known:
            return
        begin = time.monotonic()
        if begin > self.deadline:
            self.skipped.append(name)
            return
        try:
            text, passed = check() or "", True
        except Exception as error:
            lines = str(error).strip().splitlines()
            text, passed = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300], False
            traceback.print_exc(limit=-4, file=sys.stdout)
        seconds = round(time.monotonic() - begin, 2)
        self.results.append({"check": name, "passed": passed, "text": text, "seconds": seconds})
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {text} ({seconds} s)", flush=True)

    def equals_formula(self, layer: Layer, dtype: torch.dtype, layout: torch.memory_format) -> str:
        """Output and gradients are as precise as the dtype allows."""
        *tensors, grad = layer.tensors(self.device, dtype, layout)
        found = errors(run(layer, tensors, grad, self.backend), truth(layer, tensors, grad))
        text = ", ".join(f"{name} {error:.1e}" for name, error in zip(NAMES, found, strict=True))
        if layer.staged and self.device == "cuda":
            text += f"; {staged_kernels(layer, dtype)} of 2 kernels in CUDA C++"
        assert all(error <= LIMITS[dtype] for error in found), f"{text}; limit {LIMITS[dtype]:g}"
        return text

    def positions_that_are_no_numbers(self, layer: Layer) -> None:
        """NaN and infinity give NaN, huge numbers do not, and nothing crashes."""
        input, weight, positions, bias, grad = layer.tensors(self.device)
        for value in (float("nan"), -1e12) if self.device == "cpu" else (float("nan"), float("inf"), 3e38, -1e12):
            positions[1, 2, 0] = value
            output = run(layer, [input, weight, positions, bias], grad, self.backend)[0]
            assert output.isnan().all() == (abs(value) > 1e39 or value != value), value

    def strided_input(self, layer: Layer) -> str:
        """A view with odd strides."""
        input, *others, grad = layer.tensors(self.device)
        batch, channels, height, width = input.shape
        wide = input.new_zeros(batch, 2 * channels, height + 1, width + 3)
        tensors = [wide[:, 1::2, 1:, 2:-1].copy_(input), *others]
        found = errors(run(layer, tensors, grad, self.backend), truth(layer, tensors, grad))
        assert max(found) <= LIMITS[torch.float32], found
        return f"{max(found):.1e}"

    def deterministic_mode(self, layer: Layer) -> None:
        """Needs no CUBLAS_WORKSPACE_CONFIG, and two runs are equal."""
        *tensors, grad = layer.tensors(self.device)
        torch.use_deterministic_algorithms(True)
        try:
            first, second = (run(layer, tensors, grad, self.backend) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(map(torch.equal, first, second))

    def exported(self, layer: Layer) -> None:
        """An exported layer, called while gradients are on."""
        module = icnn_zoo.IrregularConv2d(*layer.channels, 3, padding=1).to(self.device)
        module.backend = self.backend
        input = layer.tensors(self.device)[0]
        program = torch.export.export(module, (input,)).module()
        torch.testing.assert_close(program(input), module(input))

    def second_derivatives(self, layer: Layer) -> None:
        """They exist and are finite."""
        leaves = [tensor.requires_grad_() for tensor in layer.tensors(self.device)[:4]]
        output = icnn_zoo.irregular_conv2d(*leaves, **layer.geometry, backend=self.backend)
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))

    def other_stream(self, layer: Layer) -> None:
        """Gives the same bits."""
        *tensors, grad = layer.tensors(self.device)
        expected, stream = run(layer, tensors, grad, self.backend), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = run(layer, tensors, grad, self.backend)
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))

    def autocast(self, layer: Layer) -> None:
        """Gives bfloat16."""
        tensors = layer.tensors(self.device)[:4]
        with torch.autocast(self.device, torch.bfloat16):
            output = icnn_zoo.irregular_conv2d(*tensors, **layer.geometry, backend=self.backend)
        assert output.dtype == torch.bfloat16

    def compiled_with_graphs(self, layer: Layer) -> None:
        """torch.compile, CUDA graphs included, gives the same gradients."""
        module = icnn_zoo.IrregularConv2d(*layer.channels, 3, padding=1).to(self.device)
        input = layer.tensors(self.device)[0].requires_grad_()
        leaves = [input, *module.parameters()]
        expected = torch.autograd.grad(module(input).square().sum(), leaves)
        compiled = torch.compile(module, mode="reduce-overhead")
        for _ in range(4):
            results = torch.autograd.grad(compiled(input).square().sum(), leaves)
        for result, same in zip(results, expected, strict=True):
            torch.testing.assert_close(result, same, rtol=1e-3, atol=1e-3 * same.abs().max().item())


def check(
    form: str | None, rehearsal: bool, known: frozenset[str], deadline: float
) -> tuple[list[dict[str, object]], list[str]]:
    """Runs the checks of a form, or with None those of all else; returns results, and the names of those left out."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message=".*without its kernels in CUDA")  # then Triton's would be checked
    device, forms = ("cpu", REHEARSED_FORMS) if rehearsal else ("cuda", FORMS)
    dtypes = [torch.float32, torch.float16] if rehearsal else list(LIMITS)
    with rehearsing.backend(rehearsal) as backend, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        if form is not None:
            layer = forms[form]
            checks = Checks("staged" if layer.staged else backend, device, known, deadline)
            for dtype, layout in itertools.product(dtypes, LAYOUTS[: 1 if rehearsal else 2]):
                name = f"{form}, {str(dtype)[6:]}, {str(layout)[6:]}"
                checks.attempt(name, lambda dtype=dtype, layout=layout: checks.equals_formula(layer, dtype, layout))
            return checks.results, checks.skipped
        layer = next(iter(forms.values()))
        small = replace(layer, size=(13, 17))
        results: list[dict[str, object]] = []
        skipped: list[str] = []
        for name in (backend,) if rehearsal else (backend, "staged"):
            checks = Checks(name, device, known, deadline)
            _check_others(checks, layer, small, rehearsal)
            results += checks.results
            skipped += checks.skipped
        return results, skipped


def _check_others(checks: Checks, layer: Layer, small: Layer, rehearsal: bool) -> None:
    """Runs what is checked of one form alone."""
    others = [
        (checks.positions_that_are_no_numbers, layer),
        (checks.strided_input, layer),
        (checks.deterministic_mode, layer),
        (checks.autocast, layer),
    ]
    if not rehearsal:
        others += [
            (checks.exported, small),
            (checks.second_derivatives, small),
            (checks.other_stream, small),
            (checks.compiled_with_graphs, small),
        ]
    suffix = ", staged" if checks.backend == "staged" else ""
    for one, of in others:
        checks.attempt(one.__name__ + suffix, lambda one=one, of=of: one(of))


def main(folder: Path, seconds: float, *, rehearsal: bool = False) -> int:
    """Runs the checks, writes gate.json and returns 0 if all passed, 1 if not, 3 if time was too short for some."""
    begin, path = time.monotonic(), folder / "gate.json"
    results: list[dict[str, object]] = json.loads(path.read_text()) if path.is_file() else []
    known = frozenset(str(result["check"]) for result in results)
    jobs = [(form, rehearsal, known, begin + seconds) for form in (*(REHEARSED_FORMS if rehearsal else FORMS), None)]
    skipped: list[str] = []
    with contextlib.ExitStack() as stack:
        found = (check(*job) for job in jobs)
        if not rehearsal:
            workers = min(len(jobs), os.cpu_count() or 1)
            pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            stack.enter_context(pool)
            futures = [pool.submit(check, *job) for job in jobs]
            found = (future.result() for future in concurrent.futures.as_completed(futures))
        for more, left_out in found:
            results += more
            skipped += left_out
            path.write_text(json.dumps(results, indent=1) + "\n")
    failed = sum(not result["passed"] for result in results)
    print(f"{failed} of {len(results)} checks failed, {time.monotonic() - begin:.0f} s")
    if rehearsal and failed:
        raise RuntimeError(f"{failed} checks failed, see {folder / 'gate.log'}")
    return 3 if skipped else int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
