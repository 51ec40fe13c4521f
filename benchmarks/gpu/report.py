"""What the parts found, as one page."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

STEP_TARGET, MEMORY_TARGET, DEFORMABLE_TARGET = 1.15, 1.2, 6.0


def write(folder: Path, states: dict[str, dict[str, Any]]) -> str:
    """Writes report.md from what is in the folder, and returns it."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    lines = ["# The operator on a GPU", ""]
    if "card" in found:
        card, machine = found["card"].get("card"), found["card"]["machine"]
        what = f"{card['name']} (compute capability {card['capability']})" if card else f"rehearsal on {machine['cpu']}"
        lines += [what + "; " + ", ".join(f"{name} {version}" for name, version in found["card"]["versions"].items())]
        lines += [found["card"]["driver"]] if "driver" in found["card"] else []
    lines += ["", *(f"- {part}: {state['status']}, {state['seconds']} s" for part, state in states.items())]
    if "gate" in found:
        failed = [f"- FAIL {result['check']}: {result['text']}" for result in found["gate"] if not result["passed"]]
        lines += ["", f"{len(found['gate'])} checks of correctness, {len(failed)} failed.", *failed]
        lines += ["", "**Results are wrong: the times below mean nothing.**"] if failed else []
    if "layers" in found:
        lines += ["", *_layers(found["layers"])]
    if "step" in found:
        lines += ["", *_step(found["step"])]
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text)
    return text


def _layers(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "Milliseconds of the GPU (graph), forward / forward and backward, and their ratio to cuDNN's. `deform_conv2d`:",
        f"its time, forward and backward, as a multiple of this operator's; the target is {DEFORMABLE_TARGET:g}.",
        "",
        "| layer | cuDNN ms | icnn_zoo ms | ratio | target | ratio as called | CPU ms | deform_conv2d | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "reason" in row:
            lines.append(f"| {name} | {row['reason'].splitlines()[0]} | | | | | | | |")
            continue
        conv, mine, target = row["conv2d"], row["icnn_zoo"], row["layer"]["target"]
        ratios = [
            f"{first / base:.2f} / {sum(mine[key]) / sum(conv[key]):.2f}"
            for key in ("graph_ms", "eager_ms")
            for first, base in [(mine[key][0], conv[key][0])]
        ]
        peer = row.get("deform_conv2d", {})
        multiple = f"{peer['eager_ms'] / sum(mine['eager_ms']):.1f}" if "eager_ms" in peer else peer.get("reason", "-")
        cells = [
            name,
            *(f"{times['graph_ms'][0]:.3f} / {sum(times['graph_ms']):.3f}" for times in (conv, mine)),
            ratios[0],
            f"{target:g}" if target else "-",
            ratios[1],
            f"{sum(mine['enqueue_ms']):.3f}",
            multiple,
            " / ".join("-" if peak is None else f"{peak:.0f}" for peak in mine["peak_mib"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _step(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    lines = [
        f"A training step of {settings['backbone']} ({settings['batch_size']} images of {settings['size']} px, "
        f"{settings['dtype']}); targets: {STEP_TARGET} of the regular one's time, {MEMORY_TARGET} of its memory.",
        "",
    ]
    regular = result["seconds_per_step"]["regular"]
    for name, seconds in result["seconds_per_step"].items():
        ratio = statistics.median(mine / base for mine, base in zip(seconds, regular, strict=True))
        peak, base = result["memory_mib"][name], result["memory_mib"]["regular"]
        memory = f", {peak:.0f} MiB ({peak / base:.2f})" if peak and base else ""
        lines.append(f"- {name}: {statistics.median(seconds) * 1e3:.1f} ms ({ratio:.2f}){memory}")
    for name, kernels in result.get("busy", {}).items():
        lines.append(f"- {name}: kernels run {kernels['kernels_ms']:.1f} ms in {kernels['kernels']} launches")
    for name, times in result.get("graphed_seconds_per_step", {}).items():
        seconds = times[name]
        ratio = statistics.median(mine / base for mine, base in zip(seconds, times["regular"], strict=True))
        lines.append(
            f"- {name}, forward and backward as CUDA graphs: {statistics.median(seconds) * 1e3:.1f} ms ({ratio:.2f}; "
            f"regular {statistics.median(times['regular']) * 1e3:.1f} ms)"
        )
    lines += [f"- {what}: {reason}" for what, reason in result.get("reasons", {}).items()]
    return lines
