"""Irregular layers under FSDP2, in two processes on the CPU."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from icnn_zoo import bound_positions, convert, move_positions, parameter_groups, whole_displacements

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

RATES = {"lr": 1e-3, "position_lr": 3.0, "head": None}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)), "", epsilon=0.4)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, rule, batch: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, **RATES))
    rule(optimizer, model)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).float().square().mean().backward()
        optimizer.step()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


CASES = {
    "sharded": (False, None, bound_positions),
    "sharded, by the rule": (False, None, move_positions),
    "whole": (True, None, bound_positions),
    "sharded in half": (False, torch.bfloat16, bound_positions),
    "whole beside half": (True, torch.bfloat16, bound_positions),
}


def in_a_process(rank: int, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2,))
    for name, (ignored, dtype, rule) in CASES.items():
        model = network()
        options = {"ignored_params": whole_displacements(model)} if ignored else {}
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype), **options)
        try:
            train(model, rule, images()[2 * rank : 2 * rank + 2])
            results[name, rank] = [whole(layer.displacement).detach() for layer in (model[0], model[2])]
        except TypeError as error:
            results[name, rank] = str(error)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        found = manager.dict()
        mp.spawn(in_a_process, (port, found), nprocs=2)
        return dict(found)


@pytest.mark.parametrize("name", ["sharded", "sharded, by the rule", "whole"])
def test_two_processes_move_positions_as_one_does(name, results):
    alone = network()
    train(alone, CASES[name][2], images())
    assert (alone[0].displacement - 0.4).abs().max() > 0.5
    for rank in range(2):
        for layer, displacement in zip((alone[0], alone[2]), results[name, rank], strict=True):
            torch.testing.assert_close(displacement, layer.displacement.detach(), atol=1e-4, rtol=1e-4)


def test_mixed_precision_is_refused_in_words_unless_displacements_stay_whole(results):
    for rank in range(2):
        assert "`displacement` must be float32" in results["sharded in half", rank]
        assert "icnn_zoo.whole_displacements" in results["sharded in half", rank]
    for one, other in zip(results["whole beside half", 0], results["whole beside half", 1], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
