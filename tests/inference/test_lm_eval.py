"""EleutherAI's evaluation harness on an exported model: its results are evaluate.py's."""

import json

import numpy as np
import pytest

import evaluate
from nanogpt.data.shards import write_shard
from nanogpt.data.tokenizer import ByteTokenizer
from nanogpt.devices.mesh import make_mesh
from nanogpt.inference.hellaswag import Item, losses_of, make_row_losses, row_of
from tests.small_runs import T

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra hf")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

pytestmark = pytest.mark.usefixtures("own_caches")

TEXT = ("for name in names: print(name)  # é\n" * 99).encode()[: 10 * T].decode()
ITEMS = [
    {"context": "def f(x):", "endings": ["return x", "import os", "é", "pass"], "label": 0},
    {"context": "if a == b and not c:\n    x = [1]", "endings": ["# y", "else"], "label": 1},
    {"context": "class A:", "endings": ["def b(self): return self.c + 1", "e = 2"], "label": 1},
]
TASKS = {
    "endings": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{endings}}"
doc_to_target: label
metric_list: [{metric: acc}]
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture
def harness(exported, tmp_path):
    """Runs the harness on a task with these documents; returns its results, also by document."""

    def harness(task, documents, **more):
        lines = "".join(f"{json.dumps(document)}\n" for document in documents)
        (tmp_path / "data.jsonl").write_text(lines)
        data = {"data_files": {"test": str(tmp_path / "data.jsonl")}}
        (tmp_path / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\n"
            f"test_split: test\n{TASKS[task]}"
        )
        found = lm_eval.simple_evaluate(
            "hf",
            {"pretrained": str(exported), "trust_remote_code": True, "device": "cpu"} | more,
            [task],
            # Its own tasks, thousands of files, are left out.
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )
        return found["results"][task], found["samples"][task]

    return harness


def test_endings_have_the_losses_that_evaluate_gives_them(exported, harness):
    found, samples = harness("endings", ITEMS)
    encode, run = ByteTokenizer().encode, evaluate.load(exported, make_mesh(1))
    items = [
        Item(encode(x["context"]), [encode(f" {e}") for e in x["endings"]], x["label"])
        for x in ITEMS
    ]
    rows = [row_of(item.context, end, 255, T) for item in items for end in item.endings]
    row_losses = make_row_losses(run.graph, run.mesh, run.hp.dtype)
    losses = losses_of(rows, row_losses, run.params, run.mesh, tokens_per_device=512)
    samples.sort(key=lambda sample: sample["doc_id"])
    theirs = [-float(log) for sample in samples for log, _ in sample["filtered_resps"]]
    np.testing.assert_allclose(theirs, losses, atol=1e-3)
    chosen = np.split(losses, np.cumsum([len(item.endings) for item in items])[:-1])
    right = [np.argmin(each) == item.label for each, item in zip(chosen, items, strict=True)]
    assert found["acc,none"] == pytest.approx(np.mean(right))


def test_a_text_has_the_bits_per_byte_that_evaluate_gives_it(exported, harness, tmp_path):
    found, _ = harness("text", [{"text": TEXT}], add_bos_token=False)
    write_shard(tmp_path / "text.bin", [255, *TEXT.encode()])
    assert evaluate.main([str(exported), "--val-files", str(tmp_path / "text.bin")]) == 0
    ours = json.loads((exported / "evaluation.json").read_text())
    assert ours["val_tokens"] == len(TEXT.encode())
    assert found["bits_per_byte,none"] == pytest.approx(ours["bits_per_byte"], abs=1e-4)
