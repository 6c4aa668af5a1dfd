"""HellaSwag's file and its scores, compared with a plain loop over the endings in NumPy."""

import hashlib
import os
import struct

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from nanogpt.config import ConfigError
from nanogpt.data.tokenizer import ByteTokenizer, GPT2Tokenizer
from nanogpt.devices.mesh import make_mesh
from nanogpt.inference import hellaswag
from nanogpt.inference.hellaswag import Item, losses_of, make_row_losses, read_items, row_of, scores
from nanogpt.training.step import graph_of, param_shapes

SEPARATOR, T = 99, 64


def made_items(counts, vocabulary=SEPARATOR, seed=0):
    """Return items of random tokens, with these lengths of context and endings."""
    random = np.random.default_rng(seed)

    def tokens(count):
        return random.integers(vocabulary, size=count).astype(np.uint16)

    return [
        Item(tokens(context), [*map(tokens, endings)], int(random.integers(4)))
        for context, endings in counts
    ]


def file_of(items):
    """Return what llm.c's dev/data/data_common.py would write."""
    content = struct.pack("<256i", 20240522, 1, len(items), 9999, *[0] * 252)
    for number, (context, endings, label) in enumerate(items):
        words = [65535, 0, number, label, 4]
        for part in (context, *endings):
            words += [len(part), *part]
        words[1] = 2 * len(words)
        content += struct.pack(f"<{len(words)}H", *words)
    return content


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write these items to a file and make it the expected one."""

    def write(items):
        path = tmp_path / "hellaswag_val.bin"
        path.write_bytes(file_of(items))
        monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    return write


@pytest.fixture(scope="module")
def gpt2():
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with GPT-2's vocabulary")
    return GPT2Tokenizer()


def assert_same(one, other):
    assert len(one) == len(other)
    for (context, endings, label), (context2, endings2, label2) in zip(one, other, strict=True):
        assert (label, len(endings)) == (label2, len(endings2))
        for part, part2 in zip([context, *endings], [context2, *endings2], strict=True):
            np.testing.assert_array_equal(part, part2)


# The file


def test_the_items_are_read_as_they_were_written(write):
    # The second has nearly as many bytes as 16 bits can count.
    items = made_items([(3, (1, 2, 3, 4)), (30_000, (900, 1, 5, 60)), (1, (7, 7, 7, 7))], 50257)
    assert_same(read_items(write(items)), items)


def test_a_file_with_another_hash_is_refused_in_a_sentence(write):
    path = write(made_items([(3, (1, 2, 3, 4))]))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"hellaswag_val\.bin is not .* SHA-256 .* delete it.*\.$"
    ):
        read_items(path)


def test_the_text_of_the_items_survives_another_tokenizer(gpt2):
    texts = ["A man sits on a roof. he", " is ripping level tiles off.", " naïve", " 日本", " ends"]
    context, *endings = map(gpt2.encode, texts)
    (item,) = hellaswag.retokenized([Item(context, endings, 2)], ByteTokenizer())
    assert [bytes(part.tolist()).decode() for part in (item.context, *item.endings)] == texts
    assert item.label == 2


def test_gpt2s_tokens_are_taken_as_they_are(gpt2):
    items = made_items([(3, (1, 2, 3, 4))], 50256)
    assert_same(hellaswag.retokenized(items, gpt2), items)


# The rows


def test_a_row_is_separator_context_and_ending_and_only_the_ending_is_scored():
    row = row_of(np.array([1, 2]), np.array([3, 4, 5]), SEPARATOR, T)
    assert row.tokens.tolist() == [SEPARATOR, 1, 2, 3, 4]
    assert row.targets.tolist() == [-1, -1, 3, 4, 5]


def test_a_row_that_is_too_long_keeps_its_last_tokens():
    row = row_of(np.arange(10), np.array([20, 21]), SEPARATOR, T=5)
    assert row.tokens.tolist() == [6, 7, 8, 9, 20]
    assert row.targets.tolist() == [-1, -1, -1, 20, 21]


def test_a_row_that_just_fits_keeps_its_separator():
    row = row_of(np.arange(3), np.array([20, 21]), SEPARATOR, T=5)
    assert row.tokens.tolist() == [SEPARATOR, 0, 1, 2, 20]


def test_an_ending_is_whole_even_where_it_is_longer_than_any_row():
    row = row_of(np.arange(10), np.arange(20, 28), SEPARATOR, T=5)
    assert row.tokens.tolist() == [9, *range(20, 27)]
    assert row.targets.tolist() == [*range(20, 28)]


# The losses


@pytest.fixture(scope="module")
def items():
    """The second to last has a context, and the last an ending, too long for the model."""
    return made_items(
        [(9, (1, 3, 8, 2)), (50, (20, 14, 5, 9)), (90, (4, 30, 6, 5)), (5, (70, 9, 14, 1))]
    )


@pytest.fixture(scope="module")
def expected(items, model):
    """Return the summed loss of each ending, one by one, computed with NumPy from the logits."""
    graph, params = model
    logits_of = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens[None])[0])
    losses = []
    for context, endings, _ in items:
        for ending in endings:
            tokens = [SEPARATOR, *context.tolist(), *ending.tolist()]
            tokens = np.array(tokens[-(max(T, len(ending)) + 1) :])
            # Padded to one length, so one program: tokens see only earlier ones.
            filled = np.pad(tokens, (0, 128 - len(tokens)))
            logs = log_softmax(np.asarray(logits_of(filled), np.float64), axis=-1)
            places = np.arange(len(tokens) - len(ending), len(tokens))
            losses.append(-logs[places - 1, tokens[places]].sum())
    return np.array(losses)


@pytest.fixture(scope="module")
def model(tiny_config):
    random = np.random.default_rng(1)
    shapes = param_shapes(tiny_config)
    params = jax.tree.map(lambda p: np.float32(random.normal(0, 0.3, p.shape)), shapes)
    return graph_of(tiny_config), jax.device_put(params)


@pytest.fixture(scope="module")
def tiny_config():
    from nanogpt.config import GPTConfig

    shape = {"num_layers": 2, "num_heads": 2, "width": 16, "mlp_width": 32}
    return GPTConfig(vocab_size=100, **shape, windows=(40, 0), bigram_buckets=64)


@pytest.mark.parametrize(("devices", "tokens_per_device"), [(1, 64), (8, 300)])
def test_the_loss_of_every_ending_is_that_of_a_plain_loop(
    items, model, expected, devices, tokens_per_device
):
    graph, params = model
    mesh = make_mesh(devices)
    rows = [row_of(item.context, end, SEPARATOR, T) for item in items for end in item.endings]
    row_losses = make_row_losses(graph, mesh, "float32")
    losses = losses_of(rows, row_losses, params, mesh, tokens_per_device=tokens_per_device)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


def test_rows_of_few_lengths_fill_the_devices_and_every_pass_is_shown(items):
    mesh, shapes, shown = make_mesh(2), [], []

    def count_targets(params, tokens, targets):
        shapes.append(tokens.shape)
        return (targets >= 0).sum(axis=1)

    def show(passes):
        shown.extend(passes)
        return passes

    rows = [row_of(item.context, end, SEPARATOR, T) for item in items for end in item.endings]
    counts = losses_of(rows, count_targets, None, mesh, tokens_per_device=256, progress=show)
    assert counts.tolist() == [len(end) for item in items for end in item.endings]
    # 15 rows of up to 64 tokens, 4 at a time on each of two devices, and one of 70.
    assert shapes == [(8, 64), (8, 64), (2, 128)]
    assert len(shown) == 3


# The scores


def test_both_accuracies_and_the_error_are_those_counted_by_hand():
    lengths = [(1, 1, 1, 1), (2, 1, 4, 3), (2, 1, 4, 3)]
    items = [item._replace(label=2) for item in made_items([(1, each) for each in lengths])]
    losses = np.array(
        [
            [4.0, 3.0, 1.0, 2.0],  # the third by both
            [4.0, 3.0, 6.0, 8.0],  # means 2, 3, 1.5, 2.67: the third by its mean alone
            [2.0, 3.0, 5.0, 9.0],  # means 1, 3, 1.25, 3: the first by both
        ]
    )
    assert scores(losses, items) == {
        "accuracy_norm": pytest.approx(2 / 3),
        "accuracy": pytest.approx(1 / 3),
        "standard_error": pytest.approx((2 / 9 / 3) ** 0.5),
        "items": 3,
    }
