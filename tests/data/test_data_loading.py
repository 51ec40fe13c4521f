"""Who sees which image when: shares of processes and accumulation, determinism, resumption, checks of samples."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from icnn_zoo.data import SegmentationDataModule, color_map
from icnn_zoo.data.samplers import EvalSampler, TrainSampler
from icnn_zoo.data.samples import check_dataset, check_sample, collate


class Numbered(SegmentationDataModule):
    """Images that are all of the value of their index."""

    def __init__(self, length: int = 22, size: int = 8, **kwargs) -> None:
        super().__init__(crop_size=size, **{"num_workers": 0, **kwargs})
        self.length = length
        self.size = size

    @property
    def classes(self):
        return ("background", "thing", "other")

    def make_dataset(self, split):
        size = self.size

        class Samples:
            def __len__(_) -> int:
                return self.length

            def __getitem__(_, index: int, /):
                image = np.full((size + index % 2, size, 3), index, np.uint8)
                return {"image": image, "mask": np.ones(image.shape[:2], np.uint8), "name": str(index)}

        return Samples()


def epoch_of(loader) -> list[tuple[str, ...]]:
    return [tuple(batch["name"]) for batch in loader]


def sums(loader) -> list[int]:
    return [int(batch["image"].long().sum()) for batch in loader]


def test_properties_are_known_right_after_construction():
    data = Numbered()
    assert (data.num_classes, data.ignore_index) == (3, 255)
    assert np.array_equal(data.palette, color_map(3))


def test_a_batch_has_its_documented_contents():
    batch = next(iter(Numbered(batch_size=4).train_dataloader()))
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["image"].dtype == torch.uint8
    assert batch["mask"].shape == (4, 8, 8)
    assert batch["mask"].dtype == torch.int64
    assert isinstance(batch["name"], list)
    assert batch["padding"].tolist() == [False] * 4


@pytest.mark.parametrize(("world_size", "shares"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_a_total_batch_is_the_same_however_it_is_divided(world_size, shares):
    whole = [index for _, index in TrainSampler(30, batch_size=8, seed=5)]
    parts = [
        np.array(list(TrainSampler(30, batch_size=8, shares=shares, rank=rank, world_size=world_size, seed=5)))[:, 1]
        for rank in range(world_size)
    ]
    assert len(whole) == 24
    for step in range(3):
        local = 8 // world_size
        divided = np.concatenate([part[step * local : (step + 1) * local] for part in parts])
        assert sorted(divided) == sorted(whole[step * 8 : (step + 1) * 8])


def test_every_epoch_has_another_order_and_a_seed_decides_it():
    loader, again = Numbered(batch_size=4).train_dataloader(), Numbered(batch_size=4).train_dataloader()
    epochs = [epoch_of(loader) for _ in range(3)]
    assert epochs == [epoch_of(again) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epoch_of(Numbered(batch_size=4, seed=1).train_dataloader()) != epochs[0]
    assert len(epochs[0]) == len(loader) == 5


def test_workers_change_nothing():
    single = Numbered(batch_size=4, size=16).train_dataloader()
    several = Numbered(batch_size=4, size=16, num_workers=2).train_dataloader()
    for _ in range(2):
        assert sums(single) == sums(several)


def test_loading_draws_nothing_from_the_global_generator():
    data = Numbered(batch_size=4, num_workers=1)
    state = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 7, 10])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loader_continues_with_exactly_the_next_batch(stop, world_size):
    def loader(workers=0):
        made = Numbered(batch_size=4, num_workers=workers).train_dataloader()
        made.sampler.num_replicas, made.sampler.rank = world_size, world_size - 1
        made.sampler.local_batch_size = 4 // world_size
        made.batch_sampler.batch_size = 4 // world_size
        return made

    def batches(of, number):
        done = []
        while len(done) < number:
            for batch in of:
                done.append(tuple(batch["name"]))
                if len(done) == number:
                    return done
        return done

    expected = batches(loader(), 13)
    first = loader()
    assert batches(first, stop) == expected[:stop]
    for workers in (0, 2):
        resumed = loader(workers)
        resumed.load_state_dict(first.state_dict())
        assert batches(resumed, 13 - stop) == expected[stop:]


def test_resuming_with_other_data_is_refused():
    state = Numbered(batch_size=4).train_dataloader().state_dict()
    for other in (Numbered(batch_size=4, seed=3), Numbered(length=23, batch_size=4), Numbered(batch_size=2)):
        with pytest.raises(ValueError, match="to resume, the data's"):
            other.train_dataloader().load_state_dict(state)


@pytest.mark.parametrize(("length", "world_size"), [(5, 1), (5, 2), (6, 4), (1, 3)])
def test_evaluation_scores_every_image_once_and_gives_processes_equal_shares(length, world_size):
    shares = [list(EvalSampler(length, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(index for share in shares for index, padding in share if not padding) == list(range(length))


def test_padding_has_no_labels():
    data = Numbered(length=3)
    loader = data.val_dataloader()
    assert loader.dataset[1, True]["padding"]
    assert (loader.dataset[1, True]["mask"] == 255).all()
    assert (loader.dataset[1, False]["mask"] == 1).all()


def test_evaluation_keeps_native_sizes_and_order():
    batches = list(Numbered(length=3).test_dataloader())
    assert [tuple(batch["image"].shape) for batch in batches] == [(1, 3, 8, 8), (1, 3, 9, 8), (1, 3, 8, 8)]
    assert [batch["name"] for batch in batches] == [["0"], ["1"], ["2"]]


def test_evaluation_can_pad_at_the_right_and_the_bottom_and_says_the_size():
    batch = next(iter(Numbered(length=2, eval_batch_size=2, eval_size=(17, 9), fill=(1, 2, 3)).val_dataloader()))
    assert batch["image"].shape == (2, 3, 17, 9)
    assert batch["size"].tolist() == [[8, 8], [9, 8]]
    for image, mask, (height, width) in zip(batch["image"], batch["mask"], batch["size"].tolist(), strict=True):
        assert (mask[:height, :width] == 1).all()
        assert int((mask == 255).sum()) == 17 * 9 - height * width
        assert image[:, -1].unique(dim=1).squeeze(1).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"1: an image of 9 x 8 does not fit into `eval_size` = 8 x 9"):
        list(Numbered(length=2, eval_size=(8, 9)).val_dataloader())


def test_padding_has_the_mean_that_the_network_subtracts():
    data = Numbered(size=8)
    assert data.transform.fill == (124, 116, 104)
    network = SimpleNamespace(mean=torch.tensor([0.5, 0.25, 1.0])[:, None, None])
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(model=network), overfit_batches=0, callbacks=[], accumulate_grad_batches=1
    )
    data.setup("fit")
    assert data.transform.fill == (128, 64, 255)
    data.fill = (1, 2, 3)
    data.setup("fit")
    assert data.transform.fill == (1, 2, 3)


def test_images_of_different_sizes_in_one_batch_are_refused():
    with pytest.raises(ValueError, match="set eval_batch_size to 1"):
        list(Numbered(length=4, eval_batch_size=2).val_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size` must be at least 1"),
        ({"num_workers": -1}, "`num_workers` must be at least 0"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"batch_size": 23}, "`batch_size` must not exceed the number of training images, 22; got 23"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Numbered(**arguments).train_dataloader()


def test_a_total_batch_that_cannot_be_divided_names_the_nearest():
    with pytest.raises(ValueError, match=r"devices x accumulation = 3 x 2; got 16, the nearest is 18"):
        TrainSampler(100, batch_size=16, shares=2, world_size=3)


def sample(values, dtype=np.uint8):
    mask = np.zeros((4, 4), dtype)
    mask.flat[: len(values)] = values
    return {"image": np.zeros((4, 4, 3), np.uint8), "mask": mask, "name": "a.png"}


def test_masks_may_hold_classes_and_the_ignore_index():
    assert check_sample(sample([0, 1, 2, 255]), 3, 255)["name"] == "a.png"


def test_masks_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"a.png: mask values must be below num_classes = 3 .* got \[3, 7\]"):
        check_sample(sample([0, 3, 7, 255]), 3, 255)


def test_masks_of_0_and_255_are_refused_before_training():
    masks = [sample([0]), sample([0, 255])]
    with pytest.raises(ValueError, match="must be stored with 1 instead"):
        check_dataset(masks, 2, 255)
    check_dataset([*masks, sample([1])], 2, 255)
    check_dataset(masks[:1], 2, 255)


def test_samples_of_another_type_or_shape_are_refused():
    with pytest.raises(TypeError, match="must be uint8"):
        check_sample(sample([0], np.int64), 3, 255)
    with pytest.raises(ValueError, match=r"expected image \[H, W, C\] and mask \[H, W\]"):
        check_sample({**sample([0]), "mask": np.zeros((4, 5), np.uint8)}, 3, 255)


def test_collate_gives_rgb_planes():
    one = {**sample([1]), "padding": False}
    one["image"][..., 2] = 9
    batch = collate([one])
    assert batch["image"][0, :, 0, 0].tolist() == [0, 0, 9]
