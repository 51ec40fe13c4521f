"""Spreads that narrow over a run."""

import lightning.pytorch as pl
import pytest
import torch

import icnn_zoo
from icnn_zoo.training.callbacks import NarrowSpreads


@pytest.mark.filterwarnings("ignore")
def test_spreads_narrow_over_a_run_to_the_share_that_is_asked_for():
    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = icnn_zoo.IrregularConv2d(4, 6, 3, interpolation="gaussian", spread=1.2)

        def training_step(self, batch, index):
            return self.layer(batch[0]).sum() * 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    task = Task()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(3, 4, 5, 5)))
    callback = NarrowSpreads(share=0.1)
    pl.Trainer(max_steps=3, callbacks=[callback], enable_model_summary=False, **quiet).fit(task, data)
    torch.testing.assert_close(task.layer.spread, torch.full_like(task.layer.spread, 0.2 + 1.0 * 0.1))
    with pytest.raises(ValueError, match="`model` must have layers with triangle or gaussian"):
        icnn_zoo.narrow_spreads(icnn_zoo.IrregularConv2d(4, 6, 3), 0.5)
