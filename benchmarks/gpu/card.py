"""What is here: card, driver, versions."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from measuring import environment


def main(folder: Path, seconds: float, *, rehearsal: bool = False) -> None:
    """Writes card.json."""
    device = "cpu" if rehearsal else "cuda"
    packages = ("torch", "torchvision", "triton", "timm", "numpy")
    found = environment(argparse.Namespace(device=device, dtype="bfloat16"), packages)
    if not rehearsal:
        properties = torch.cuda.get_device_properties(0)
        found["card"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_mib": properties.total_memory >> 20,
            "multiprocessors": properties.multi_processor_count,
        }
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    (folder / "card.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
