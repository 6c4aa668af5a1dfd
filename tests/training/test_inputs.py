"""The batches of a run, as its settings say, compared with rows cut from the raw file."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from nanogpt.data.dataset import Dataset, Shard
from nanogpt.data.shards import write_shard
from nanogpt.devices.mesh import make_mesh
from nanogpt.schedule import Stage
from nanogpt.training.inputs import Inputs
from nanogpt.training.plan import Hardware, make_plan
from tests.small_runs import some_documents
from train_gpt import PRESETS

T, SEPARATOR = 8, 255


@pytest.fixture
def batches(tmp_path):
    """Returns the tokens of each step of a run with these limits to documents, 2 rows a step."""
    file, laptop = tmp_path / "a.bin", PRESETS["laptop"]
    write_shard(file, some_documents(3000, seed=0))
    shard = Shard("a.bin", 3000, "0" * 32, None)
    data = Dataset("some", (file,), (file,), (shard,), (shard,))

    def of_run(limits, longest):
        hp = replace(
            laptop,
            **{"sequence_length": T, "total_batch_size": 2 * T, "batch_size": 2},
            **{"train_files": "a.bin", "val_files": "a.bin", "val_tokens": 8, "shuffle": False},
            num_steps=len(limits),
            stages=tuple(Stage(max_document_length=limit) for limit in limits),
            max_document_length=longest,
        )
        hp.check()
        plan = make_plan(hp, Hardware("cpu", 1, 1, None), data, "xla", "attention")
        inputs = Inputs(plan, make_mesh(1))
        return [np.asarray(inputs.batch(plan, step))[0] for step in range(1, len(limits) + 1)]

    return of_run, np.fromfile(file, "<u2")[512:]


def rows_of(documents, limit, count):
    """Return rows of beginnings of documents, and how many documents they took."""
    rows, taken = [[]], 0
    while len(rows) <= count:
        rows[-1] += documents[taken][:limit]
        taken += 1
        if len(rows[-1]) > T:
            rows[-1] = rows[-1][: T + 1]
            rows.append([])
    return rows[:count], taken


def test_a_stages_limit_to_documents_counts_in_that_stage_if_it_is_less_than_the_runs(batches):
    run, tokens = batches
    found, start = run([3, None, 9, 4], longest=6), 0
    begins = [*np.flatnonzero(tokens == SEPARATOR), len(tokens)]
    documents = [tokens[begin:end].tolist() for begin, end in pairwise(begins)]
    for batch, limit in zip(found, (3, 6, 6, 4), strict=True):
        expected, taken = rows_of(documents[start:], limit, 2)
        assert batch.tolist() == expected
        start += taken  # the next stage goes on with the document after that


def test_a_run_that_uses_documents_whole_takes_plain_rows_in_every_stage(batches):
    run, tokens = batches
    found = np.concatenate(run([3, None, 9], longest=None))
    expected = [tokens[n : n + T + 1] for n in range(0, 6 * T, T)]
    np.testing.assert_array_equal(found, expected)
