"""The settings of a run: those of a preset or another run, overridden on the command line.

JAX is imported only where needed, so that `--help` and errors in the arguments appear at once.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.checks import ConfigError, checked
from nanogpt.data.text.cache import prepare
from nanogpt.data.tokenizer import TOKENIZERS
from nanogpt.devices.launchers import launched_with_others
from nanogpt.runs.folder import check_name
from nanogpt.runs.trackers import check_trackers
from nanogpt.sizes import at_depth
from nanogpt.training.resume import resumed_settings, run_to_resume, saved_settings

if TYPE_CHECKING:
    from train_gpt import Hyperparameters

    Override = Callable[[Hyperparameters], Hyperparameters]

SOURCES = "resume", "init_from", "config"  # settings that give the starting settings


def join_others(given: "Hyperparameters") -> None:
    """Join the other processes of the run, if there are any. Call it before using JAX."""
    where = given.coordinator_address, given.num_processes, given.process_id
    if where == (None,) * 3 and not launched_with_others():
        return  # without loading JAX
    import jax

    from nanogpt.devices.processes import join_processes

    if given.device == "cpu":  # before processes exchange their lists of accelerators
        jax.config.update("jax_platforms", "cpu")
    join_processes(*where)


def leave(status: int) -> int:
    """Return the exit status of a process that failed; one of several processes exits here."""
    if "jax" in sys.modules:
        from nanogpt.devices import processes

        processes.leave(status)
    return status


def settings_here(
    given: "Hyperparameters", presets: Mapping[str, "Hyperparameters"], override: "Override"
) -> "Hyperparameters":
    """Return a run's settings, checked, with the shards of `data` and a size that fits `minutes`.

    Raises ConfigError if they are invalid.
    """
    begun = time.monotonic()
    hp = settings(given, presets, override)
    chosen_here = given.preset == "auto" and not any(getattr(given, name) for name in SOURCES)
    if chosen_here and hp.preset == "baseline":
        tell(
            "Using preset baseline: speedrun does not fit into a device's memory here "
            "(use --preset speedrun to try it anyway)."
        )
    # The steps to profile must be among those that the minutes allow, which are not known yet.
    (hp if given.minutes is None else replace(hp, profile=None)).check()
    hp = with_own_text(hp)

    def fitted(hp: "Hyperparameters") -> "Hyperparameters":
        """Return them with a total_batch_size that the devices can share, unless set by hand."""
        if given.resume is not None or given.config is not None:
            return hp
        shared = fitted_to_devices(hp)
        by_hand = shared != hp and override(replace(hp, total_batch_size=1)).total_batch_size != 1
        return hp if by_hand else shared

    preset_batch, hp = hp.total_batch_size, fitted(hp)
    if given.minutes is None:
        if preset_batch != hp.total_batch_size:
            tell(
                f"total_batch_size is {hp.total_batch_size:,} instead of {preset_batch:,}, so that "
                "all devices can share it"
            )
        return hp
    # Check now what would otherwise be refused only after timing, which takes minutes.
    check_name(Path("runs"), hp.run_name)
    check_trackers(hp.tensorboard, hp.wandb)
    from nanogpt.training.budget import afford

    def choose(depth: int, tokens: float | None) -> "Hyperparameters":
        return fitted(settings(replace(given, depth=depth), presets, override, tokens))

    hp = afford(hp, choose, begun)
    hp.check()
    return hp


def tell(line: str) -> None:
    """Print a line, once among all processes. JAX must be loaded."""
    if sys.modules["jax"].process_index() == 0:
        print(line)


def fitted_to_devices(hp: "Hyperparameters") -> "Hyperparameters":
    """Return the settings with the nearest total_batch_size that the devices here can share."""
    import jax

    from nanogpt.devices.accelerator import use_device
    from nanogpt.training.stages import division, with_whole_passes

    use_device(hp.device)
    readers, _ = division(hp.mesh, jax.device_count())
    return with_whole_passes(hp, readers)


def settings(
    given: "Hyperparameters",
    presets: Mapping[str, "Hyperparameters"],
    override: "Override",
    tokens: float | None = None,
) -> "Hyperparameters":
    """Return the settings of a run: defaults chosen by the options in `given`, then `override`.

    Args:
        tokens: number of tokens to train on at given.depth, instead of what the depth implies.
    """
    kind = type(given)
    if given.depth is not None or given.minutes is not None:
        checked(asdict(given), kind)  # before settings follow from them
    sources = [name for name in SOURCES if getattr(given, name)]
    if len(sources) > 1:
        raise ConfigError(
            f"{' and '.join(sources)} each give the starting settings: use only one of them."
        )
    for name in ("depth", "minutes"):
        if sources and getattr(given, name) is not None:
            raise ConfigError(
                f"{name} chooses the size of a new model, but {sources[0]} fixes it: use only one "
                "of them."
            )
    if given.resume is not None:
        return resumed_settings(kind, run_to_resume(given.resume), override)
    if given.config is not None:
        if given.preset != "auto":
            raise ConfigError(
                "preset and config both give the starting settings: use only one of them."
            )
        start = saved_settings(kind, Path(given.config))
        return replace(override(replace(start, run_name="", resume=None)), preset=start.preset)
    weights = None
    if given.init_from is not None:
        from nanogpt.inference.weights import weights_in

        weights = weights_in(kind, given.init_from)
    if given.preset != "auto":
        start = presets[given.preset]
    elif weights and weights.settings:
        start = weights.settings
    else:
        start = presets[preset_for_hardware(given, partial(override, presets["speedrun"]))]
    if given.depth is not None:
        start = at_depth(start, given.depth, tokens)
    start = suited_to_data(start, override(start))
    if weights is None:
        hp = override(start)
        check_left_to_rule(given, start, override)
    else:
        from nanogpt.inference.weights import settings_with

        hp = settings_with(weights, start, override)
    return replace(hp, preset=start.preset)


def check_left_to_rule(
    given: "Hyperparameters", start: "Hyperparameters", override: "Override"
) -> None:
    """Raise ConfigError if `override` sets by hand what `depth` or `minutes` is to decide."""
    if given.depth is None and given.minutes is None:
        return
    other = replace(
        start,
        num_steps=start.num_steps + 1,
        model=replace(start.model, num_layers=start.model.num_layers + 1),
    )
    # Whatever is set by hand changes at least one of two different values.
    changes = [(each, override(each)) for each in (start, other)]
    if given.minutes is not None and any(a.num_steps != b.num_steps for a, b in changes):
        raise ConfigError(
            "num_steps and minutes each decide how long to train: use only one of them."
        )
    sized = "minutes" if given.depth is None else "depth"
    if any(a.model.num_layers != b.model.num_layers for a, b in changes):
        raise ConfigError(
            f"model.num_layers and {sized} each decide the number of layers: use only one of them."
        )


def suited_to_data(start: "Hyperparameters", asked: "Hyperparameters") -> "Hyperparameters":
    """Adapt the defaults `start` to the tokenizer in `asked`, and to the user's text if any."""
    if asked.data or asked.tokenizer != start.tokenizer:
        tokenizer, model = TOKENIZERS[asked.tokenizer], start.model
        separator = None if model.document_separator is None else tokenizer.separator
        model = replace(model, vocab_size=tokenizer.vocab_size, document_separator=separator)
        start = replace(start, model=model, sample_prompt=type(start).sample_prompt)
    if asked.data:  # documents in any order and of any length
        start = replace(start, shuffle=True, max_document_length=None)
    return start


def with_own_text(hp: "Hyperparameters") -> "Hyperparameters":
    """Return the settings with the shards of `data`, which are created if missing.

    Raises ConfigError if a resumed run was trained on other text.
    """
    if not hp.data or (hp.resume and glob(hp.train_files or "")):
        return hp
    text = prepare(hp.data, hp.tokenizer, hp.data_field)
    before, now = (Path(files or "").parent.name for files in (hp.train_files, text.train_files))
    if hp.resume and before != now:
        raise ConfigError(
            f"{hp.resume} was trained on different text: {', '.join(hp.data)} changed. "
            "Restore it, or start another run."
        )
    return replace(hp, train_files=text.train_files, val_files=text.val_files)


def preset_for_hardware(given: "Hyperparameters", speedrun: "Callable[[], Hyperparameters]") -> str:
    """Return the preset for this hardware: `laptop` without an accelerator, otherwise `speedrun`,
    or `baseline` if `speedrun` does not fit.

    `speedrun` is tried with the user's settings. Whether a size or weights of their own choice fit
    is up to them.
    """
    if given.device == "cpu" or not (find_spec("jax_plugins") or find_spec("libtpu")):
        return "laptop"  # without loading JAX, which is installed for CPUs only
    from nanogpt.devices.accelerator import use_device

    if use_device() == "cpu":
        return "laptop"
    from nanogpt.training.plan import fits, hardware_here

    sized = any((given.depth, given.minutes, given.init_from))
    return "speedrun" if sized or fits(speedrun(), hardware_here()) else "baseline"
