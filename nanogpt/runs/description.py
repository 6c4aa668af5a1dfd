"""A run's plan in words: the first lines, the table and `--dry-run`."""

from math import lcm
from pathlib import Path

from nanogpt.devices.accelerator import unused_gpu
from nanogpt.devices.processes import processes_line
from nanogpt.training.plan import Plan

MANY_EPOCHS = 4  # up to 4 epochs are as good as new text (Muennighoff et al., arXiv:2305.16264)


def heading(plan: Plan, folder: Path) -> list[str]:
    """Return the first lines of a run in this folder."""
    hp, memory = plan.hp, plan.hardware.memory
    lines = [f"{hp.preset} preset | {plan.dataset} | {devices(plan)} | {accumulation(plan)}"]
    if (plan.hardware.kind, hp.device) == ("cpu", "auto") and (line := unused_gpu()):
        lines.append(line)
    if plan.hardware.processes > 1:
        lines.append(f"{processes_line()}; if one dies, all exit; resume with --resume {folder}")
    lines.append(plan.attention)
    if hp.batch_size and plan.batch_size < hp.batch_size:
        lines.append(
            f"micro-batch: {plan.batch_size} rows instead of batch_size {hp.batch_size}, since a "
            f"step has only that many for each of {plan.readers} devices"
        )
    elif hp.batch_size is None:
        available = f"{memory / 1e9:.1f} GB" if memory else "unknown"
        rows = "row" if plan.batch_size == 1 else "rows"
        lines.append(
            f"micro-batch: {plan.batch_size} {rows}, about {plan.activation_bytes / 1e9:.1f} GB of "
            f"activations (device memory {available})"
        )
    if hp.canonical_masking:
        lines.append("canonical masking: validation leaves out ids that cannot come next")
    if plan.kernels.rematerialize:
        lines.append("layers are recomputed in the backward pass to save memory")
    return lines + warnings(plan)


def warnings(plan: Plan) -> list[str]:
    """Return warnings about the data, the number of epochs and the device."""
    found = list(plan.dataset.warnings)
    if plan.hp.dtype == "bfloat16" and not plan.hardware.bfloat16:
        found.append(
            f"{plan.hardware.kind} has no bfloat16 units and converts it to float32 at every "
            "operation: use --dtype float32"
        )
    if epochs(plan) > MANY_EPOCHS:
        found.append(
            f"{epochs(plan):.1f} epochs: the model will memorize the text; use more data, or a "
            "smaller num_steps"
        )
    return [f"WARNING: {warning}." for warning in found]


def epochs(plan: Plan) -> float:
    """Return the number of epochs of the run."""
    return plan.hp.schedule.tokens(plan.hp.num_steps) / plan.dataset.train_tokens


def table(plan: Plan) -> dict[str, str]:
    """Return the rows of the table that describes a run."""
    hp = plan.hp
    return {
        "preset": hp.preset,
        "model": f"{hp.model.num_layers} layer{'s' * (hp.model.num_layers > 1)}, width "
        f"{hp.model.width}, {hp.model.num_heads} heads",
        "parameters": f"{plan.num_parameters:,}",
        "data": str(plan.dataset),
        "tokens": f"{hp.schedule.tokens(hp.num_steps):,} in {hp.num_steps:,} steps, "
        f"{epochs(plan):.3g} epochs",
        "devices": devices(plan),
        "batch": accumulation(plan),
        "attention": plan.attention,
        "dtype": hp.dtype,
    }


def outlook(plan: Plan) -> dict[str, str]:
    """Return the rows that `--dry-run` adds to the table: estimates, as nothing is compiled."""
    rows = {}
    for number, stage in enumerate(plan.stages):
        (Ng, R), longest = plan.shape(number), max(stage.model.windows, default=0)
        rows[f"stage {number + 1}"] = (
            f"steps {stage.first_step:,} to {stage.last_step:,}, {stage.tokens_per_step:,} tokens "
            f"each, {Ng} x {R} rows of {stage.row_length:,}"
            + (f", longest window {longest:,}" if longest else "")
        )
    available = f" of {size(plan.hardware.memory)}" if plan.hardware.memory else ""
    rows["memory"] = (
        f"about {size(plan.device_bytes)}{available} per device: "
        f"{size(plan.device_state_bytes)} of parameters and optimizer state, "
        f"{size(plan.working_bytes)} of gradients and copies, "
        f"{size(plan.activation_bytes)} of activations"
    )
    saved, (often, validated) = 1, (plan.hp.checkpoint_every, plan.hp.val_loss_every)
    every = [n for n in (often, plan.hp.keep_best and validated) if n]
    if every:  # at one interval or the other, counted once if both are due, and after the last step
        before = plan.hp.num_steps - 1
        saved += sum(before // n for n in every) - (len(every) == 2) * (before // lcm(*every))
    kept, best = min(saved, plan.hp.keep_checkpoints), ""
    minutes = plan.hp.checkpoint_minutes
    if plan.hp.keep_best and kept < saved:
        kept, best = kept + 1, " and the best"
    rows["checkpoints"] = (
        f"{saved} of {size(plan.state_bytes)} each; "
        f"the newest {kept - bool(best)}{best} are kept, up to "
        f"{size(min(saved, kept + 1) * plan.state_bytes)} on disk"
        + (f"; plus one every {minutes:g} minutes" if minutes else "")
    )
    return rows


def size(num_bytes: float) -> str:
    """Format a number of bytes: 12.3 GB, or below a gigabyte 45 MB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def devices(plan: Plan) -> str:
    """Describe the devices and how they share the work."""
    words = f"{plan.num_devices} x {plan.hardware.kind}"
    if plan.hardware.processes > 1:
        words += f" in {plan.hardware.processes} processes"
    if plan.sharers > 1:
        words += f" as data={plan.readers},model={plan.sharers}"
    return words + (", parameters sharded" if plan.shard_params else "")


def accumulation(plan: Plan) -> str:
    """Show the accumulation steps Ng as a quotient, for each number of tokens per step."""
    per_step = dict.fromkeys(stage.tokens_per_step for stage in plan.stages)
    T = plan.hp.sequence_length
    per_pass = plan.batch_size * T * plan.readers
    return (
        f"Ng = {', '.join(f'{tokens:,}' for tokens in per_step)} / "
        f"({plan.batch_size} * {T} * {plan.readers}) = "
        f"{', '.join(f'{tokens // per_pass}' for tokens in per_step)}"
    )
