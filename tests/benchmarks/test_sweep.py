"""The sweep over position_lr, tiny."""

import json

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_sweep_tries_rates_and_writes_their_scores(tmp_path, capsys):
    pytest.importorskip("optuna")
    from sweep_position_lr import main

    sizes = ["--image-size", "25", "--num-val", "2", "--accelerator", "cpu"]
    main(["--trials", "2", "--steps", "2", *sizes, "--json", str(tmp_path / "sweep.json")])
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert len({trial["position_lr"] for trial in found["trials"]}) == 2
    assert all(0.005 <= trial["position_lr"] <= 1 and 0 <= trial["val/mIoU"] <= 1 for trial in found["trials"])
    assert len(capsys.readouterr().out.splitlines()) == 2
