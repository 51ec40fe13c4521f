"""``icnn-zoo doctor``: what this machine can run, to paste into a report of a fault."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from icnn_zoo.cli.options import Command

_PACKAGES = ("torch", "torchvision", "timm", "lightning", "triton", "onnxruntime")
_ABILITIES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
_SPINNING = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def _no_options(parser: argparse.ArgumentParser) -> None:
    pass


def _doctor(options: argparse.Namespace) -> None:
    """Shows which backends can run here, why others cannot, and the versions and settings that matter."""
    from rich.table import Table
    from rich.text import Text

    from icnn_zoo.io.console import print_table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in examine():
        table.add_row(Text(name), Text(value))
    print_table(table)


def examine() -> Iterator[tuple[str, str]]:
    """What there is to know about this machine, by name."""
    import importlib.metadata
    import os
    import platform

    import torch

    import icnn_zoo

    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    yield "icnn_zoo", f"{icnn_zoo.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield "packages", ", ".join(versions)
    yield from _processor()
    settings = [f"{name}={os.environ[name]}" for name in _SPINNING if name in os.environ]
    yield "threads", ", ".join([f"{torch.get_num_threads()} of {os.cpu_count()} processors", *settings])
    yield "GPU", _gpus()
    yield from _backends()
    yield "native kernel", _kernel()


def _processor() -> Iterator[tuple[str, str]]:
    import platform

    from icnn_zoo.ops.native_backend import wheel

    names = [line.partition(":")[2].strip() for line in wheel.processor_lines() if line.startswith("model name")]
    flags = wheel.processor_flags()
    abilities = [name for name in _ABILITIES if name in flags]
    yield "processor", ", ".join([*(names or [platform.processor()]), platform.machine(), *abilities])


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that PyTorch can use"
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = (f"{card.name} ({card.total_memory >> 30} GiB, capability {card.major}.{card.minor})" for card in cards)
    return ", ".join([*names, f"CUDA {torch.version.cuda}"])


def _backends() -> Iterator[tuple[str, str]]:
    import warnings

    import torch

    from icnn_zoo.ops import backends

    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is shown instead
        for name in backends.names():
            reasons = [(device, backends.why_unavailable(name, device, torch.float32)) for device in devices]
            runs = [device.type for device, reason in reasons if reason is None]
            no = [f"not on {device.type}: {reason}" for device, reason in reasons if reason is not None]
            yield f"backend {name}", "; ".join([*(["runs on " + ", ".join(runs)] if runs else []), *no])
        chosen = ", ".join(f"{name} on {device.type}" for device in devices for name in [_automatic(device)])
    yield "backend auto", f"takes {chosen}"


def _automatic(device: object) -> str:
    import torch

    from icnn_zoo.ops import backends

    return backends.choose_backend("auto", torch.device(str(device)), torch.float32)


def _kernel() -> str:
    from icnn_zoo.ops import kernel_cache
    from icnn_zoo.ops.native_backend import build, wheel

    kind = wheel.find_kind()
    if kind is not None:
        return f"the wheel's, for {kind}"
    if build.load()[1] is not None:
        return "none"
    try:
        folder = kernel_cache.private_folder("native")
    except OSError as error:
        return f"compiled for this process only: {error}"
    return f"compiled, kept in {folder} ({len(list(folder.glob('native-*.so')))} files)"


COMMANDS = {"doctor": Command(_doctor, _no_options)}
