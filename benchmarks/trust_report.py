"""The numbers of docs/trust.md: what the tests tried, from a JUnit file of pytest.

Run pytest with -o junit_family=xunit1 --junitxml trust.xml on the modules that docs/trust.md names, then
python benchmarks/trust_report.py trust.xml --to docs/results/trust.json
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path


def summary(files: list[Path]) -> dict[str, object]:
    """Tests, those that did not pass, and kills, by test module and in all."""
    modules: dict[str, Counter[str]] = {}
    for file in files:
        modules |= read(file)
    total = sum(modules.values(), Counter())
    return {"modules": {name: dict(counts) for name, counts in sorted(modules.items())}, "all": dict(total)}


def read(file: Path) -> dict[str, Counter[str]]:
    """The counts of one JUnit file by module."""
    modules: dict[str, Counter[str]] = {}
    for case in xml.parse(file).iter("testcase"):
        counts = modules.setdefault(case.get("classname", ""), Counter(tests=0, failed=0, kills=0))
        counts["tests"] += 1
        counts["failed"] += any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        kills = [entry for entry in case.iter("property") if entry.get("name") == "kills"]
        counts["kills"] += sum(int(entry.get("value", 0)) for entry in kills)
    return modules


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("junit", type=Path, nargs="+", help="later files replace the modules of earlier ones")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    options.to.write_text(json.dumps(summary(options.junit), indent=2) + "\n", encoding="utf-8")
