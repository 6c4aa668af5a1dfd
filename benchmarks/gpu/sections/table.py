"""All measurements as one table in Markdown, beside their predictions."""

from typing import Any

from benchmarks.gpu.rows import Figures
from benchmarks.gpu.sections import SECTIONS

FORMS = {  # formats of figures, in this order; all others are only in the JSON
    "device": "{}",
    "nvidia_smi": "{}",
    "usable_GB": "{:.1f} GB usable",
    "why": "{}",
    "ms": "{:,.3g} ms",
    "seconds": "{:,.1f} s",
    "tokens_per_s": "{:,.0f} tokens/s",
    "tflops": "{:,.0f} TFLOP/s",
    "tb_per_s": "{:.2f} TB/s",
    "of_peak": "{:.0%} of the peak",
    "mfu": "MFU {:.1%}",
    "ratio": "{:.3f} of the step",
    "compile_s": "compiled in {:.1f} s",
    "memory_GB": "{:.1f} GB",
    "of_step_alone": "{:.1%} of the step's rate",
    "stalls": "{} stalls",
    "ours_over_it": "train_gpt.py is {:.2f} times as fast",
    "passed": "{} passed",
    "skipped": "{} skipped",
    "failures": "failed: {}",
    "val_loss": "val loss {:.3f}",
    "tokens": "{:,} tokens",
}


def markdown(figures: dict[str, Any]) -> str:
    """Return the table of the sections so far, below a line on device, date and versions."""
    lines = [
        "{device}, {date}, commit {commit}, JAX {jax}, Python {python}; predictions were made "
        "before any measurement on a GPU".format(**figures),
        "",
        "| what | measured | predicted |",
        "|---|---|---|",
    ]
    for section, found in figures["sections"].items():
        lines.append(f"| **{SECTIONS[section][0]}** | {found['seconds']:.0f} s | |")
        for row, values in found["rows"].items():
            measured = values.get("failed", cell(values)).replace("|", "/")
            lines.append(f"| {row} | {measured} | {cell(values.get('predicted', {}))} |")
        if found["ended"]:
            lines.append(f"| | {found['ended'].replace('|', '/').splitlines()[0]} | |")
    return "\n".join(lines) + "\n"


def cell(values: Figures) -> str:
    """Return figures in words; unknown ones are left out."""
    known = {name: values.get(name) for name in FORMS}
    shown = {name: value for name, value in known.items() if value not in (None, [], "")}
    return ", ".join(FORMS[name].format(value) for name, value in shown.items())
