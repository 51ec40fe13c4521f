"""Random calls of every backend, odd ones included, against the reference and conv2d."""

import random

import fuzzing
import pytest
import torch

import icnn_zoo


@pytest.mark.parametrize("first", [pytest.param(first, marks=pytest.mark.slow) for first in range(0, 2000, 100)])
def test_every_backend_gives_the_references_numbers_or_its_error(first: int, capsys: pytest.CaptureFixture) -> None:
    fuzzing.main(100, first)
    assert "100 calls agree" in capsys.readouterr().out


def test_a_few_random_calls_agree(capsys: pytest.CaptureFixture) -> None:
    fuzzing.main(40)
    assert "40 calls agree" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [127, 179, 1046])
def test_calls_that_once_differed_agree(seed: int) -> None:
    assert fuzzing.check(fuzzing.make_call(random.Random(seed))) == "irregular"


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    convolve = icnn_zoo.irregular_conv2d

    def wrong(*args: torch.Tensor, backend: str, **options: object) -> torch.Tensor:
        output = convolve(*args, backend=backend, **options)
        return output if backend == "reference" else output * 1.001

    monkeypatch.setattr(icnn_zoo, "irregular_conv2d", wrong)
    with pytest.raises(AssertionError):
        fuzzing.main(40)
