"""What is compared: a stage of the speedrun at two sizes, and variants of its step."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Int32

from benchmarks.gpu.rows import Figures
from nanogpt.config import AttentionKernel, GPTConfig, LossKernel
from nanogpt.schedule import Stage
from train_gpt import PRESETS, Hyperparameters

DOCUMENT = 690  # tokens of a FineWeb document, on average
Rule = Literal["NorMuon", "Muon", "Adam"]  # of the matrices; "Adam": of all parameters


@dataclass(frozen=True)
class Size:
    """What is measured, and how many times."""

    hp: Hyperparameters  # batch_size is that of the base
    rounds: int  # repetitions of a part in one call
    calls: int  # calls or steps per timing; even, because Adam skips every second step
    repeats: int  # timings, whose median is reported

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch."""
        return self.hp.batch_size * self.hp.sequence_length

    @property
    def Ng(self) -> int:
        """Micro-batches per step."""
        return self.hp.total_batch_size // self.tokens


def stage_alone(hp: Hyperparameters, stage: int) -> Hyperparameters:
    """Return a run with only this stage, counted from 0, and as many tokens per micro-batch."""
    T, weights = hp.schedule.row_length(stage), hp.stages[stage].target_weights
    split = not hp.schedule.ties_head(hp.model, stage)
    return replace(
        hp,
        batch_size=hp.batch_size * hp.sequence_length // T,
        sequence_length=T,
        total_batch_size=hp.schedule.tokens_per_step(stage),
        stages=(Stage(target_weights=weights, split_head=split),),
        model=hp.schedule.model(hp.model, stage),
    )


SPEEDRUN = PRESETS["speedrun"]
FULL = Size(replace(SPEEDRUN, batch_size=4), rounds=20, calls=4, repeats=5)
TINY_MODEL = replace(
    SPEEDRUN.model,
    **{"vocab_size": 256, "num_layers": 4, "num_heads": 2, "width": 64, "mlp_width": 256},
    **{"mlp_only": (1,), "key_offset": (3,), "paired_heads": (0,), "exclusive": (2,)},
    **{"gated": (3,), "composed": (3,), "composed_window": 12, "skips": ((0, 1),)},
    **{"attention_source": 2, "value_embeddings": 2, "value_layers": (0, 3)},
    **{"bigram_buckets": 128, "bigram_width": 64, "document_separator": 255},
)
TINY_STAGES = tuple(replace(stage, windows=(48, 16, 16, 16)) for stage in SPEEDRUN.stages)
TINY_BATCH = {"dtype": "float32", "batch_size": 2, "sequence_length": 64, "total_batch_size": 768}
TINY = Size(
    replace(SPEEDRUN, heads_together=1, stages=TINY_STAGES, model=TINY_MODEL, **TINY_BATCH), 2, 2, 1
)


def random_tokens(config: GPTConfig, shape: tuple[int, ...]) -> Int32[np.ndarray, "..."]:
    """Return random tokens, in documents about as long as FineWeb's."""
    rng, separator = np.random.default_rng(0), config.document_separator
    tokens = rng.integers(config.vocab_size, size=shape, dtype=np.int32)
    if separator is not None:
        tokens[tokens == separator] = 0
        tokens[rng.random(shape) < 1 / DOCUMENT] = separator
    return tokens


@dataclass(frozen=True)
class Variant:
    """How a step is computed."""

    attention: AttentionKernel
    batch_size: int
    target_weights: tuple[float, ...] = (1.0,)
    document_mask: bool = True
    loss: LossKernel = "xla"
    fp8_head: bool = False
    rule: Rule = "NorMuon"
    rematerialize: bool = False


def variants_of(base: Variant) -> dict[str, Variant]:
    """Return the base, and variants that differ from it in one thing."""
    R, unmasked = base.batch_size, replace(base, document_mask=False)
    others = {
        **{f"{rows} rows": replace(base, batch_size=rows) for rows in (R // 2, 2 * R)},
        "Adam for all": replace(base, rule="Adam"),
        "plain Muon": replace(base, rule="Muon"),
        "one target": replace(base, target_weights=(1.0,)),
        "FP8 head": replace(base, fp8_head=True),
        **{f"{k} attention": replace(base, attention=k) for k in ("xla", "pallas")},
        "without document mask": unmasked,
        "without document mask, cudnn": replace(unmasked, attention="cudnn"),
        "pallas loss": replace(base, loss="pallas"),
    }
    return {"base": base} | {row: other for row, other in others.items() if other != base}


def fastest_of_each(base: Variant, variants: dict[str, Variant], figures: Figures) -> Variant:
    """Return the base with the fastest measured attention, loss, head and micro-batch size."""
    best = base
    for thing in ("attention", "loss", "fp8_head", "batch_size"):
        found = {
            getattr(variant, thing): milliseconds(figures, "steps", row)
            for row, variant in variants.items()
            if replace(variant, **{thing: getattr(base, thing)}) == base
        }
        measured = [value for value in found if not math.isnan(found[value])]
        if measured:
            best = replace(best, **{thing: min(measured, key=found.get)})
    return best


def milliseconds(figures: Figures, section: str, row: str) -> float:
    """Return the time in a row; NaN if it was not measured."""
    return figures[section].get(row, {}).get("ms", math.nan)
