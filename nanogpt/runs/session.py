"""The start and end of a run: its folder, the files there, its first and last lines."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from shlex import quote

import jax

from nanogpt.data.dataset import content_of
from nanogpt.devices.hardware import peak_memory
from nanogpt.devices.processes import check_all_see, told_by_first
from nanogpt.runs.description import heading, outlook, table, warnings
from nanogpt.runs.environment import environment, without_folders
from nanogpt.runs.folder import Run, SilentRun, check_name, delete_if_no_run, new_folder
from nanogpt.runs.profile import steps_of
from nanogpt.runs.progress import Progress
from nanogpt.runs.trackers import open_trackers
from nanogpt.training.interruption import Interruption
from nanogpt.training.plan import Plan
from nanogpt.training.programs import Programs
from nanogpt.training.records import validation_losses
from nanogpt.training.saving import Checkpoints
from nanogpt.training.start import Start, facts_to_save, where_to_begin
from nanogpt.training.step import TrainState

# Settings of a single process, which are not part of the run.
OF_A_PROCESS = {
    "resume": None,
    "config": None,
    "profile": None,
    "dry_run": False,
    "coordinator_address": None,
    "num_processes": None,
    "process_id": None,
}


def only_plan(plan: Plan) -> int:
    """Print the plan of a run, in process 0 only; return the exit status.

    Raises RunError or ConfigError if the run could not start.
    """
    rows = table(plan) | outlook(plan)
    if plan.hp.resume:
        start = where_to_begin(plan, Path(plan.hp.resume), print)
        finished = ", nothing left to do" if start.first_record > plan.hp.num_steps else ""
        rows["run"] = f"{plan.hp.resume}, after step {start.first_step - 1}{finished}"
    else:
        check_name(Path("runs"), plan.hp.run_name)
    if jax.process_index() == 0:
        print(*(f"{name}: {value}" for name, value in rows.items()), *warnings(plan), sep="\n")
    return 0


@contextmanager
def open_run(plan: Plan) -> Generator[Run, None, None]:
    """Open the run of this plan, in a new folder under runs/ or that of the run to resume.

    It is silent in all processes but the first. A new folder is deleted if the run ends before its
    settings are written. Raises RunError if the folder cannot be used, ConfigError if not all
    processes see it.
    """
    hp = plan.hp
    with ExitStack() as stack:
        runs: list[Run] = []

        def hold() -> str:
            folder = Path(hp.resume or "")
            if not hp.resume:
                folder = new_folder(Path("runs"), hp.run_name, hp.preset)
                stack.callback(delete_if_no_run, folder)
            runs.append(stack.enter_context(Run(folder)))
            return f"{folder}\n{(folder / 'holder').read_text(encoding='utf-8')}"

        folder, _, holder = told_by_first(hold).partition("\n")
        run = runs[0] if runs else SilentRun(Path(folder))
        check_all_see(run.folder / "holder", holder)
        yield run


def nothing_left(run: Run, plan: Plan, start: Start) -> int:
    """Say that the run is complete; return the exit status."""
    made, asked = start.first_record - 1, plan.hp.num_steps
    run.say(
        f"{run.folder} has already finished its {made:,} steps"
        + (f", more than --num-steps {asked:,}" if made > asked else "")
        + ". Use a larger --num-steps to train longer."
    )
    return 0


def begin(run: Run, plan: Plan, start: Start) -> Progress:
    """Write the run's settings, open its trackers and print its heading.

    Returns the Progress that reports its steps.

    Raises ConfigError if the steps to profile are already done.
    """
    hp, data = plan.hp, plan.dataset
    steps_of(hp.profile, start.first_step, hp.num_steps)
    if start.checkpoint:
        run.rewind(start.first_record - 1)
        run.say(f"resuming {run.folder} after step {start.checkpoint.step}")
    elif hp.init_from:
        run.say(f"starting from the weights in {hp.init_from}")
    config = asdict(replace(hp, **OF_A_PROCESS))
    name = " ".join(map(without_folders, str(data).split(" ")))
    content = {"name": name, **content_of(data)}
    run.configure(config, environment() | {"data": content})
    run.trackers = open_trackers(
        run.folder,
        config,
        start.first_record,
        run.say,
        tensorboard=hp.tensorboard,
        wandb=hp.wandb,
    )
    for line in heading(plan, run.folder):
        run.say(line)
    utilization, seconds = plan.utilization, start.training_seconds
    return Progress(run, hp.schedule, data.train_tokens, utilization, seconds, start.unvalidated)


def compiled(run: Run, progress: Progress, programs: Programs, start: Start) -> None:
    """Print the compile times and the table that describes the run."""
    progress.paused("compile")
    seconds = programs.compile_seconds
    each = ", ".join(f"{what} {took:.1f} s" for (what, _), took in seconds.items())
    took = progress.seconds["compile"]
    run.say(f"compiled and warmed up in {took:.1f} s ({each}); not counted in the times below")
    memory = programs.plan.hardware.memory
    of = f" of {memory / 1e9:.1f} GB" if memory else ""
    left = timedelta(seconds=round(programs.seconds_from(start.first_step)))
    rows = table(programs.plan)
    run.table(
        {"preset": rows["preset"], "run": str(run.folder)}
        | rows
        | {
            "memory": f"about {programs.memory / 1e9:.1f} GB{of} per device",
            "time": f"about {left} to train",
        }
    )


def save(
    run: Run, progress: Progress, checkpoints: Checkpoints, plan: Plan, step: int, state: TrainState
) -> None:
    """Report the step, which raises BadNumbers if it is bad, then start its checkpoint."""
    progress.report(plan.validates(step))
    run.sync()
    facts = facts_to_save(plan, step, progress.training_seconds, progress.unvalidated)
    checkpoints.save(state, facts)
    progress.paused("checkpoint")


def end(run: Run, progress: Progress, step: int) -> None:
    """Print the results of training, and where they are."""
    run.progress_ended()
    peak = peak_memory(jax.local_devices()[0])
    losses = validation_losses(run.folder)
    best, kept = best_checkpoint(run)
    where = f", kept in {kept}" if best < step and kept != run.folder else ""
    run.table(
        ({"best val loss": f"{losses[best]:.4f} after step {best:,}{where}"} if best else {})
        | progress.summary(step)
        | {"peak memory": f"{peak / 1e9:.1f} GB per device" if peak else "n/a"}
    )
    run.say(f"trained {step:,} steps; weights and metrics are in {run.folder}")


def best_checkpoint(run: Run) -> tuple[int, Path]:
    """Return the step with the lowest validation loss, or 0, and its checkpoint, or the run's."""
    losses = validation_losses(run.folder)
    best = min(losses, key=losses.__getitem__, default=0)
    kept = run.folder / "checkpoints" / f"{best:08}"
    return best, kept if kept.exists() and best < max(losses) else run.folder


def what_next(run: Run) -> str:
    """Return the next commands to try with the trained model, with its best checkpoint."""
    best = quote(str(best_checkpoint(run)[1]))
    return f"""\
Next:
  python3 sample.py {best} --prompt "The"
  python3 sample.py {best} --serve      # a web page; needs pip install -e ".[serve]"
  python3 evaluate.py {best}"""


def interrupted(run: Run, interruption: Interruption) -> int:
    """Close the trackers of an interrupted run; return the exit status."""
    run.trackers.close(interruption.exit_status)
    return interruption.exit_status
