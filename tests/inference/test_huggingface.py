"""Exported models in transformers: the real libraries load them and compute the same numbers."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from nanogpt.data.tokenizer import load_tokenizer
from nanogpt.devices.mesh import make_mesh
from nanogpt.inference.export import save_model
from nanogpt.inference.generate import generate
from nanogpt.inference.huggingface import huggingface_files
from nanogpt.inference.sampling import Sampling
from nanogpt.inference.weights import load_model, load_run
from nanogpt.training.step import graph_of
from tests.inference.test_model_note import CONFIGS, EVERY_TRICK, SPEEDRUN, alive
from tests.model.test_gpt import build
from train_gpt import PRESETS

torch = pytest.importorskip("torch", reason="needs the extra hf")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

pytestmark = pytest.mark.usefixtures("own_caches")
torch.set_num_threads(1)  # more would wait for each other while JAX computes, too

T = 16  # tokens of a training row; texts are longer
SOURCE = {"run": "a", "step": 5, "tokens": 500}
SETTINGS = {"tokenizer": "bytes", "sequence_length": T, "dtype": "float32", "from": SOURCE}


def thin(name):
    """Return a preset's model with fewer and smaller heads, layers and vocabulary."""
    preset = PRESETS[name]
    stages = range(len(preset.stages))
    model = preset.schedule.used(preset.model, stages[-1])
    windows = tuple(-(-window // 128) for window in model.windows)
    return replace(
        model,
        vocab_size=256,
        num_layers=min(model.num_layers, 11),
        num_heads=2,
        width=24,
        mlp_width=48,
        windows=windows,
        rotary_windows=tuple(-(-window // 128) for window in model.rotary_windows),
        document_separator=None if model.document_separator is None else 255,
        bigram_buckets=model.bigram_buckets and 61,
        bigram_width=model.bigram_width and 24 * model.bigram_width // model.width,
        composed_window=7,
    )


PRESET_SHAPES = {f"{name} preset": thin(name) for name in ("laptop", "speedrun", "baseline")}
SHAPES = CONFIGS | PRESET_SHAPES


def written(folder, config):
    """Export a model with random weights; return the folder and the weights."""
    params = alive(config)
    save_model(folder, config, params, SETTINGS, huggingface_files(config, SETTINGS, folder))
    return params


def loaded(folder, **how):
    how = {"trust_remote_code": True, "dtype": torch.float32} | how
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    return model.eval().requires_grad_(False)


def some_tokens(config, B, length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (B, length))
    tokens[0, 7] = tokens[-1, 3] = config.document_separator or 4
    return tokens


def logits_of(model, tokens, **how):
    return model(torch.from_numpy(np.array(tokens)), **how).logits.float().numpy()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_the_model_with_whatever_tricks_it_has(tmp_path, config):
    params = written(tmp_path / "gpt", config)
    tokens = some_tokens(config, 2, T)
    found = logits_of(loaded(tmp_path / "gpt"), tokens)
    np.testing.assert_allclose(found, jax.jit(build(config, params))(tokens), atol=1e-4)


# Models with every trick


@pytest.fixture(scope="module", params=[EVERY_TRICK, SPEEDRUN], ids=["every trick", "the speedrun"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "gpt"
    written(folder, config)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return loaded(folder)


PROMPTS = [[4, 17, 23, 99, 4, 5], [6, 8], [4, *range(30, 44)]]
LENGTH = 40  # far beyond T


# Without a separator, only padding ends what tokens see. Composed heads may share all that is seen.
@pytest.mark.parametrize(("separator", "shared"), [(4, 9), (None, 10 * T)])
def test_greedy_texts_are_those_of_our_sampler_beyond_the_training_length(
    tmp_path, config, separator, shared
):
    config = replace(config, document_separator=separator, composed_window=shared)
    params = jax.tree.map(jax.numpy.asarray, written(tmp_path / "gpt", config))
    greedy = {"num_tokens": LENGTH, "context": T, "sampling": Sampling(temperature=0)}
    ours = generate(graph_of(config), params, PROMPTS, **greedy)
    expected = np.concatenate([part.tokens for part in ours]).T
    model, longest = loaded(tmp_path / "gpt"), max(map(len, PROMPTS))
    how = {"do_sample": False, "max_new_tokens": LENGTH, "eos_token_id": None}
    ids = torch.tensor([[7] * (longest - len(each)) + each for each in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in PROMPTS])
    for cached in (True, False):
        found = model.generate(ids, attention_mask=mask, use_cache=cached, **how)
        np.testing.assert_array_equal(found[:, longest:].numpy(), expected)
    alone = model.generate(torch.tensor(PROMPTS[:1]), **how)
    np.testing.assert_array_equal(alone[0, len(PROMPTS[0]) :].numpy(), expected[0])


def test_a_row_in_pieces_with_a_cache_has_the_logits_of_the_whole(config, model):
    tokens = some_tokens(config, 2, 3 * T)
    whole, past, found = logits_of(model, tokens), None, []
    for piece in np.split(tokens, [5, 6, 20, 21], axis=1):
        out = model(torch.from_numpy(piece), cache=past, use_cache=True)
        past = out.cache
        found.append(out.logits.numpy())
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=1e-4)
    assert past.get_seq_length() == 3 * T
    last = logits_of(model, tokens, logits_to_keep=2)
    np.testing.assert_allclose(last, whole[:, -2:], atol=1e-5)


def test_beams_take_their_pasts_with_them(model):
    how = {"num_beams": 3, "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    prompt = torch.tensor(PROMPTS[:1])
    with_cache, without = (model.generate(prompt, use_cache=c, **how) for c in (True, False))
    np.testing.assert_array_equal(with_cache, without)


def test_labels_give_the_mean_loss_of_our_model(config, model):
    tokens = some_tokens(config, 2, T)
    labels = torch.from_numpy(tokens.copy())
    labels[1, 9] = -100
    losses = jax.jit(build(config, alive(config)).loss)
    ours = losses(tokens[:, :-1], labels.numpy()[:, 1:])[1]
    found = model(torch.from_numpy(tokens), labels=labels).loss
    assert found.item() == pytest.approx(float(ours.sum() / (ours > 0).sum()), abs=1e-5)
    assert (ours > 0).sum() == 2 * (T - 1) - 1


def test_gradients_reach_every_array(config, folder):
    model = loaded(folder).requires_grad_(True)
    tokens = torch.from_numpy(some_tokens(config, 2, T))
    model(tokens, labels=tokens).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_in_bfloat16_the_probabilities_are_nearly_those_of_float32(config, folder, model):
    tokens = some_tokens(config, 2, T)
    half = loaded(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    whole, rounded = (torch.softmax(torch.tensor(logits_of(m, tokens)), -1) for m in (model, half))
    assert (whole - rounded).abs().max() < 0.1
    assert (whole - rounded).abs().mean() < 2e-3


# Round trips


def arrays_of(folder):
    settings, _, params, origin = load_model(Path(folder), make_mesh(1))
    return settings, jax.tree.map(np.asarray, params), origin


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_what_transformers_saved_loads_there_and_here_to_the_last_bit(
    config, folder, model, tmp_path, shards
):
    model.save_pretrained(tmp_path / "saved", max_shard_size=shards)
    index = tmp_path / "saved" / "model.safetensors.index.json"
    assert index.exists() == (shards == "20KB")
    for one, other in zip(*map(arrays_of, (folder, tmp_path / "saved")), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    tokens = some_tokens(config, 2, T)
    again = loaded(tmp_path / "saved")
    np.testing.assert_array_equal(logits_of(again, tokens), logits_of(model, tokens))


def test_a_model_that_was_saved_in_bfloat16_comes_back_with_its_numbers(folder, tmp_path):
    half = loaded(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    settings, params, _ = arrays_of(tmp_path / "half")
    assert settings.dtype == "bfloat16"
    assert params["head"].dtype == np.float32
    np.testing.assert_array_equal(params["head"], half.head.float().numpy())


# A run, exported as users do


def test_a_pipeline_writes_what_our_sampler_writes(base, exported):
    write = transformers.pipeline("text-generation", str(exported), trust_remote_code=True)
    assert write.model.dtype == torch.float32
    (found,) = write("def ", max_new_tokens=LENGTH, do_sample=False, eos_token_id=None)
    hp, graph, params, _ = load_run(base.folder, make_mesh(1))
    ours = generate(
        graph,
        params,
        [[255, *b"def "]],
        num_tokens=LENGTH,
        context=hp.sequence_length,
        sampling=Sampling(temperature=0),
    )
    tokens = np.concatenate([part.tokens for part in ours])[:, 0]
    assert found["generated_text"] == "def " + load_tokenizer("bytes").decode(tokens)


def test_the_card_says_where_the_model_comes_from_and_its_program_runs(
    base, exported, monkeypatch, capsys
):
    run = json.loads((base.folder / "run.json").read_text())
    card = (exported / "README.md").read_text()
    loss = f"{base.metrics[-1]['val_loss']:.4f}"
    for words in (run["command"], run["data"]["name"], run["commit"], loss, "preset laptop"):
        assert words in card
    (program,) = card.split("```python\n")[1:]
    monkeypatch.chdir(exported)
    exec(program.partition("```")[0], {})
    assert capsys.readouterr().out.startswith("Once")


# Tokenizers

TEXTS = [
    "",
    "def f(x):\n\treturn  x  # é, 語, 👩‍👩‍👧\r\n\n\n",
    "It's 12345, they'll  say;   \u00a0we\u2019re … <|endofword|>\x00\x7f",
    bytes(range(256)).decode("latin-1"),
]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_tokenizer_has_the_tokens_and_texts_of_ours(name, tmp_path):
    if name == "gpt2" and "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with GPT-2's vocabulary")
    settings = SETTINGS | {"tokenizer": name}
    for file, text in huggingface_files(EVERY_TRICK, settings, tmp_path).items():
        (tmp_path / file).write_text(text)
    ours = load_tokenizer(name)
    kinds = [transformers.AutoTokenizer]
    kinds += [transformers.GPT2TokenizerFast] if name == "gpt2" else []
    for tokenizer in (kind.from_pretrained(tmp_path) for kind in kinds):
        for text in [*TEXTS, Path(__file__).read_text()]:
            ids = ours.encode(text).tolist()
            assert tokenizer(text, add_special_tokens=False).input_ids == ids
            assert tokenizer.decode(ids) == text
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (ours.vocab_size, ours.separator)
    assert tokenizer("a").input_ids == [ours.separator, *ours.encode("a")]
    padded = tokenizer(["a", "a b"], padding=True)
    assert [sum(mask) for mask in padded.attention_mask] == [2, 1 + len(ours.encode("a b"))]
    assert padded.input_ids[0][-2:] == [ours.separator, *ours.encode("a")]
