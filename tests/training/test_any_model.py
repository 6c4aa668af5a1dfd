"""Any model that is accepted can be trained, saved, resumed, exported and sampled from."""

import random
from dataclasses import replace

import jax
import numpy as np
import pytest

from nanogpt.config import ConfigError, GPTConfig
from nanogpt.data.tokenizer import ByteTokenizer
from nanogpt.devices.mesh import BATCH, REPLICATED, make_mesh, shapes_on
from nanogpt.inference.export import save_model
from nanogpt.inference.sampling import Sampling
from nanogpt.inference.text import write
from nanogpt.inference.weights import load_model
from nanogpt.training.checkpoint import load_state, newest_checkpoint
from nanogpt.training.plan import optimizer_of
from nanogpt.training.saving import Checkpoints
from nanogpt.training.step import graph_of, make_init, make_train_step
from train_gpt import PRESETS


def some_settings(seed):
    """Draw settings of a small model until they are accepted.

    The first has a single layer, and those of odd seeds dynamic connections.
    """
    draw = random.Random(seed)
    while True:
        L, N = draw.choice((1, 3)) if seed else 1, draw.choice((1, 2, 3))

        def some(*layers, draw=draw):
            return tuple(layer for layer in layers if draw.random() < 0.3)

        dynamic = seed % 2 == 1
        pairs = [(a, b) for b in range(L) for a in range(b)]
        own = draw.choice(((), tuple(draw.sample(range(L), draw.randint(1, L)))))
        model = GPTConfig(
            vocab_size=draw.choice((256, 300)),
            num_layers=L,
            num_heads=N,
            width=4 * N * draw.choice((1, 2, 3)),
            mlp_width=draw.choice((1, 5, 16)),
            mlp_only=some(*range(L)),
            windows=draw.choice(((), (1,), (2, 0), (0,))),
            document_separator=draw.choice((None, 255)),
            value_embeddings=len(own) or draw.randint(0, L),
            value_layers=own,
            value_gate=draw.random() < 0.5,
            bigram_buckets=draw.choice((0, 1, 7)),
            bigram_width=draw.choice((None, 1, 4)),  # 4 can be all channels
            smear=draw.random() < 0.5,
            attention_gate=draw.random() < 0.5,
            attention_out_init=draw.choice((0.0, 0.5)),
            attention_source=draw.choice((None, *range(L))),
            skips=draw.choice((None, (), some(*pairs))),
            key_offset=some(*range(-L, L)),
            paired_heads=some(*range(-L, L)),
            exclusive=some(*range(-L, L)) if dynamic else (),
            gated=some(*range(-L, L)) if dynamic else (),
            composed=some(*range(-L, L)) if dynamic else (),
            composed_window=draw.choice((1, 2, 112)),
            backout=draw.choice((None, 0, L - 1)),
            dynamic=dynamic,
            tied_head=draw.random() < 0.5,
            rope_fraction=draw.choice((0.0, 0.5, 1.0)),
        )
        start = PRESETS["laptop"]
        adam = replace(start.adam, head=start.adam.embedding) if model.tied_head else start.adam
        hp = replace(
            start,
            adam=adam,
            adam_every=draw.choice((1, 2)),
            neuron_decay=draw.choice((None, 0.9)),
            heads_together=draw.choice((None, 1, N)),
            sequence_length=draw.choice((1, 2, 8)),
            model=model,
        )
        try:
            hp.check()
        except ConfigError:
            continue
        return hp


@pytest.mark.parametrize("seed", [0, 24, 27, 37])  # together they have nearly every choice
def test_a_model_that_is_accepted_can_be_trained_saved_resumed_exported_and_sampled(seed, tmp_path):
    """Training is only traced, for its shapes; the saved state is random, compared bit for bit."""
    hp, mesh, draw = some_settings(seed), make_mesh(1), np.random.default_rng(seed)
    optimizer, graph = optimizer_of(hp, mesh), graph_of(hp.model)
    shapes = jax.eval_shape(make_init(hp.model, optimizer, mesh), jax.random.key(0))
    batch = jax.ShapeDtypeStruct((1, 2, hp.sequence_length + 1), np.int32)
    step = make_train_step(graph, optimizer, mesh, hp.dtype, tied_head=hp.model.tied_head)
    trained, _ = jax.eval_shape(step, shapes, shapes_on(mesh, BATCH, batch), hp.schedule.rates(1))
    assert kinds(trained) == kinds(shapes)

    def drawn(s):
        bits = draw.integers(0, 0x7F800000, s.size, dtype=np.int32)  # of any finite float32
        return jax.device_put(bits.view(s.dtype).reshape(s.shape))

    state, run, out = jax.tree.map(drawn, shapes), tmp_path / "run", tmp_path / "exported"
    state = replace(state, step=jax.numpy.int32(7))
    run.mkdir()
    with Checkpoints(run, 1, pytest.fail) as checkpoints:
        checkpoints.save(state, {})
    loaded = load_state(newest_checkpoint(run, pytest.fail), shapes_on(mesh, REPLICATED, shapes))
    assert bits(loaded) == bits(state)

    settings = {name: getattr(hp, name) for name in ("tokenizer", "sequence_length", "dtype")}
    settings["from"] = {"run": "a", "step": 7, "tokens": 70}
    save_model(out, hp.model, state.params, settings, {})
    _, exported, params, _ = load_model(out, mesh)
    assert bits(params) == bits(state.params)
    if seed in (0, 27):  # a program is compiled for it
        zeros, texts = jax.tree.map(np.zeros_like, params), ["ab", ""]
        how = {"num_tokens": 3, "context": hp.sequence_length, "sampling": Sampling()}
        assert len([*write(exported, zeros, ByteTokenizer(), texts, **how)]) == 3 * len(texts)


def kinds(state):
    return jax.tree.map(lambda a: (a.shape, a.dtype), state)


def bits(tree):
    return [(str(k), np.asarray(a).tobytes()) for k, a in jax.tree.leaves_with_path(tree)]
