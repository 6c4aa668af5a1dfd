"""The presets of GPT-2's sizes: parameters, cost, and learning rates at other widths."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nanogpt.adam import Adam
from nanogpt.devices.hardware import flops_per_token, training_flops
from nanogpt.devices.mesh import make_mesh
from nanogpt.training.plan import optimizer_of
from nanogpt.training.step import graph_of, init_params, param_shapes
from train_gpt import PRESETS, at_width

SIZES = {  # layers, heads, width: Radford et al., 2019, table 2; heads: OpenAI's hparams.json
    "baseline": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
PUBLISHED = {  # numbers in the checkpoints that OpenAI released
    "baseline": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
V = 50304  # GPT-2's 50257 in a multiple of 128


def counts(model):
    """Return the size of each parameter, from shapes only."""
    params = param_shapes(model)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(key.key for key in path): leaf.size for path, leaf in leaves}


@pytest.mark.parametrize("name", SIZES)
def test_every_piece_has_as_many_parameters_as_its_closed_form(name):
    L, _, D = SIZES[name]
    F = 4 * D
    assert counts(PRESETS[name].model) == {
        "embed": V * D,
        "head": D * V,
        "attention.qkv": L * 3 * D * D,
        "attention.out": L * D * D,
        "mlp.up": L * D * F,
        "mlp.down": L * F * D,
        "attention.own_share": L,
        "attention.mixed_share": L,
        "residual_shares": L,
        "embedding_shares": L,
        "skips": L // 2,
    }


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("baseline", 162_201_654),
        ("gpt2-medium", 405_012_588),
        ("gpt2-large", 836_567_202),
        ("gpt2-xl", 1_635_533_016),
    ],
)
def test_the_totals_differ_from_gpt2s_by_what_the_architectures_differ_in(name, total):
    L, _, D = SIZES[name]
    of_gpt2 = {
        "tokens": 50257 * D,
        "positions": 1024 * D,
        "matrices": L * 12 * D * D,
        "biases": L * (3 * D + D + 4 * D + D),  # of qkv, out, up, down
        "norms": L * 2 * 2 * D + 2 * D,  # gains and biases, two in each layer and one at the end
    }
    assert sum(of_gpt2.values()) == PUBLISHED[name]
    without = sum(of_gpt2[each] for each in ("positions", "biases", "norms"))
    with_more = (V - 50257) * D + D * V + 4 * L + L // 2  # padding, a head of its own, scalars
    assert sum(counts(PRESETS[name].model).values()) == total
    assert PUBLISHED[name] - without + with_more == total


@pytest.mark.parametrize("name", SIZES)
def test_flops_are_those_of_palm_and_of_chinchilla_but_for_what_is_masked_or_looked_up(name):
    (L, _, D), T = SIZES[name], 1024
    found = flops_per_token(PRESETS[name].model, T)
    # 6 N and 12 L H Q T (Chowdhery et al., arXiv:2204.02311, appendix B); a query sees (T + 1) / 2
    # keys of a row on average, not all T.
    N = 12 * L * D * D + D * V
    masked = T - (T + 1) / 2
    assert found == 6 * N + 12 * L * D * T - 12 * L * D * masked
    # Hoffmann et al. (arXiv:2203.15556, appendix F), for a row, forward; backward is twice that.
    attention = 2 * T * 3 * D * D + 2 * T * T * D + 2 * T * T * D + 2 * T * D * D
    dense = 2 * T * (D * 4 * D + 4 * D * D)
    embeddings = 2 * T * V * D  # one for tokens, which are looked up here, and one for logits
    chinchilla = 3 * (L * (attention + dense) + embeddings) / T
    assert found == chinchilla - 12 * L * D * masked
    # Attention at this length is a small part of it: the usual 6 N is 3% to 8% too low.
    assert 1.03 < found / (6 * N) < 1.08


def test_the_flops_of_a_run_are_those_of_its_tokens_in_each_stage():
    hp = PRESETS["speedrun"]
    tokens = {0: 425 * 131_072, 1: 425 * 262_144, 2: 425 * 393_216, 3: 15 * 393_216}
    each = {
        stage: count * flops_per_token(hp.schedule.model(hp.model, stage), 16_384)
        for stage, count in tokens.items()
    }
    assert training_flops(hp.model, hp.schedule, 1290) == pytest.approx(sum(each.values()))
    assert training_flops(hp.model, hp.schedule, 425 + 85) == pytest.approx(each[0] + each[1] / 5)


@pytest.mark.parametrize("name", [name for name in SIZES if name != "baseline"])
def test_a_larger_preset_is_the_baseline_but_for_size_length_and_the_rate_of_its_head(name):
    hp, base, (L, N, D) = PRESETS[name], PRESETS["baseline"], SIZES[name]
    hp.check()
    assert hp.model == replace(
        base.model,
        num_layers=L,
        num_heads=N,
        width=D,
        mlp_width=4 * D,
        attention_scale=pytest.approx(1 / 8),  # heads of 64 as in GPT-2
    )
    assert hp.adam == replace(
        base.adam, head=Adam(pytest.approx(0.008 * 768 / D), base.adam.embedding.betas)
    )
    same = {"model": base.model, "adam": base.adam, "preset": "baseline"}
    assert replace(hp, num_steps=base.num_steps, **same) == base
    # Once through FineWeb10B: 103 shards of 100 million tokens at most.
    assert 0.9 < hp.num_steps * hp.total_batch_size / 10e9 < 1.03


# The rates at other widths

SMALL = replace(
    PRESETS["baseline"],
    dtype="float32",
    model=replace(
        PRESETS["baseline"].model,
        vocab_size=100,
        num_layers=1,
        num_heads=2,
        width=32,
        mlp_width=128,
    ),
)


@partial(jax.jit, static_argnums=0)
def moved(width, head_times):
    """Return the RMS changes of features and logits over the tokens in three steps."""
    hp = at_width(SMALL, 1, width // 16, width)
    head = replace(hp.adam.head, learning_rate=head_times * hp.adam.head.learning_rate)
    hp = replace(hp, adam=replace(hp.adam, head=head))
    optimizer, graph = optimizer_of(hp, make_mesh(1)), graph_of(hp.model)
    rows = np.random.default_rng(0).integers(0, 100, (4, 33))

    def outputs(params):
        model = nnx.merge(graph, params)
        features = model.features(rows[:, :-1])
        return features, model.logits(features)

    def step(now, _):
        params, state = now
        loss = lambda p: nnx.merge(graph, p).loss(rows[:, :-1], rows[:, 1:])[0].mean()  # noqa: E731
        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params, rate=1.0, momentum=0.9)
        return (optax.apply_updates(params, updates), state), None

    first = init_params(hp.model, jax.random.key(0))
    (last, _), _ = jax.lax.scan(step, (first, optimizer.init(first)), length=3)
    pairs = zip(outputs(first), outputs(last), strict=True)
    return [jnp.sqrt(jnp.mean((b - a) ** 2)) for a, b in pairs]


def test_steps_move_features_and_logits_as_far_at_four_times_the_width():
    narrow, wide = moved(32, 1.0), moved(128, 1.0)
    assert np.array(wide) == pytest.approx(np.array(narrow), rel=0.3)
    assert min(narrow) > 0.1
    # With the narrow head's rate, the wide head's logits change far too much.
    assert moved(128, 4.0)[1] > 2 * narrow[1]
