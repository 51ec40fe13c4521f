"""The weights that training begins with: loaded once, before anything else begins, and never over others."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from task_cases import make_data, make_task, make_trainer

from icnn_zoo import irregular_layers
from icnn_zoo.training.task import SegmentationTask

# Lightning's own warnings on CPU runs, workers and short epochs say nothing about the package.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_checkpoint_loads_without_the_pretrained_weights_it_began_with(tmp_path):
    task = make_task()
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(task, make_data())
    task.hparams["pretrained"] = "gone.safetensors"
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = SegmentationTask.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert loaded.pretrained == "gone.safetensors"
    image = torch.randint(0, 255, (1, 3, 33, 33), dtype=torch.uint8)
    assert torch.equal(loaded.eval()(image), task.eval()(image))
    assert list(irregular_layers(loaded)) == list(irregular_layers(task))


def test_pretrained_weights_are_needed_to_begin_training_and_only_then(tmp_path):
    gone = str(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="pretrained"):
        make_trainer(tmp_path).fit(make_task(pretrained=gone), make_data())
    saving = ModelCheckpoint(tmp_path / "all", "{step}", save_top_k=-1, every_n_train_steps=1)
    make_trainer(tmp_path, saving, max_steps=2).fit(make_task(), make_data())
    make_trainer(tmp_path).validate(make_task(pretrained=gone), make_data())
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(make_task(pretrained=gone), make_data(), ckpt_path=tmp_path / "all" / "step=1.ckpt")
    assert trainer.global_step == 2


def test_a_task_that_has_weights_keeps_them_when_it_is_trained(tmp_path):
    torch.save(make_task(start=None).model.state_dict(), tmp_path / "start.pth")
    options = {"pretrained": str(tmp_path / "start.pth"), "lr": 0.0, "position_lr": 0.0, "freeze_norm": True}
    task = make_task(**options)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(std=0.1)
    task.load_state_dict(task.state_dict())
    held = {name: tensor.clone() for name, tensor in task.model.named_parameters()}
    make_trainer(tmp_path, max_steps=1).fit(task, make_data())
    assert all(torch.equal(tensor, held[name]) for name, tensor in task.model.named_parameters())


def test_callbacks_begin_with_the_weights_that_training_begins_with(tmp_path):
    start = make_task()
    with torch.no_grad():
        for layer in irregular_layers(start).values():
            layer.displacement.fill_(0.3)
    torch.save(start.model.state_dict(), tmp_path / "start.pth")

    class First(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.found = [layer.displacement.detach().unique() for layer in irregular_layers(pl_module).values()]

    first = First()
    task = make_task(pretrained=str(tmp_path / "start.pth"))
    make_trainer(tmp_path, first, max_steps=1).fit(task, make_data())
    assert all(torch.equal(values, torch.tensor([0.3])) for values in first.found)
