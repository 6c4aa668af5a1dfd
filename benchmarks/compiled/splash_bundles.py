"""Cycles of splash attention on a TPU by block size, counted without a TPU.

    python3 -m benchmarks.compiled.splash_bundles

The TPU compiler can dump the final schedule of each kernel in bundles: the instructions that a core
issues in one cycle. A kernel is a loop over a grid: some of its bundles are executed in every step,
some only for blocks with a query that sees a key, and some once per block of queries, or of keys.
Counted for the presets' rows and windows, they are a lower bound on a kernel's cycles, which leaves
out waiting for memory.

The table has thousands of bundles per head and row, forward and backward. Blocks of 128 are JAX's
default. "Fused" is one kernel for all gradients instead of two; it writes the queries' gradient
once per block of keys, the cost of which is not counted.

It needs libtpu, but no TPU: pip install -e ".[tpu-compiler]". It takes five minutes.
"""

import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.command import run
from benchmarks.compiled.tpu import use_tpu_compiler
from benchmarks.results import save

SHAPES = (  # positions in a row, which paired heads double; window
    *((16_384, window) for window in (128, 384, 640, 768, 896, 1408, 1664, 2560)),
    *((32_768, window) for window in (128, 384, 640, 768)),
    *((1024, None), (2048, None)),
)


@dataclass(frozen=True)
class Options:
    """Count the bundles that splash attention executes on TPUs, by block size."""

    tiny: bool = False
    """Use one chip and one block size: to test this script."""


@dataclass(frozen=True)
class Form:
    """A way to compile splash attention, with the same schedules for all rows and windows."""

    chip: str
    windows: bool
    """Whether it has windows and documents."""
    block: int
    fused: bool


@dataclass(frozen=True)
class Schedule:
    """The bundles of a kernel."""

    every: int
    """Per step of the grid."""
    products: int
    """Per pair of blocks that see each other."""
    once: int
    """Per block in the outer loop, to initialize it and to write its result."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, measure, arguments)


def measure(options: Options) -> None:
    """Print the tables, and save the schedules."""
    use_tpu_compiler()
    chips, sizes = (("v5e",), (128,)) if options.tiny else (("v5e", "v6e", "v5p"), (128, 256, 512))
    forms = [
        Form(chip, windows, block, fused)
        for chip in chips
        for windows in (True, False)
        for block in sizes
        for fused in sorted({False, block == 512})
    ]
    with TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        found = {form: schedules(form, Path(folder)) for form in forms}
    for chip in chips:
        print(f"\n{table(found, chip)}")
    saved = [
        asdict(form) | {name: asdict(each) for name, each in kernels.items()}
        for form, kernels in found.items()
    ]
    save("splash_bundles", {"schedules": saved}, options.tiny)


def schedules(form: Form, folder: Path) -> dict[str, Schedule]:
    """Return the schedules of fwd, dkv and, unless fused, dq, from the compiler's dump folder."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from benchmarks.compiled.for_tpu import devices_of
    from nanogpt.model.kernels.splash_attention import band, blocks

    T = 2048
    names = ["q", "kv", "q_dkv", "kv_dkv"] if form.fused else []
    sizes = (
        splash.BlockSizes(
            **{f"block_{name}": form.block for name in names}, use_fused_bwd_kernel=True
        )
        if form.fused
        else blocks(form.block)
    )
    mask = splash.MultiHeadMask([band(T, 640 if form.windows else None)])
    attend = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def output_and_gradients(q, k, v, documents):
        segments = splash.SegmentIds(documents, documents) if form.windows else None
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
        return out, pullback(out)

    mesh = Mesh(np.array(devices_of(form.chip, 1)), ("device",))
    here = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1, T, 128), jnp.bfloat16, sharding=here)
    documents = jax.ShapeDtypeStruct((T,), jnp.int32, sharding=here)
    jax.jit(output_and_gradients).lower(x, x, x, documents).compile()
    found = {}
    for file in sorted(folder.iterdir()):
        kernel = re.search(r"splash_mha_(fwd|dq|dkv)_.*\d-final_bundles\.txt$", file.name)
        if kernel:
            found[kernel[1]] = schedule(file.read_text(errors="replace"))
        file.unlink()
    return found


def schedule(text: str) -> Schedule:
    """Read a kernel's bundles from the compiler's listing, with an address and a bundle per line.

    The loop over the grid extends from the mark of its body to the last backward branch. Branches
    in it skip regions; the innermost regions are those not executed in every step.
    """
    lines = {
        int(line[1], 16): line[0]
        for line in re.finditer(r"^\s*(0x[0-9a-f]+|0) .*$", text, re.MULTILINE)
    }
    begin = next(at for at, line in lines.items() if re.match(r"\s*\S+\s+LB", line))
    end = max(at for at, line in lines.items() if re.search(r"sbr\.rel \(!%p\w+\)", line))
    ends = {
        region: at
        for at, line in lines.items()
        for region in re.findall(r"Start/End empty region (\d+)", line)
    }
    skipped = [
        (at, ends[region])
        for at, line in lines.items()
        for region in re.findall(r"sbr\.rel \(%p\w+\) target = \$region(\d+)", line)
        if ends.get(region, 0) > at
    ]
    products = once = 0
    for first, last in skipped:
        if any(first < other < last for other, _ in skipped):
            continue
        if any("vmat" in lines.get(at, "") for at in range(first, last)):
            products += last - first
        else:
            once += last - first
    return Schedule(end - begin - products - once, products, once)


def executed(kernels: dict[str, Schedule], block: int, T: int, window: int | None) -> int:
    """Return the bundles executed for a head of a row, forward and backward."""
    count, reach = T // block, T if window is None else window - 1
    seen = [i - max(0, i * block - reach) // block + 1 for i in range(count)]
    total = 0
    for name, kernel in kernels.items():
        # A fused kernel steps through all pairs of blocks, the others only through visible ones.
        width = count if name == "dkv" and "dq" not in kernels else max(seen)
        total += count * (width * kernel.every + kernel.once) + sum(seen) * kernel.products
    return total


def table(found: dict[Form, dict[str, Schedule]], chip: str) -> str:
    """Return the counts for a chip, in Markdown."""
    forms = [form for form in found if form.chip == chip]
    columns = sorted({(form.block, form.fused) for form in forms})
    names = [f"{block}{', fused' if fused else ''}" for block, fused in columns]
    lines = [f"| {chip}: places, window | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    for T, window in SHAPES:
        counts = [
            executed(found[Form(chip, window is not None, *column)], column[0], T, window)
            for column in columns
        ]
        cells = " | ".join(f"{count / 1e3:,.0f}" for count in counts)
        lines.append(f"| {T:,}, {window or 'none'} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
