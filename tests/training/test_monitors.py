"""What a run says of its displacements."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import icnn_zoo
from icnn_zoo.training.callbacks import DisplacementMonitor


def test_a_layer_whose_taps_die_is_warned_of_by_name_and_once():
    model = icnn_zoo.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "0")
    monitor, logged = DisplacementMonitor(), []
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append(values))
    trainer = SimpleNamespace(global_step=4, log_every_n_steps=2, loggers=[logger], is_global_zero=True)

    def step():
        model(torch.zeros(1, 3, 9, 11))
        monitor.on_train_batch_end(trainer, model)

    monitor.on_train_start(trainer, model)
    step()
    for name, count in (("1", 2), ("0", 1)):
        with torch.no_grad():
            model.get_submodule(name).displacement[0, :count] = 30.0
        with pytest.warns(UserWarning, match=f"^{count} of .. taps of '{name}' read nothing but.*`limit`") as found:
            step()
        assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    assert [values["displacement/dead"] for values in logged] == pytest.approx([0, 2 / 36, 2 / 36, 2 / 36])
    monitor.on_train_end(trainer, model)
