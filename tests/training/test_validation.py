"""The loss of validation tokens in documents longer than a row."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from nanogpt.data.shards import write_shard
from nanogpt.data.validation import ValidationRows
from nanogpt.devices.mesh import make_mesh
from nanogpt.training.step import graph_of, make_eval_step
from nanogpt.training.validation import validation_loss
from tests.conftest import with_every_trick
from tests.model.test_gpt import alive
from tests.run_folders import mean_loss

SEPARATOR, T = 99, 192
LENGTHS = 500, 30, 40, 250, 3  # of documents


def test_a_token_far_into_a_document_has_the_loss_of_a_pass_of_the_whole_document(tmp_path):
    # Three attentions with windows of at most 24, and what else reads a few earlier tokens, see
    # less than 96 tokens back.
    config = replace(with_every_trick(), document_separator=SEPARATOR)
    params = jax.device_put(alive(config))
    random = np.random.default_rng(0)
    documents = [np.r_[SEPARATOR, random.integers(0, 99, n - 1)] for n in LENGTHS]
    tokens = np.concatenate(documents)
    shard, graph = tmp_path / "val.bin", graph_of(config)
    write_shard(shard, np.r_[tokens, SEPARATOR].astype(np.uint16))
    whole = mean_loss(graph, params, shard, len(tokens), max(LENGTHS), SEPARATOR)
    eval_step = make_eval_step(graph, make_mesh(1), "float32")
    for context, is_whole in ((96, True), (8, False)):
        rows = ValidationRows([shard], T, len(tokens), separator=SEPARATOR, context=context)
        batches = (rows(first, 2) for first in range(0, len(rows), 2))
        found = validation_loss(eval_step, params, batches, len(tokens))
        assert bool(found == pytest.approx(whole, rel=1e-6)) is is_whole
