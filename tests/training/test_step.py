"""Training steps: the same on any number of devices, one reduction, and learning to the limit."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache, partial

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
    TrainState,
    graph_of,
    init_params,
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


def some_optimizer():
    return make_optimizer(
        learning_rate=0.05,
        weight_decay=1.0,
        adam=AdamGroups.alike(tables=0.15, head=0.008, others=0.04, betas=(0.8, 0.95)),
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


@cache
def first_params(config=CONFIG):
    return jax.jit(lambda: init_params(config, jax.random.key(0)))()


@cache
def first_state(devices):
    return make_init(CONFIG, some_optimizer(), make_mesh(devices))(jax.random.key(0))


@jax.jit
def copied(state):
    """Return a copy, which a step may consume."""
    return jax.tree.map(jnp.copy, state)


@cache
def step_on(devices, dtype, skip_spikes):
    return make_train_step(
        graph_of(CONFIG), some_optimizer(), make_mesh(devices), dtype, skip_spikes
    )


def train(devices=1, micro_batches=1, dtype="float32", target_weights=(1.0,)):
    """Return the metrics of every step, and every state."""
    mesh, train_step = make_mesh(devices), step_on(devices, dtype, 0.0)
    states = [copied(first_state(devices))]
    metrics = []
    for rows, rates in zip(some_rows(), RATES, strict=True):
        batch = rows.reshape(micro_batches, -1, T + 1)
        rates = rates._replace(target_weights=target_weights)
        state, found = train_step(states[-1], placed(mesh, BATCH, batch), rates)
        states.append(state)
        metrics.append((float(found["loss"]), float(found["grad_norm"])))
    return np.array(metrics), states


@cache
def train_plainly(target_weights=(1.0,), config=CONFIG):
    """Make the same steps on one device as in a textbook: no mesh, no accumulation."""
    optimizer, graph = some_optimizer(), graph_of(config)

    def objective_and_loss(params, rows):
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
        (_, loss), gradients = grad(params, rows)
        summed = jax.tree.map(lambda g: g * (rows.shape[0] * T), gradients)
        updates, state = optimizer.update(
            summed, state, params, rate=rates.rate, momentum=rates.momentum
        )
        norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)) ** 0.5
        return optax.apply_updates(params, updates), state, (loss, norm)

    params = first_params(config)
    state, metrics = optimizer.init(params), []
    for rows, rates in zip(some_rows(), RATES, strict=True):
        params, state, found = step(params, state, rows, rates)
        metrics.append([float(x) for x in found])
    return np.array(metrics)


@pytest.fixture(scope="module")
def plain():
    return train_plainly()


@pytest.fixture(scope="module")
def in_bfloat16():
    return train(dtype="bfloat16", micro_batches=2)


# One program on any number of devices


@pytest.mark.parametrize(("devices", "micro_batches"), [(8, 1), (4, 2)])
def test_devices_and_micro_batches_change_neither_losses_nor_gradients(
    plain, devices, micro_batches
):
    metrics, _ = train(devices, micro_batches)
    np.testing.assert_allclose(metrics[:, 0], plain[:, 0], rtol=1e-5)
    np.testing.assert_allclose(metrics[:, 1], plain[:, 1], rtol=1e-5)
    assert metrics[0, 0] == pytest.approx(np.log(128), rel=1e-6)  # a new model knows nothing
    assert np.ptp(metrics[:, 0]) > 0.1  # and the steps changed something


def test_the_objective_is_minimized_and_the_loss_of_the_next_token_reported(plain):
    weights = (1.0, 0.5, 0.25)
    metrics, _ = train(devices=2, micro_batches=2, target_weights=weights)
    np.testing.assert_allclose(metrics, train_plainly(weights), rtol=1e-5)
    assert metrics[0, 0] == pytest.approx(np.log(128), rel=1e-6)  # of one target, not of three
    # Another objective has other gradients, and leads to other parameters.
    assert abs(metrics[0, 1] / plain[0, 1] - 1) > 0.1
    assert abs(metrics[-1, 0] - plain[-1, 0]) > 1e-3


def test_a_tied_head_stays_the_embedding_and_learns_by_the_sum_of_both_gradients():
    config, mesh = replace(CONFIG, tied_head=True), make_mesh(1)
    adam = AdamGroups.alike(tables=0.01, head=0.01, others=0.0, betas=(0.8, 0.95))
    optimizer = make_optimizer(learning_rate=0.0, weight_decay=0.0, adam=adam)
    first = jax.device_get(first_params(config))
    params = jax.tree.map(jnp.asarray, first)
    state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params), *jnp.zeros(2))
    state = jax.device_put(state, shardings(state, mesh, shard_params=False))
    step = make_train_step(graph_of(config), optimizer, mesh, "float32", tied_head=True)
    tables = [first["embed"]]
    for rows, rates in zip(some_rows(steps=3), RATES[:1] * 3, strict=True):
        state, _ = step(state, jnp.asarray(rows[None]), rates)
        np.testing.assert_array_equal(state.params["head"], state.params["embed"].T)
        tables.append(np.asarray(state.params["embed"]))

    def loss(table):  # of a model that has one table for both
        others = jax.tree.map(jnp.asarray, first)
        model = nnx.merge(graph_of(config), others | {"embed": table, "head": table.T})
        rows = jnp.asarray(some_rows()[0])
        return model.loss(rows[:, :-1], rows[:, 1:])[0].sum()

    # Adam's first step depends only on the gradient's sign.
    gradient = np.asarray(jax.jit(jax.grad(loss))(first["embed"]))
    clear = np.abs(gradient) > 1e-5
    assert clear.mean() > 0.7
    expected = -0.01 * np.sign(gradient)
    np.testing.assert_allclose((tables[1] - tables[0])[clear], expected[clear], rtol=1e-2)


def test_the_first_state_is_the_same_to_the_bit_on_any_number_of_devices():
    one, eight = first_state(1), first_state(8)
    other = jax.jit(partial(init_params, CONFIG))(jax.random.key(1))
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_array_equal(a, b)
        large = getattr(path[-1], "key", None) in ("embed", "value_embed", "bigram_embed", "head")
        assert len(b.addressable_shards[0].data.ravel()) == b.size // (8 if large else 1), path
    assert np.any(np.asarray(one.params["embed"]) != np.asarray(other["embed"]))


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
    batch = jax.ShapeDtypeStruct((1, ROWS_PER_STEP, T + 1), jnp.int32)
    later, _ = jax.eval_shape(step_on(1, "float32", 0.0), state, batch, RATES[0])
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
    batch = placed(make_mesh(4), BATCH, some_rows(1).reshape(2, 4, T + 1))
    rates = Rates(*[jax.ShapeDtypeStruct((), jnp.float32)] * 2)
    state = first_state(4)
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
    program, batch, state = compiled()
    state = replace(state, params=state.params | {"head": state.params["embed"].T})

    def moved(rate, momentum):
        """Return the change of the parameters, and Muon's momentum after the first gradient."""
        after, _ = program(copied(state), batch, Rates(rate, momentum))
        moves = jax.tree.map(lambda new, old: np.array(new - old), after.params, state.params)
        return moves, np.array(optax.tree.get(after.opt_state, "momentum")["mlp"]["down"])

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


def stepper(skip_spikes=0.0):
    """Return a training step, and an initial state."""
    return step_on(8, "float32", skip_spikes), copied(first_state(8))


def batch_of(rows):
    return placed(make_mesh(8), BATCH, rows.reshape(1, -1, T + 1))


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def held(state):
    """Return copies of what an update changes, which donation cannot overwrite."""
    return jax.tree.map(np.array, (state.params, state.opt_state))


@pytest.mark.parametrize("harm", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_neither_parameters_nor_optimizer(harm):
    train_step, state = stepper()
    rows = some_rows()
    state, metrics = train_step(state, batch_of(rows[0]), RATES[0])
    assert metrics["applied"]
    if harm == "loss":  # a NaN in the row of one token
        embed = state.params["embed"].at[rows[1, 0, 0]].set(jnp.nan)
        params = state.params | {"embed": embed}
    else:  # the MLPs' output is huge, but multiplied by zero: only the gradient is affected
        mlp = {"up": 1e14 * state.params["mlp"]["up"]}
        mlp["down"] = jnp.zeros_like(state.params["mlp"]["down"])
        params = state.params | {"mlp": mlp}
    state = replace(state, params=params)
    before = held(state)
    state, metrics = train_step(state, batch_of(rows[1]), RATES[1])
    assert np.isfinite(metrics["loss"]) == (harm == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    assert not metrics["applied"]
    assert same(held(state), before)
    assert state.step == 2
    assert np.isfinite(state.loss_mean) and np.isfinite(state.loss_variance)


def losses_with_a_spike(skip_spikes):
    """The last of 100 batches is of another kind: its metrics, and the states before and after."""
    train_step, state = stepper(skip_spikes)
    losses = []
    for rows in some_rows(99, seed=3):
        state, metrics = train_step(state, batch_of(rows), Rates(*np.float32((1.0, 0.95))))
        losses.append(float(metrics["loss"]))
        assert metrics["applied"]
    before = held(state)
    foreign = np.random.default_rng(9).integers(0, CONFIG.vocab_size, (ROWS_PER_STEP, T + 1))
    state, metrics = train_step(state, batch_of(foreign.astype(np.int32)), RATES[0])
    return losses, metrics, before, held(state)


@pytest.mark.parametrize(("skip_spikes", "applied"), [(0.0, True), (2.0, False)])
def test_a_spike_is_measured_and_skipped_only_where_that_was_asked_for(skip_spikes, applied):
    losses, metrics, before, after = losses_with_a_spike(skip_spikes)
    mean, variance = losses[0], 0.0
    for loss in losses[1:]:  # exponentially weighted, by the textbook
        mean, variance = (
            0.95 * mean + 0.05 * loss,
            0.95 * (variance + 0.05 * (loss - mean) ** 2),
        )
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

    logits = jax.jit(nnx.merge(graph, jax.tree.map(jnp.asarray, params)).__call__)(
        np.maximum(rows[:, :-1], 0)
    )
    logits, targets = np.asarray(logits, "f8"), rows[:, 1:]
    V = CONFIG.padded_vocab_size
    impossible = rng.random((V, V)) < 0.3  # next ids, after each id
    table = jnp.asarray(np.packbits(impossible, axis=-1, bitorder="little"))

    for devices, batch_size, mask in ((1, 4, None), (8, 8, None), (8, 8, table)):
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


def markov_chain(rng, rows, length, symbols=4):
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
        vocab_size=4, num_layers=2, num_heads=2, width=32, mlp_width=64, value_embeddings=1
    )
    steps, rng = 200, np.random.default_rng(0)
    mesh, graph, optimizer = make_mesh(1), graph_of(config), some_optimizer()
    train_step = make_train_step(graph, optimizer, mesh, "float32")
    state = make_init(config, optimizer, mesh)(jax.random.key(0))
    batches, _ = markov_chain(rng, steps * 32, 33)
    for step, batch in enumerate(batches.reshape(steps, 1, 32, 33)):
        rates = Rates(min(1.0, 2 * (1 - step / steps)), min(0.95, 0.85 + step / 500))
        state, _ = train_step(state, placed(mesh, BATCH, batch), rates)

    # On new rows, compared with the source's own log-probabilities of these symbols. To be better,
    # a model would have to see what it predicts.
    rows, probability = markov_chain(rng, 512, 33)
    entropy = -np.log(probability).mean()
    total = make_eval_step(graph, mesh, "float32")(state.params, placed(mesh, ROWS, rows))
    loss = float(total) / probability.size
    assert entropy < loss < 1.02 * entropy, (entropy, loss)
