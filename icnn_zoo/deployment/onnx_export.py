"""Writing a network as ONNX: deployed, exported with dynamic sizes, checked against onnxruntime, timed."""

from __future__ import annotations

import copy
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from icnn_zoo.deployment.rewriting import Deployment, rewrite
from icnn_zoo.deployment.standard_forms import standard_form
from icnn_zoo.deployment.tensor_call import TensorCall, relative_difference
from icnn_zoo.io.files import replacing
from icnn_zoo.io.tables import text_table
from icnn_zoo.nn.conv_rules import dynamic_same_padding, find_rules
from icnn_zoo.nn.irregular_conv import IrregularConv2d, irregular_layers
from icnn_zoo.nn.modules import ExampleInput, replace_modules

# Largest allowed difference between onnxruntime and the network, over the network's largest output.
TOLERANCE = 1e-4

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class ExportReport:
    """A written file: how the layers were rewritten, how far its outputs are off, and how fast it runs."""

    path: Path
    deployment: Deployment
    shapes: tuple[tuple[int, ...], ...]
    """Input shapes that were compared; the first one was timed."""
    difference: float
    """Largest difference between onnxruntime and the irregular network, over the network's largest output."""
    milliseconds: dict[str, float]
    """Median time of the irregular network and of its standard form in PyTorch, and of the file in onnxruntime."""

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        times = text_table([(f"  {name}", f"{value:.1f} ms") for name, value in self.milliseconds.items()], right=[1])
        return "\n".join(
            [
                str(self.deployment),
                "",
                f"Largest difference to the network, relative: {self.difference:.1e} (inputs {shapes})",
                f"Median times at {'x'.join(map(str, self.shapes[0]))}, {torch.get_num_threads()} threads:",
                times,
                f"Written: {self.path}",
            ]
        )


def export_onnx(
    model: nn.Module,
    path: str | Path,
    input_size: Sequence[int] | None = None,
    *,
    example_input: ExampleInput | None = None,
    overwrite: bool = False,
    rounds: int = 7,
) -> ExportReport:
    """Writes a network with irregular layers as ONNX, with dynamic batch, height and width.

    The network is deployed (:func:`icnn_zoo.deploy`), exported, checked, and run in onnxruntime at several sizes and
    batches against the irregular network. The file appears under its name only when all of that went well. Outputs in
    mappings, dataclasses and sequences, nested too, become outputs of their names ("out", "aux", "output_0").

    Args:
        model: A float32 network. It is not changed.
        path: The file to write.
        input_size: For a network that takes one batch of images: (channels, height, width) of the image to trace,
            compare and time with. Others than this size are compared too, as far as the network itself takes them.
        example_input: For any other network: its input, a tuple of positional or a mapping of keyword arguments. The
            batch of all tensors in it, and height and width of those with four dimensions, become dynamic; what is not
            a tensor is fixed. The example and its batch doubled are compared.
        overwrite: Whether a file of that name may be replaced.
        rounds: How often to run for the median times, all in turn.

    Returns:
        What was written; ``print`` shows it.

    Raises:
        ValueError: The file exists; the size, the example or a dtype does not fit; an output is not a tensor.
        FileNotFoundError: The file's folder does not exist.
        ImportError: The extra ``export`` is not installed.
        RuntimeError: The network cannot be exported, or the file computes something else.

    Example:
        >>> import tempfile, torch, icnn_zoo
        >>> from icnn_zoo.deployment.onnx_export import export_onnx
        >>> model = icnn_zoo.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), start="", epsilon=0.3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_onnx(model, f"{folder}/model.onnx", (3, 33, 48))
        >>> report.difference < 1e-4
        True
    """
    path = Path(path)
    _check_arguments(model, path, input_size, example_input, overwrite)
    _require("onnx", "onnxscript", "onnxruntime")
    model = copy.deepcopy(model).cpu().eval()
    # A regular network is exported as it is, so that both can be compared where they are deployed.
    deployment = rewrite(model) if irregular_layers(model) else Deployment(model.requires_grad_(False), ())
    calls = [
        TensorCall(network, torch.zeros(2, *input_size) if input_size is not None else example_input)  # type: ignore[arg-type]
        for network in (model, deployment.model, _trace_friendly(deployment.model))
    ]
    inputs = _image_batches(input_size) if input_size is not None else _batches(calls[0])
    with replacing(path) as temporary:
        traced = inputs[1] if input_size is None else {"images": torch.zeros(2, *input_size)}
        _export(calls[2], temporary, traced)  # of a batch of one, PyTorch would make a constant
        session = _open(temporary)
        shapes, difference = _compare(calls[0], session, inputs)
        times = _measure(calls[0], calls[1], session, inputs[0], rounds)
        del session
    return ExportReport(path, deployment, shapes, difference, times)


def _image_batches(input_size: Sequence[int]) -> list[Inputs]:
    channels, height, width = input_size
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, height, width), (2, height + 1, width + 3), (3, height + 32, width + 64))
    return [{"images": torch.rand(batch, channels, rows, cols, generator=generator)} for batch, rows, cols in sizes]


def _batches(example: TensorCall) -> list[Inputs]:
    inputs = {name: tensor.detach().cpu() for name, tensor in example.inputs.items()}
    return [inputs, {name: torch.cat([tensor] * 2) if tensor.dim() else tensor for name, tensor in inputs.items()}]


def _check_arguments(
    model: nn.Module,
    path: Path,
    input_size: Sequence[int] | None,
    example_input: ExampleInput | None,
    overwrite: bool,
) -> None:
    if (input_size is None) == (example_input is None):
        raise ValueError("Give `input_size` for a network that takes images, or else an `example_input`; one of both.")
    sizes = [size for size in input_size or (1, 2, 2) if hasattr(size, "__index__") and size >= 1]
    if len(sizes) != 3 or min(sizes[1:]) < 2:
        raise ValueError(f"`input_size` must be (channels, height, width), at least 2 px each; got {input_size!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path`: there is no folder {str(path.parent)!r}; make it first.")
    if path.is_dir():
        raise ValueError(f"`path` must be a file; {str(path)!r} is a folder. Choose {str(path / 'model.onnx')!r}.")
    if path.exists() and not overwrite:
        raise ValueError(f"`path`: {str(path)!r} exists. Choose another name, or overwrite=True (--force).")
    dtypes = {str(parameter.dtype) for parameter in model.parameters() if parameter.is_floating_point()}
    if dtypes - {"torch.float32"}:
        raise ValueError(f"`model` must be float32; got {', '.join(sorted(dtypes))}. Convert it: model.float().")


def _require(*names: str) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f'Exporting needs {name}: pip install "icnn-zoo[export]".') from error


def _trace_friendly(model: nn.Module) -> nn.Module:
    """A copy whose regular layers that pad by input size are rewritten: in timm's words an export takes minutes."""
    model = copy.deepcopy(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or module.dilation != (1, 1):
            continue
        rules = find_rules(module)
        if rules is not None and rules.padding is dynamic_same_padding:
            # A regular layer is an irregular one with epsilon 0: its dense form is the same convolution.
            layer = IrregularConv2d.from_conv2d(module, epsilon=0.0)
            replacements[module] = standard_form(layer, layer.weight_rule(layer), layer.bias).module.eval()
    return replace_modules(model, replacements)


def _export(model: TensorCall, path: Path, inputs: Inputs) -> None:
    images = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    dynamic = tuple(
        images if tensor.dim() == 4 else dict.fromkeys(range(min(tensor.dim(), 1)), torch.export.Dim.DYNAMIC)
        for tensor in inputs.values()
    )
    with torch.no_grad():
        outputs = list(model.named(*inputs.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own insides
        try:
            torch.onnx.export(
                model,
                tuple(inputs.values()),
                str(path),
                dynamo=True,
                dynamic_shapes=(dynamic,),
                input_names=list(inputs),
                output_names=outputs,
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RuntimeError(
                f"PyTorch cannot export {type(model.model).__name__} with dynamic batch, height and width: {reason[0]}"
            ) from error


def _open(path: Path) -> Any:
    onnx, onnxruntime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _compare(model: TensorCall, session: Any, batches: Sequence[Inputs]) -> tuple[tuple[tuple[int, ...], ...], float]:
    compared: list[tuple[int, ...]] = []
    worst = 0.0
    for inputs in batches:
        shape = tuple(next(iter(inputs.values())).shape)
        try:
            with torch.no_grad():
                expected = model.named(*inputs.values())
        except (RuntimeError, ValueError, AssertionError):
            if not compared:
                raise
            continue  # many networks take multiples of 32 only
        for (name, truth), found in zip(expected.items(), _run(session, inputs), strict=True):
            try:
                difference = relative_difference(truth, torch.from_numpy(found))
            except RuntimeError as error:
                raise RuntimeError(f"onnxruntime gives {name!r} in {error}, the network's.") from None
            worst = max(worst, difference)
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"onnxruntime differs from the network by {difference:.1e} of the largest number of {name!r} at "
                    f"input shape {shape}; {TOLERANCE:.0e} is allowed. No file was written."
                )
        compared.append(shape)
    return tuple(compared), worst


def _run(session: Any, inputs: Inputs) -> list[np.ndarray]:
    wanted = [item.name for item in session.get_inputs()]  # without those that the network does not use
    return session.run(None, {name: inputs[name].numpy() for name in wanted})


def _measure(model: TensorCall, deployed: TensorCall, session: Any, inputs: Inputs, rounds: int) -> dict[str, float]:
    runs: dict[str, Callable[[], Any]] = {
        "PyTorch, irregular": lambda: model(*inputs.values()),
        "PyTorch, deployed": lambda: deployed(*inputs.values()),
        "onnxruntime": lambda: _run(session, inputs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, call in runs.items():
            start = time.perf_counter()
            with torch.no_grad():
                call()
            if number > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
