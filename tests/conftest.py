"""Shared helpers of the tests. What those of single rooms need is imported where it is used."""

import os

# Before anything imports albumentations: it would ask the network for a newer version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["MPLBACKEND"] = "agg"

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed

from icnn_zoo.ops import register_backend, unregister_backend
from icnn_zoo.ops.native_backend import Limits as NativeLimits
from icnn_zoo.ops.native_backend import NativeBackend
from icnn_zoo.ops.torch_backend import Limits as TorchLimits
from icnn_zoo.ops.torch_backend import TorchBackend

torch.set_num_threads(1)  # tests are small: a second thread costs more than it gives


@pytest.fixture
def waken():
    import timm_check

    return timm_check.wake


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    """Lightning leaves the group of a ddp run in this process, and the next test would belong to it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


CPU_BACKENDS = {
    "dense kernels": TorchBackend(TorchLimits(cells_per_tap=10**9, kernel_elements=500)),
    "columns": TorchBackend(TorchLimits(cells_per_tap=0)),
    "columns in small blocks": TorchBackend(
        TorchLimits(cells_per_tap=0, block_elements=500, cached_elements=150, grad_elements=300, copied_elements=500)
    ),
    "native kernel": NativeBackend(),
    "native kernel in small blocks": NativeBackend(NativeLimits(depth=20, band=5, few=0, draw=False)),
}


@pytest.fixture(params=CPU_BACKENDS)
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend for each way to compute: tiny sizes would take the first wherever it exists."""
    name = str(request.param)
    backend = CPU_BACKENDS[name]
    if reason := backend.unavailable(torch.device("cpu")):
        pytest.skip(reason)
    register_backend(name, backend)
    yield name
    unregister_backend(name)


@pytest.fixture(scope="session")
def drawn_voc_root(tmp_path_factory) -> Path:
    """A prepared folder in small: two plain icons of each class and two backgrounds for every split."""
    import cv2
    import numpy as np

    from icnn_zoo.data import VOC_CLASSES
    from icnn_zoo.data.drawn_voc import FORMAT

    root = tmp_path_factory.mktemp("data")
    folder = root / "drawn-voc"
    manifest = {"format": FORMAT, "icons": {}, "backgrounds": {}}
    for place, split in enumerate(("train", "val", "test")):
        for index, name in enumerate(VOC_CLASSES[1:]):
            (folder / "icons" / split / name).mkdir(parents=True)
            for number in range(2):
                icon = np.zeros((40 + 20 * number, 50, 4), np.uint8)
                icon[4:-4, 4:-4] = (10 * index, 255 - 10 * index, 60 * place, 255)
                cv2.imwrite(str(folder / "icons" / split / name / f"{number}.png"), icon)
        (folder / "backgrounds" / split).mkdir(parents=True)
        for kind in ("photograph", "texture"):
            picture = np.full((90, 120, 3), 80 * place + 20, np.uint8)
            cv2.imwrite(str(folder / "backgrounds" / split / f"{kind}-0.png"), picture)
        manifest["icons"][split] = dict.fromkeys(VOC_CLASSES[1:], 2)
        manifest["backgrounds"][split] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture(scope="session")
def documents_root(tmp_path_factory) -> Path:
    """A prepared folder of small documents, six packages of two."""
    pytest.importorskip("pypdfium2")
    from pdf_cases import write_library

    from icnn_zoo.data.preparation.documents import prepare_documents

    root = tmp_path_factory.mktemp("documents")
    prepare_documents(root, pdfs=write_library(root / "pdfs"))
    return root


@pytest.fixture(scope="session")
def zoo_run(tmp_path_factory) -> Path:
    """The folder of a real run of two steps, with a network of 0.4 MB."""
    from icnn_zoo.cli.programs import lightning_main

    folder = tmp_path_factory.mktemp("run")
    options = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    options += ["--data.init_args.num_workers", "0", "--data.init_args.num_val", "4", "--pictures.num_samples", "0"]
    options += ["--data.init_args.eval_batch_size", "4", "--data.init_args.batch_size", "4"]
    options += ["--trainer.logger.init_args.save_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning_main(["fit", "-c", str(Path(__file__).parent / "shapes.yaml"), *options])
    return folder / "shapes" / "version_0"


@pytest.fixture(scope="session")
def zoo_folder(zoo_run, tmp_path_factory) -> Path:
    """A registry with one checkpoint. Tests that change it copy it first."""
    from zoo_cases import ABOUT, NAME

    from icnn_zoo.publishing.publisher import publish

    folder = tmp_path_factory.mktemp("zoo")
    publish(zoo_run, NAME, folder, ABOUT)
    return folder


@pytest.fixture
def zoo_server():
    """A web server on the loopback whose manners a test decides, see zoo_cases.Server."""
    from zoo_cases import Server

    with Server() as server:
        yield server
