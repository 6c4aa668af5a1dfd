"""The loss of validation tokens in documents longer than a row."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from nanogpt.data.shards import write_shard
from nanogpt.data.validation import ValidationRows
from nanogpt.devices.mesh import make_mesh
from nanogpt.training.step import graph_of, make_eval_step
from nanogpt.training.validation import validation_loss
from tests.conftest import with_every_trick
from tests.model.test_gpt import alive, build

SEPARATOR, T = 99, 192
LENGTHS = 500, 30, 40, 250, 3  # of documents


@pytest.mark.parametrize(("context", "is_whole"), [(96, True), (8, False)])
def test_a_token_far_into_a_document_has_the_loss_of_a_pass_of_the_whole_document(
    context, is_whole, tmp_path
):
    # Three attentions with windows of at most 24, and what else reads a few earlier tokens, see
    # less than 96 tokens back.
    config = replace(with_every_trick(), document_separator=SEPARATOR)
    params = jax.tree.map(jnp.asarray, alive(config))
    random = np.random.default_rng(0)
    documents = [np.r_[SEPARATOR, random.integers(0, 99, n - 1)] for n in LENGTHS]
    tokens = np.concatenate(documents)
    write_shard(tmp_path / "val.bin", np.r_[tokens, SEPARATOR].astype(np.uint16))
    rows = ValidationRows(
        [tmp_path / "val.bin"], T, len(tokens), separator=SEPARATOR, context=context
    )
    eval_step = make_eval_step(graph_of(config), make_mesh(1), "float32")
    batches = (rows(first, 2) for first in range(0, len(rows), 2))
    found = validation_loss(eval_step, params, batches, len(tokens))

    logits_of = jax.jit(lambda document: build(config, params)(document[None])[0])
    expected = 0.0
    for document, following in zip(documents, [*documents[1:], [SEPARATOR]], strict=True):
        # Padded to avoid other compilations: tokens see only earlier ones.
        padded = np.pad(document, (0, max(LENGTHS) - len(document)))
        logits = np.asarray(logits_of(padded), np.float64)
        targets = np.r_[document[1:], following[0]]
        expected += logsumexp(logits[: len(document)], axis=1).sum()
        expected -= logits[np.arange(len(document)), targets].sum()
    assert bool(found == pytest.approx(expected / len(tokens), rel=1e-6)) is is_whole
