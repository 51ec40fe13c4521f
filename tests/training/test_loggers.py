"""Weights & Biases: online with a key, offline without, and never a prompt."""

import subprocess
import sys

import pytest

from icnn_zoo.training.loggers import has_key


@pytest.fixture(autouse=True)
def _nobody_home(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_key_is_found_in_the_environment_and_in_netrc(monkeypatch, tmp_path):
    assert not has_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret")
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_key()


def test_without_a_key_a_run_is_logged_offline_without_a_prompt(tmp_path):
    code = (
        "from icnn_zoo.training.loggers import WandbLogger\n"
        "logger = WandbLogger(save_dir='logs')\n"
        "logger.log_metrics({'loss': 1.0}, step=1)\n"
        "logger.experiment.finish()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert list((tmp_path / "logs" / "wandb").glob("offline-run-*"))
