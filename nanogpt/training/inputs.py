"""The inputs of each step of a run, on the devices."""

from collections.abc import Iterator
from functools import partial

from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8

from nanogpt.data.batches import RowOrder, Rows, train_batch
from nanogpt.data.canonical import impossible_next
from nanogpt.data.tokenizer import TOKENIZERS, load_tokenizer
from nanogpt.data.validation import ValidationRows
from nanogpt.devices.mesh import BATCH, REPLICATED, ROWS, put
from nanogpt.training.plan import Plan


class Inputs:
    """The batches of a run, with the same rows for any number of devices and micro-batches.

    Raises ShardError if the shards have no row for some stage, or too few validation tokens.
    """

    def __init__(self, plan: Plan, mesh: Mesh):
        hp = plan.hp
        self._mesh = mesh
        self._order = RowOrder(partial(_rows, plan), hp.schedule, hp.shuffle)
        self._order(hp.num_steps)  # checks that the shards have rows for every stage
        self._validation = [
            ValidationRows(
                [*plan.dataset.val_files],
                stage.row_length,
                hp.val_tokens,
                hp.model.vocab_size,
                separator=hp.model.document_separator,
                context=stage.used_model.reach(stage.row_length),
            )
            for stage in plan.stages
        ]
        self.impossible: UInt8[Array, "V V8"] | None = None  # ids in validation, see canonical.py
        if hp.canonical_masking:
            table = impossible_next(load_tokenizer(hp.tokenizer), hp.model.padded_vocab_size)
            self.impossible = put(mesh, REPLICATED, table.shape, table.__getitem__)

    def batch(self, plan: Plan, step: int) -> Int[Array, "Ng R T1"]:
        """Return the batch of a step, in rows of T1 = T + 1 tokens and the plan's micro-batches."""
        stage = plan.hp.schedule.stage(step)
        rows, number = self._order(step)
        Ng, R = plan.shape(stage)
        shape = Ng, R, plan.stages[stage].row_length + 1
        return put(self._mesh, BATCH, shape, partial(train_batch, rows, number, (Ng, R)))

    def validation(self, plan: Plan, stage: int) -> Iterator[Int[Array, "R T1"]]:
        """Yield the validation batches, in rows of a stage's length."""
        rows, (_, R) = self._validation[stage], plan.shape(stage)
        for first in range(0, len(rows), R):
            shape = R, plan.stages[stage].row_length + 1
            yield put(self._mesh, ROWS, shape, partial(rows, first, R))


def _rows(plan: Plan, T: int, most: int | None, start: int) -> Rows:
    """Return the training rows of T + 1 tokens, starting at an offset in the data.

    `most` is a stage's limit to the tokens of a document, if it has one.
    """
    hp = plan.hp
    longest = hp.max_document_length
    return Rows(
        [*plan.dataset.train_files],
        T,
        hp.seed,
        hp.shuffle,
        hp.model.vocab_size,
        separator=TOKENIZERS[hp.tokenizer].separator,
        max_document=longest and min(longest, most or longest),
        start=start,
    )
