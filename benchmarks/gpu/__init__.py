"""One command for whoever has a GPU: is the operator right there, and how fast is it? See docs/gpu.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the benchmarks share
