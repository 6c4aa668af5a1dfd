"""Training steps: the same on any number of devices, one reduction, and learning to the limit."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from nanogpt.adam import AdamGroups
from nanogpt.config import GPTConfig
from nanogpt.devices.mesh import BATCH, ROWS, make_mesh, put
from nanogpt.devices.sharding import shardings
from nanogpt.optim.groups import make_optimizer
from nanogpt.schedule import Rates
from nanogpt.training.step import (
    graph_of,
    make_eval_step,
    make_init,
    make_train_step,
    param_shapes,
)

CONFIG = GPTConfig(
    vocab_size=100,
    num_layers=2,
    num_heads=2,
    width=16,
    mlp_width=32,
    windows=(8, 0),
    value_embeddings=1,
    bigram_buckets=64,
)
T, ROWS_PER_STEP, STEPS = 16, 8, 5
RATES = [Rates(*np.float32((1.0 - 0.1 * step, 0.85 + 0.02 * step))) for step in range(STEPS)]


def some_optimizer(**how):
    return make_optimizer(
        learning_rate=0.05,
        weight_decay=1.0,
        adam=AdamGroups.alike(tables=0.15, head=0.008, others=0.04, betas=(0.8, 0.95)),
        **how,
    )


def some_rows(steps=STEPS, seed=0):
    """Return batches that can be learned: each token is followed by one of two."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, CONFIG.vocab_size, (steps, ROWS_PER_STEP, T + 1), np.int32)
    for t in range(T):
        rows[..., t + 1] = (3 * rows[..., t] + rows[..., t + 1] % 2) % CONFIG.vocab_size
    return rows


def placed(mesh, spec, array):
    return put(mesh, spec, array.shape, lambda index: array[index])


def batch_of(rows):
    """Return these rows as two micro-batches on four devices."""
    return placed(make_mesh(4), BATCH, rows.reshape(2, 4, T + 1))


@cache
def first_state(config=CONFIG):
    """Return the state before the first step, as NumPy arrays."""
    return jax.device_get(make_init(config, some_optimizer(), make_mesh(1))(jax.random.key(0)))


def state_on(mesh, state, shard_params=False):
    """Return a copy of a state on a mesh, which a step may consume."""
    places = shardings(jax.eval_shape(lambda: state), mesh, shard_params)
    return jax.device_put(state, places, may_alias=False)


@cache
def step_on(devices, dtype, skip_spikes):
    return make_train_step(
        graph_of(CONFIG), some_optimizer(), make_mesh(devices), dtype, skip_spikes
    )


@cache
def train(devices=1, micro_batches=1, dtype="float32", target_weights=(1.0,)):
    """Return the metrics of every step, and every state."""
    mesh, train_step = make_mesh(devices), step_on(devices, dtype, 0.0)
    states = [state_on(mesh, first_state())]
    metrics = []
    for rows, rates in zip(some_rows(), RATES, strict=True):
        batch = rows.reshape(micro_batches, -1, T + 1)
        rates = rates._replace(target_weights=target_weights)
        state, found = train_step(states[-1], placed(mesh, BATCH, batch), rates)
        states.append(state)
        metrics.append((float(found["loss"]), float(found["grad_norm"])))
    return np.array(metrics), states


@cache
def plain_step(config):
    """Return a step on one device as in a textbook, jitted: no mesh, no accumulation."""
    optimizer, graph = some_optimizer(), graph_of(config)

    def objective_and_loss(params, rows, target_weights):
        log_p = jax.nn.log_softmax(nnx.merge(graph, params)(rows[:, :-1]))

        def summed(ahead):  # the loss of targets this far ahead, as far as they are in the row
            predicting = log_p[:, : T + 1 - ahead]
            return -jnp.take_along_axis(predicting, rows[:, ahead:, None], axis=-1).sum()

        sums = [weight * summed(k) for k, weight in enumerate(target_weights, start=1)]
        tokens = rows.shape[0] * T
        return sum(sums) / tokens, summed(1) / tokens

    @jax.jit
    def step(params, state, rows, rates):
        grad = jax.value_and_grad(objective_and_loss, has_aux=True)
        (_, loss), gradients = grad(params, rows, rates.target_weights)
        summed = jax.tree.map(lambda g: g * (rows.shape[0] * T), gradients)
        updates, state = optimizer.update(
            summed, state, params, rate=rates.rate, momentum=rates.momentum
        )
        norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)) ** 0.5
        return optax.apply_updates(params, updates), state, (loss, norm)

    return step


@cache
def train_plainly(target_weights=(1.0,), config=CONFIG):
    """Return the metrics of every step of a textbook."""
    params, state, metrics = first_state(config).params, first_state(config).opt_state, []
    weights = (*target_weights, 0.0, 0.0)[:3]  # one program for all
    for rows, rates in zip(some_rows(), RATES, strict=True):
        rates = rates._replace(target_weights=weights)
        params, state, found = plain_step(config)(params, state, rows, rates)
        metrics.append([float(x) for x in found])
    return np.array(metrics)


@pytest.fixture(scope="module")
def plain():
    return train_plainly()


@pytest.fixture(scope="module")
def in_bfloat16():
    return train(dtype="bfloat16", micro_batches=2)


# One program on any number of devices


SEVERAL = (1.0, 0.5, 0.25)  # weights of targets


@pytest.mark.parametrize(
    ("devices", "micro_batches", "target_weights"), [(8, 1, SEVERAL), (4, 2, (1.0,))]
)
def test_devices_and_micro_batches_change_neither_losses_nor_gradients(
    devices, micro_batches, target_weights
):
    metrics, _ = train(devices, micro_batches, target_weights=target_weights)
    np.testing.assert_allclose(metrics, train_plainly(target_weights), rtol=1e-5)
    # A new model knows nothing; the loss is that of one target.
    assert metrics[0, 0] == pytest.approx(np.log(128), rel=1e-6)
    assert np.ptp(metrics[:, 0]) > 0.1  # and the steps changed something


def test_another_objective_has_other_gradients_and_leads_to_other_parameters():
    one, several = train_plainly(), train(8, 1, target_weights=SEVERAL)[0]
    assert abs(several[0, 1] / one[0, 1] - 1) > 0.1
    assert abs(several[-1, 0] - one[-1, 0]) > 1e-3


def test_a_tied_head_stays_the_embedding_and_learns_by_the_sum_of_both_gradients():
    config, mesh = replace(CONFIG, tied_head=True), make_mesh(1)
    adam = AdamGroups.alike(tables=0.01, head=0.01, others=0.0, betas=(0.8, 0.95))
    optimizer = make_optimizer(learning_rate=0.0, weight_decay=0.0, adam=adam)
    embed = 0.005 * first_state().params["embed"]
    first = first_state().params | {"embed": embed, "head": embed.T}
    state = state_on(mesh, replace(first_state(), params=first))
    step = make_train_step(graph_of(config), optimizer, mesh, "float32", tied_head=True)
    tables = [embed]
    for rows, rates in zip(some_rows(steps=3), RATES[:1] * 3, strict=True):
        state, _ = step(state, rows[None], rates)
        tables.append(np.asarray(state.params["embed"]))
        np.testing.assert_array_equal(state.params["head"], tables[-1].T)

    def loss(table):  # of a model that has one table for both
        others = jax.tree.map(jnp.asarray, first)
        model = nnx.merge(graph_of(config), others | {"embed": table, "head": table.T})
        rows = jnp.asarray(some_rows()[0])
        return model.loss(rows[:, :-1], rows[:, 1:])[0].sum()

    # Adam's first step depends only on the gradient's sign.
    gradient = np.asarray(jax.jit(jax.grad(loss))(embed))
    clear = np.abs(gradient) > 1e-5
    assert clear.mean() > 0.7
    expected = -0.01 * np.sign(gradient)
    np.testing.assert_allclose((tables[1] - tables[0])[clear], expected[clear], rtol=1e-2)


def test_the_first_state_is_the_same_to_the_bit_on_any_number_of_devices():
    init = make_init(CONFIG, some_optimizer(), make_mesh(8))
    one, eight, other = first_state(), init(jax.random.key(0)), init(jax.random.key(1))
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_array_equal(a, b)
        large = getattr(path[-1], "key", None) in ("embed", "value_embed", "bigram_embed", "head")
        assert b.addressable_shards[0].data.size == b.size // (8 if large else 1), path
    assert np.any(one.params["embed"] != np.asarray(other.params["embed"]))


@pytest.mark.parametrize(
    "how",
    [
        {"num_layers": 1},
        {"num_layers": 1, "value_embeddings": 0, "bigram_buckets": 0, "smear": False},
        {"mlp_only": (0,), "attention_gate": False},
        {"paired_heads": (0,), "key_offset": (1,), "backout": 0},
    ],
)
def test_no_array_of_the_state_is_empty(how):
    # Orbax cannot save one.
    init = make_init(replace(CONFIG, **how), some_optimizer(), make_mesh(1))
    state = jax.eval_shape(init, jax.random.key(0))
    assert all(leaf.size for leaf in jax.tree.leaves(state))


def test_the_first_state_has_the_types_of_later_ones_so_a_step_is_compiled_once():
    init = make_init(CONFIG, some_optimizer(), make_mesh(1))
    state = jax.eval_shape(init, jax.random.key(0))
    later = train(4, 2)[1][-1]
    types = [[(x.dtype, x.weak_type) for x in jax.tree.leaves(each)] for each in (state, later)]
    assert types[0] == types[1]


# One reduction per step

COLLECTIVE = re.compile(
    r"= (?P<type>.+?) (?P<op>all-reduce|all-gather|all-to-all|reduce-scatter|ragged-all-to-all"
    r"|collective-permute|collective-broadcast)(-start)?\("
)


def computations(hlo):
    """Return the lines of each computation of a compiled program, by name."""
    found, lines = {}, None
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            lines = found[header[1]] = []
        elif lines is not None:
            lines.append(line)
    return found


def called_by(name, program):
    """Return a computation and all that it calls, directly or indirectly."""
    reached, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            calls = re.findall(r"\w+=\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)", "\n".join(program[name]))
            names = [called.strip(" %") for call in calls for called in call.split(",")]
            waiting += [called for called in names if called in program]
    return reached


def collectives(compiled):
    """Return (operation, number of elements) of the collectives inside loops, and outside."""
    program = computations(compiled.as_text())
    everything = [line for lines in program.values() for line in lines]
    loops = [re.search(r"body=%?([\w.\-]+)", line)[1] for line in everything if " while(" in line]
    assert loops, "the accumulation loop is not there to be looked into"
    inside = set().union(*(called_by(body, program) for body in loops))

    def found_in(names):
        return [
            (
                match["op"],
                sum(
                    int(np.prod([int(n) for n in dims.split(",") if n]))
                    for dims in re.findall(r"\[([\d,]*)\]", match["type"])
                ),
            )
            for name in names
            for line in program[name]
            if (match := COLLECTIVE.search(line))
        ]

    return found_in(inside), found_in(program.keys() - inside)


@cache
def compiled():
    """A step on four devices, compiled before there are rates, with a batch and a state for it."""
    batch, state = batch_of(some_rows(1)), state_on(make_mesh(4), first_state())
    rates = Rates(*[jax.ShapeDtypeStruct((), jnp.float32)] * 2)
    return step_on(4, "float32", 0.0).lower(state, batch, rates).compile(), batch, state


def test_devices_reduce_each_gradient_once_per_step_and_not_in_the_accumulation_loop():
    program, _, state = compiled()
    inside, outside = collectives(program)
    assert inside == []
    # However XLA groups them into operations, as many numbers are reduced as there are parameters,
    # plus one loss and the four parts of a norm. Embeddings and head are sharded.
    sent = Counter()
    for operation, size in outside:
        sent[operation] += size
    assert set(sent) == {"all-reduce", "reduce-scatter", "all-gather"}
    sizes = {path[-1].key: p.size for path, p in jax.tree.leaves_with_path(state.params)}
    sharded = sum(sizes[name] for name in ("embed", "value_embed", "bigram_embed", "head"))
    whole = sum(p.size for p in jax.tree.leaves(state.params)) - sharded
    assert sent["all-gather"] == 4 * sent["reduce-scatter"] == sharded
    assert 0 < sent["all-reduce"] - whole - 1 <= 4


def test_one_program_serves_all_rates():
    program, batch, _ = compiled()
    params = first_state().params
    state = replace(first_state(), params=params | {"head": params["embed"].T})

    def moved(rate, momentum):
        """Return the change of the parameters, and Muon's momentum after the first gradient."""
        after, _ = program(state_on(make_mesh(4), state), batch, Rates(rate, momentum))
        after = jax.device_get(after)
        moves = jax.tree.map(np.subtract, after.params, state.params)
        return moves, optax.tree.get(after.opt_state, "momentum")["mlp"]["down"]

    (full, at_09), (quarter, _), (nothing, at_06) = (
        moved(1.0, 0.9),
        moved(0.25, 0.9),
        moved(0.0, 0.6),
    )
    for name in ("head", "embed"):
        assert np.any(full[name])
        np.testing.assert_allclose(quarter[name], 0.25 * full[name], atol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))
    assert np.any(at_09)
    np.testing.assert_allclose(at_06, 4 * at_09, rtol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_a_collective_in_a_loop_would_be_noticed(nested):
    # What the test above searches for, added on purpose.
    def body(total, x):
        if nested:
            return total + jax.lax.cond(x[0] > 0, lambda: jax.lax.psum(x, "data"), lambda: x), None
        return total + jax.lax.psum(x, "data"), None

    def program(xs):
        total, _ = jax.lax.scan(body, jnp.zeros(6), xs)
        return jax.lax.psum(total, "data")

    summed = jax.shard_map(
        program, mesh=make_mesh(4), in_specs=P(None, "data"), out_specs=P(), check_vma=False
    )
    inside, outside = collectives(jax.jit(summed).lower(jnp.ones((8, 24))).compile())
    assert inside == outside == [("all-reduce", 6)]


# Precision and memory


def test_bfloat16_trains_like_float32(plain, in_bfloat16):
    losses = in_bfloat16[0][:, 0]
    np.testing.assert_allclose(losses, plain[:, 0], rtol=1e-3)
    assert np.abs(losses / plain[:, 0] - 1).max() > 5e-6  # and it is not float32


def test_weights_and_the_state_of_the_optimizer_stay_float32(in_bfloat16):
    state = in_bfloat16[1][-1]
    assert state.step == STEPS
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        assert leaf.dtype in (jnp.float32, jnp.int32), jax.tree_util.keystr(path)


def test_a_step_consumes_its_state(in_bfloat16):
    *before, after = in_bfloat16[1]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


# Bad numbers


def same(one, other):
    """Return whether two states have the same parameters and the same state of the optimizer."""
    held = [jax.tree.leaves((state.params, state.opt_state)) for state in (one, other)]
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*held, strict=True))


@pytest.mark.parametrize("harm", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_neither_parameters_nor_optimizer(harm):
    train_step, mesh, rows = step_on(4, "float32", 0.0), make_mesh(4), some_rows()
    state, metrics = train_step(state_on(mesh, first_state()), batch_of(rows[0]), RATES[0])
    assert metrics["applied"]
    before = jax.device_get(state)
    if harm == "loss":  # a NaN in the row of one token
        embed = before.params["embed"].copy()
        embed[rows[1, 0, 0]] = np.nan
        params = before.params | {"embed": embed}
    else:  # the MLPs' output is huge, but multiplied by zero: only the gradient is affected
        mlp = {"up": 1e14 * before.params["mlp"]["up"]}
        mlp["down"] = np.zeros_like(before.params["mlp"]["down"])
        params = before.params | {"mlp": mlp}
    before = replace(before, params=params)
    state, metrics = train_step(state_on(mesh, before), batch_of(rows[1]), RATES[1])
    assert np.isfinite(metrics["loss"]) == (harm == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    assert not metrics["applied"]
    assert same(state, before)
    assert state.step == 2
    assert np.isfinite(state.loss_mean) and np.isfinite(state.loss_variance)


def test_a_spike_is_measured_and_skipped_only_where_that_was_asked_for():
    mesh, taking, skipping = make_mesh(4), *(step_on(4, "float32", most) for most in (0.0, 2.0))
    state, losses = state_on(mesh, first_state()), []
    for rows in some_rows(59, seed=3):
        state, metrics = skipping(state, batch_of(rows), Rates(*np.float32((1.0, 0.95))))
        losses.append(float(metrics["loss"]))
        assert metrics["applied"]
    mean, variance = losses[0], 0.0
    for loss in losses[1:]:  # exponentially weighted, by the textbook
        mean, variance = (
            0.95 * mean + 0.05 * loss,
            0.95 * (variance + 0.05 * (loss - mean) ** 2),
        )
    before = jax.device_get(state)
    foreign = np.random.default_rng(9).integers(0, CONFIG.vocab_size, (ROWS_PER_STEP, T + 1))
    for train_step, applied in ((taking, True), (skipping, False)):
        state = state_on(mesh, before)
        after, metrics = train_step(state, batch_of(foreign.astype(np.int32)), RATES[0])
        spike = (float(metrics["loss"]) - mean) / variance**0.5
        assert spike > 2.5
        np.testing.assert_allclose(metrics["spike"], spike, rtol=1e-3)
        assert metrics["applied"] == applied
        assert same(before, after) != applied


# Evaluation


def test_evaluation_sums_the_losses_of_all_targets_on_any_number_of_devices():
    shapes = param_shapes(CONFIG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, "f4"), shapes)
    rows = some_rows(1)[0]
    rows[5, 9:] = rows[6:] = -1  # the data end within the sixth row
    graph = graph_of(CONFIG)

    logits = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(
        params, np.maximum(rows[:, :-1], 0)
    )
    logits, targets = np.asarray(logits, "f8"), rows[:, 1:]
    V = CONFIG.padded_vocab_size
    impossible = rng.random((V, V)) < 0.3  # next ids, after each id
    table = np.packbits(impossible, axis=-1, bitorder="little")

    for devices, batch_size, mask in ((1, 4, table), (8, 8, None)):
        likelihoods = np.exp(logits)
        if mask is not None:
            likelihoods[impossible[np.maximum(rows[:, :-1], 0)]] = 0
        log_p = logits - np.log(likelihoods.sum(-1, keepdims=True))
        expected = sum(
            -log_p[row, t, target] for (row, t), target in np.ndenumerate(targets) if target >= 0
        )
        mesh = make_mesh(devices)
        eval_step = make_eval_step(graph, mesh, "float32")
        found = sum(
            float(eval_step(params, placed(mesh, ROWS, batch), mask))
            for batch in np.split(rows, 8 // batch_size)
        )
        assert found == pytest.approx(expected, rel=1e-5)


# Learning


def markov_chain(rng, rows, length, symbols=3):
    """Return rows of a second-order Markov source, and its probability of each next symbol.

    The first symbol of a row has none. The second has only one predecessor: its probability is a
    mean over the symbols that the stationary source may have produced before that.
    """
    source = np.random.default_rng(7).dirichlet(np.full(symbols, 0.5), (symbols, symbols))
    pair = np.full((symbols, symbols), symbols**-2.0)
    for _ in range(1000):
        pair = np.einsum("ab,abc->bc", pair, source)
    second = np.einsum("ab,abc->bc", pair, source) / pair.sum(axis=0)[:, None]

    starts = rng.choice(symbols**2, rows, p=pair.ravel())
    sequence = [starts // symbols, starts % symbols]
    probability = [second[sequence[0], sequence[1]]]
    for _ in range(length - 2):
        given = source[sequence[-2], sequence[-1]]
        following = (rng.random((rows, 1)) > given.cumsum(axis=1)[:, :-1]).sum(axis=1)
        probability.append(given[np.arange(rows), following])
        sequence.append(following)
    return np.stack(sequence, axis=1).astype(np.int32), np.stack(probability, axis=1)


def test_a_source_of_known_entropy_is_learned_to_within_2_percent_and_never_below_it():
    config = GPTConfig(
        vocab_size=3, num_layers=2, num_heads=2, width=32, mlp_width=64, value_embeddings=1
    )
    steps, rng = 200, np.random.default_rng(0)
    mesh, graph, optimizer = make_mesh(1), graph_of(config), some_optimizer()
    train_step = make_train_step(graph, optimizer, mesh, "float32")
    state = make_init(config, optimizer, mesh)(jax.random.key(0))
    batches, _ = markov_chain(rng, steps * 16, 25)
    for step, batch in enumerate(batches.reshape(steps, 1, 16, 25)):
        rates = Rates(min(1.0, 2 * (1 - step / steps)), min(0.95, 0.85 + step / 500))
        state, _ = train_step(state, placed(mesh, BATCH, batch), rates)

    # On new rows, compared with the source's own log-probabilities of these symbols. To be better,
    # a model would have to see what it predicts.
    rows, probability = markov_chain(rng, 512, 25)
    entropy = -np.log(probability).mean()
    total = make_eval_step(graph, mesh, "float32")(state.params, placed(mesh, ROWS, rows))
    loss = float(total) / probability.size
    assert entropy < loss < 1.02 * entropy, (entropy, loss)
