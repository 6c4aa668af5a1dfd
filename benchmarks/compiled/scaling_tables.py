"""The tables and the picture of docs/scaling.md."""

from collections import Counter
from collections.abc import Iterable
from math import floor, log10
from pathlib import Path

from benchmarks.compiled.collectives import Sent, wire_bytes
from benchmarks.compiled.prediction import DEVICE_TOKENS, SIZES, STEP_TOKENS, Machine, predicted


def name_of(case: dict) -> str:
    """Return how a case shards its work."""
    shared = f"data={case['devices'] // case['model']},model={case['model']}"
    divided = "shard_params" if case["shard_params"] else "data"
    return shared if case["model"] > 1 else divided


def table_of_sent(cases: Iterable[dict]) -> str:
    """Return a table of the figures read from the programs, in Markdown."""
    lines = [
        "| size | parallelism | devices | GB sent | collectives | reduced early | "
        "GB of state | GB of memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        all_sent = [Sent(**values) for values in case["sent"]]
        wire = sum(wire_bytes(x.kind, x.devices, x.bytes) for x in all_sent)
        kinds = Counter()
        for x in all_sent:
            kinds[x.kind] += x.count
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        lines.append(
            f"| {case['size']} | {name_of(case)} | {case['devices']} | {wire / 1e9:.2f} | {told} | "
            f"{case['reduced_early_GB'] / case['reduced_GB']:.0%} | "
            f"{case['state_GB']:.2f} | {case['memory_GB']:.1f} |"
        )
    return "\n".join(lines)


def table_of_times(cases: Iterable[dict], machine: Machine) -> str:
    """Return a table of predictions, in Markdown; efficiency is relative to the fewest devices."""
    lines = [
        f"| size | parallelism | {machine.device}s | "
        "ms, strong scaling | efficiency | ms, weak scaling | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    firsts: dict[tuple, dict] = {}
    for case in cases:
        first = firsts.setdefault((case["size"], case["model"], case["shard_params"]), case)
        cells = []
        for tokens_on in (lambda n: STEP_TOKENS / n, lambda _: DEVICE_TOKENS):
            then, now = tokens_on(first["devices"]), tokens_on(case["devices"])
            before, after = predicted(first, then, machine), predicted(case, now, machine)
            most = then / before["all_hidden"]  # tokens per second and device
            low, high = (now / after[k] / most for k in ("none_hidden", "all_hidden"))
            cells.append(span(1e3 * after["all_hidden"], 1e3 * after["none_hidden"]))
            cells.append(f"{span(100 * low, min(100.0, 100 * high))}%")
        cells = " | ".join(cells)
        lines.append(f"| {case['size']} | {name_of(case)} | {case['devices']} | {cells} |")
    return "\n".join(lines)


def span(low: float, high: float) -> str:
    """Return a range of predictions, with two significant digits: they are not more accurate."""

    def rounded(value: float) -> str:
        digits = 1 - floor(log10(value))
        return f"{round(value, digits):,.{max(0, digits)}f}"

    low, high = rounded(low), rounded(high)
    return low if low == high else f"{low} to {high}"


def draw(cases: Iterable[dict], path: Path) -> None:
    """Plot the predicted throughput in strong and weak scaling, from no overlap to full overlap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    cases = [case for case in cases if name_of(case) == "data"]
    for axis, strong in zip(axes, (True, False), strict=True):
        for number, size in enumerate(SIZES):
            of_size = [case for case in cases if case["size"] == size]
            if not of_size:
                continue
            counts = [case["devices"] for case in of_size]
            rates = {}
            for bound in ("all_hidden", "none_hidden"):
                per_device = [STEP_TOKENS / n if strong else DEVICE_TOKENS for n in counts]
                rates[bound] = [
                    n * tokens / predicted(case, tokens)[bound]
                    for n, tokens, case in zip(counts, per_device, of_size, strict=True)
                ]
            colour = f"C{number}"
            axis.fill_between(counts, *rates.values(), alpha=0.3, color=colour, linewidth=0)
            axis.plot(counts, rates["all_hidden"], "o-", color=colour, label=size)
            ideal = [rates["all_hidden"][0] * n / counts[0] for n in counts]
            axis.plot(counts, ideal, ":", color=colour, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="H200s")
        axis.set_xticks([8, 64, 512], ["8", "64", "512"])
        axis.minorticks_off()
        kind = f"{STEP_TOKENS:,} tokens per step" if strong else f"{DEVICE_TOKENS:,} tokens per GPU"
        axis.set_title(f"{'strong' if strong else 'weak'} scaling: {kind}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens per second, predicted")
    axes[1].legend(title="data parallel; dotted: ideal")
    figure.suptitle("Prediction from the compiled step and published link speeds: nothing was run")
    figure.savefig(path, dpi=110)
