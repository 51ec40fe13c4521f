"""The programs' first step: how threads wait is read when PyTorch is loaded, so it is set before that.

A thread of GNU's OpenMP spins some 300,000 times before it sleeps. While other programs want the processors, each
spinning thread takes the time of one that has work, and a step takes many times its share (benchmarks/busy.py). About
1,000 times take as long as waking up does, and are enough.
"""

from __future__ import annotations

import os


def zoo() -> None:
    """The program ``icnn-zoo``."""
    _wait_briefly()
    from icnn_zoo.cli.programs import in_a_line, zoo_main

    in_a_line(zoo_main, "icnn-zoo")


def lightning() -> None:
    """The program ``lightning``."""
    _wait_briefly()
    from icnn_zoo.cli.programs import in_a_line, lightning_main

    in_a_line(lightning_main, "lightning")


def _wait_briefly() -> None:
    """Sets what a user has not set; further processes inherit it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
