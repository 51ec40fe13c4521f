"""The benchmarks run, report, and show no speed when their correctness gates are red."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import icnn_zoo

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--quick", "--threads", "1"]


@contextlib.contextmanager
def imported(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    threads = torch.get_num_threads()
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        torch.set_num_threads(threads)
        del sys.modules[spec.name]


@pytest.fixture
def benchmark():
    with imported("irregular_conv2d") as module:
        yield module


@pytest.fixture
def deploy():
    with imported("deploy") as module:
        yield module


def test_prints_ratios_and_writes_json(benchmark, tmp_path, capsys):
    path = tmp_path / "result.json"
    shapes = ["stride2", "full"]
    assert benchmark.main([*TINY, "--json", str(path), "--shapes", *shapes]) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert [result["name"] for result in report["shapes"]] == shapes
    assert {"machine", "versions", "date", "seed", "settings", "gate"} <= report.keys()
    # seven comparisons a shape: four with deform_conv2d, and conv2d has no gradient of positions; the network's logits
    assert len(report["gate"]) == 7 * len(shapes) + 1
    assert all(len(times) == 2 for times in report["training_step"]["seconds_per_step"].values())
    assert "irregular from layer4" in printed
    for result in report["shapes"]:
        assert f"{result['name']}: " in printed
        records = {(record["peer"], record["mode"]): record for record in result["records"]}
        assert len(records) == 2 * len(benchmark.PEERS)
        for (peer, mode), record in records.items():
            assert peer in printed
            if peer == "DCLS" and record["reason"]:
                assert record["reason"] in printed
                continue
            assert record["reason"] is None, (peer, mode)
            assert len(record["times_ms"]) == len(record["ratios"]) == 2
            assert min(record["times_ms"]) > 0
        assert records["conv2d", "forward"]["ratios"] == [1.0, 1.0]


def test_markdown_and_reason_of_an_absent_peer(benchmark, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "DCLS.construct.modules", None)  # the import raises
    assert (
        benchmark.main([*TINY, "--markdown", "--no-backward", "--no-network", "--shapes", "convnext7", "classifier"])
        == 0
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1
    assert all("DCLS forward: ModuleNotFoundError" in row for row in rows[2:])


@pytest.mark.parametrize("wrong", ["output", "positions"])
def test_red_gate_exits_1_without_speed(benchmark, monkeypatch, capsys, tmp_path, wrong):
    right = icnn_zoo.irregular_conv2d

    def operator(input, weight, positions, *args, **kwargs):
        if wrong == "output":
            return right(input, weight, positions, *args, **kwargs) * 1.01
        return right(input, weight, positions + 0.01 * (positions - positions.detach()), *args, **kwargs)

    monkeypatch.setattr(icnn_zoo, "irregular_conv2d", operator)
    path = tmp_path / "result.json"
    assert benchmark.main([*TINY, "--json", str(path), "--shapes", "layer3"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG layer3: " in printed
    assert " ms" not in printed
    assert "ratio" not in printed
    assert not path.exists()
    if wrong == "positions":
        assert "position gradient" in printed
        assert "output" not in printed


@pytest.mark.parametrize("onnx", [True, False])
def test_deploy_prints_ratios_and_modelled_costs_and_writes_json(deploy, monkeypatch, tmp_path, capsys, onnx):
    if onnx and deploy.why_no_onnx() is not None:
        pytest.skip(deploy.why_no_onnx())
    if not onnx:
        monkeypatch.setattr(deploy, "NEEDED", ("no_such_package",))
    path = tmp_path / "result.json"
    names = ["stride2", "outliers"]
    assert deploy.main([*TINY, "--json", str(path), "--layers", *names]) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert {"machine", "versions", "date", "seed", "settings", "gate"} <= report.keys()
    assert onnx or "onnxruntime is not run: it needs no_such_package" in printed
    assert (report["onnxruntime_not_run"] is None) == onnx
    assert len(report["gate"]) == (3 if onnx else 1) * len(names)
    assert [result["name"] for result in report["layers"]] == names
    expected = [("PyTorch", "conv2d"), ("PyTorch", "icnn_zoo"), ("PyTorch", "deployed")]
    expected += [("onnxruntime", "conv2d"), ("onnxruntime", "deployed")] if onnx else []
    for result in report["layers"]:
        assert f"modeled cost {result['deployed']['cost']:.2f}" in printed
        assert [(record["runtime"], record["name"]) for record in result["records"]] == expected
        for record in result["records"]:
            assert len(record["times_ms"]) == len(record["ratios"]) == 2
            assert min(record["times_ms"]) > 0
            assert record["name"] != "conv2d" or record["ratios"] == [1.0, 1.0]


def test_deploy_with_a_red_gate_exits_1_without_speed(deploy, monkeypatch, tmp_path, capsys):
    right = deploy.rewrite

    def wrong(layer):
        deployment = right(layer)
        for parameter in deployment.model.parameters():
            parameter.data.mul_(1.01)
        return deployment

    monkeypatch.setattr(deploy, "rewrite", wrong)
    path = tmp_path / "result.json"
    assert deploy.main([*TINY, "--no-onnx", "--json", str(path), "--layers", "dense"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG dense: deployed in PyTorch" in printed
    assert " ms" not in printed
    assert "ratio" not in printed
    assert not path.exists()


def test_threads_counts_units_and_models_what_it_measures(tmp_path, capsys):
    path = tmp_path / "threads.json"
    with imported("threads") as threads:
        assert threads.makespan([1.0, 1.0, 1.0, 5.0], 2) == 6.0
        assert threads.makespan([2.0] * 8, 4) == 4.0
        assert threads.main(["--quick", "--layers", "layer3", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert {"machine", "versions", "date", "settings", "layers"} <= report.keys()
    assert [result["direction"] for result in report["layers"]] == ["forward", "backward"]
    for result in report["layers"]:
        assert f"{result['name']}, {result['direction']}, " in printed
        assert [row["threads"] for row in result["modeled"]] == [2, 4, 8, 16, 32, 64, 128]
        for row in result["modeled"]:
            assert row["imbalance"] > 0.99
            assert 0.99 < row["modeled_speed_up"] <= row["threads"]


@pytest.mark.parametrize("name", ["irregular_conv2d", "deploy"])
def test_command_needs_no_training_stack(name):
    script = str(FOLDER / f"{name}.py")
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(['albumentations', 'wandb', 'lightning']));"
        f"sys.argv = ['benchmark', '--help']; runpy.run_path({script!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--repeats" in done.stdout


def test_protocol_cost_measures_each_part_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "cost.json"
    script = FOLDER / "protocol_cost.py"
    command = [sys.executable, str(script), "--backbone", "test_resnet", "--start", "layer4", "--crop", "33"]
    command += ["--image", "49", "65", "--window", "33", "--rounds", "2", "--threads", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert {"machine", "versions", "settings", "results"} <= report.keys()
    assert list(report["results"]) == ["idle", "train", "evaluate"]
    for part in report["results"].values():
        assert len(part["seconds"]) == 2
        assert part["peak_mib"] > 50


@pytest.mark.slow
def test_networks_prints_one_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "networks.json"
    with imported("networks") as networks:
        assert networks.main(["--quick", "--repeats", "1", "--threads", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert {"machine", "versions", "date", "settings", "networks"} <= report.keys()
    records = report["networks"][0]["records"]
    kinds = {(record["runtime"], record["form"]) for record in records}
    assert {("training step", "irregular"), ("PyTorch", "deployed"), ("PyTorch", "irregular")} <= kinds
    assert all(f"| {runtime}, {form} | " in printed for runtime, form in kinds)
    assert all(min(record["seconds"]) > 0 and len(record["ratios"]) == 1 for record in records)


@pytest.mark.slow
def test_busy_measures_every_setting_idle_and_beside_programs(tmp_path, capsys):
    path = tmp_path / "busy.json"
    with imported("busy") as busy:
        assert busy.main(["--repeats", "1", "--seconds", "0.01", "--threads", "2", "--json", str(path)]) == 0
        rows = json.loads(path.read_text())["rows"]
        assert [row["setting"] for row in rows] == list(busy.SETTINGS) * 2
    assert [row["beside"] > 0 for row in rows] == [False] * 4 + [True] * 4
    assert all(round_[kind]["cpu"] > 0 for row in rows for round_ in row["rounds"] for kind in ("regular", "irregular"))
    assert "beside 0 busy programs" in capsys.readouterr().out


@pytest.mark.slow
def test_interpolation_compares_with_bilinear_and_with_dcls(tmp_path):
    pytest.importorskip("DCLS")
    path = tmp_path / "interpolation.json"
    command = [sys.executable, str(FOLDER / "interpolation.py"), "--shrink", "--rounds", "1", "--output", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    rows = json.loads(path.read_text())["rows"]
    assert {row["part"] for row in rows} == {"layer3", "block"}
    assert all(row["ratio"] > 0 for row in rows)
