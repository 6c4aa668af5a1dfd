"""Reading and comparing run folders in tests."""

import json
import shutil
from itertools import pairwise

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp
from scipy.special import logsumexp

TIMES = ("time_s", "step_time_s", "tokens_per_s")


def checkpoints(run):
    """Return the folders of the complete checkpoints, oldest first."""
    return sorted(path.parent for path in (run / "checkpoints").glob("*/manifest.json"))


def steps(run):
    return [int(checkpoint.name) for checkpoint in checkpoints(run)]


def arrays(run, step):
    """Return all arrays of a checkpoint by name: parameters, optimizer and the rest."""
    tree = ocp.load_checkpointables(run / "checkpoints" / f"{step:08}")
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k): (x.dtype, x.shape, np.asarray(x).tobytes()) for k, x in leaves}


def records(run):
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(run):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records(run)]


def assert_same_run(run, straight):
    assert without_times(run) == without_times(straight)
    assert_same_end(run, straight)


def assert_same_end(run, straight):
    last = steps(straight)[-1]
    assert steps(run)[-1] == last
    ours, theirs = arrays(run, last), arrays(straight, last)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def died_after(step, straight, place):
    """Copy the uninterrupted run as a crash soon after `step` would have left it."""
    run = place / "runs" / "a"
    shutil.copytree(straight, run)
    for checkpoint in checkpoints(run):
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[: step + 2]) + lines[step + 2][:20])
    return run


def mean_loss(graph, params, shard, count, T, separator=None):
    """Return the loss of a shard's first targets, computed with NumPy from the logits.

    In rows of T, or with a separator, which begins each, in documents of at most T, one by one.
    """
    tokens = np.fromfile(shard, "<u2")[512:][: count + 1].astype(np.int32)
    logits_of = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens[None])[0])
    loss = 0.0
    begins = np.flatnonzero(tokens[:count] == separator)
    starts = range(0, count, T) if separator is None else np.union1d(0, begins)
    for first, end in pairwise([*starts, count]):
        assert end - first <= T
        row = tokens[first : end + 1]
        # A short last row is padded to avoid another compilation: tokens see only earlier ones.
        logits = np.asarray(logits_of(np.pad(row[:-1], (0, T + 1 - len(row)))), np.float64)
        loss += logsumexp(logits[: len(row) - 1], axis=1).sum()
        loss -= logits[np.arange(len(row) - 1), row[1:]].sum()
    return loss / count
