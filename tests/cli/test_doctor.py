"""``icnn-zoo doctor``, and how the programs start."""

import os
import runpy
from pathlib import Path

import pytest

from icnn_zoo.cli import doctor, programs
from icnn_zoo.ops import backends
from icnn_zoo.ops.native_backend import build, wheel

ROOT = Path(__file__).parents[2]


def test_doctor_says_which_backends_run_and_why_others_cannot(monkeypatch, capsys):
    monkeypatch.setattr(wheel, "find_kind", lambda: None)
    monkeypatch.setattr(build, "load", lambda: ({}, "it needs a C compiler"))
    found = dict(doctor.examine())
    assert found["backend native"] == "not on cpu: it needs a C compiler"
    assert found["backend torch"] == "runs on cpu"
    assert found["backend auto"] == "takes torch on cpu"
    assert found["native kernel"] == "none"
    assert {f"backend {name}" for name in backends.names()} < found.keys()
    programs.zoo_main(["doctor"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)
    assert len(printed.splitlines()) < 24  # a screen


def test_doctor_says_what_windows_users_get(monkeypatch, recwarn):
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    monkeypatch.setattr(wheel, "processor_lines", set)
    monkeypatch.setattr(wheel.platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(build.sys, "platform", "win32")
    found = dict(doctor.examine())
    assert found["backend native"] == (
        "not on cpu: it was made for Linux and macOS; on win32 the backend torch computes"
    )
    assert found["backend auto"] == "takes torch on cpu"
    assert found["native kernel"] == "none"
    assert not recwarn.list  # nothing that a user could change


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["by default", "as the user set", "as the user's policy"],
)
def test_the_programs_let_threads_spin_briefly_unless_the_user_says_how(given, spins, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    seen = []
    monkeypatch.setattr(programs, "zoo_main", lambda: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    runpy.run_path(str(ROOT / "icnn_zoo_programs.py"))["zoo"]()
    assert seen == [spins]
