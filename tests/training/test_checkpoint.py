"""Checkpoints: restored bit for bit, despite kills, full disks, truncation and bit flips."""

import ast
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, fields, replace
from functools import cache as cached
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config import ConfigError
from nanogpt.devices.mesh import REPLICATED, make_mesh, shapes_on
from nanogpt.inference.weights import load_run
from nanogpt.schedule import Stage
from nanogpt.training import checkpoint as module
from nanogpt.training import saving
from nanogpt.training.checkpoint import CheckpointError, load_state, newest_checkpoint
from nanogpt.training.saving import Checkpoints
from nanogpt.training.step import TrainState, make_init
from tests.conftest import with_every_trick
from tests.programs import NO_LIMIT, Process, run_to_end
from tests.training.test_step import some_optimizer
from train_gpt import PRESETS

PROJECT = Path(__file__).resolve().parents[2]


def say_nothing_is_wrong(line):
    raise AssertionError(line)


@pytest.fixture(scope="module")
def shapes():
    """The shapes of a state with the real optimizer, by number of devices."""

    @cached
    def shapes(devices):
        mesh = make_mesh(devices)
        init = make_init(with_every_trick(), some_optimizer(), mesh)
        return shapes_on(mesh, REPLICATED, jax.eval_shape(init, jax.random.key(0)))

    return shapes


@pytest.fixture
def state(shapes):
    """Return a state of random bits, including NaNs, on this many devices."""

    def state(step, devices=1):
        bits = np.random.default_rng(step)

        def leaf(s):
            words = bits.integers(0, 2**32, s.shape, np.uint32)
            return jax.device_put(words.view(s.dtype) if s.shape else s.dtype.type(3), s.sharding)

        filled = jax.tree.map(leaf, shapes(devices))
        head = jnp.full_like(filled.params["head"], -0.0)  # a fill value could be mistaken for it
        step = jax.device_put(jnp.int32(step), filled.step.sharding)
        return replace(filled, step=step, params=filled.params | {"head": head})

    return state


@pytest.fixture
def run(tmp_path, tmp_path_factory, tiny, state):
    """The folder of a run with checkpoints of the steps 10, 20 and 30."""
    made = tmp_path_factory.getbasetemp() / "run with checkpoints"  # once for all tests
    if not made.exists():
        made.mkdir()
        configure(made, val_tokens=5, model=tiny)
        save(made, state, 10, 20, 30)
    return shutil.copytree(made, tmp_path / "runs" / "a")


def configure(folder, **changed):
    """Write the config.json of a laptop run with these settings."""
    settings = asdict(replace(PRESETS["laptop"], **changed))
    (folder / "config.json").write_text(json.dumps(settings))


def save(folder, state, *steps, keep=3, say=say_nothing_is_wrong):
    with Checkpoints(folder, keep, say) as checkpoints:
        for step in steps:
            checkpoints.save(state(step), {"tokens": 7 * step})


def saves(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same_bits(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(expected), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (e.dtype, e.shape), where
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes(), where


# What is saved


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 8), (8, 2)])
def test_a_state_comes_back_bit_by_bit_on_any_number_of_devices(
    tmp_path, shapes, state, saved_on, loaded_on
):
    save(tmp_path, lambda step: state(step, saved_on), 10)
    loaded = load_state(newest_checkpoint(tmp_path, say_nothing_is_wrong), shapes(loaded_on))
    assert_same_bits(loaded, state(10))
    for array in jax.tree.leaves(loaded):
        assert array.sharding.is_fully_replicated
        assert len(array.addressable_shards) == loaded_on


def test_what_is_known_of_the_run_comes_back_with_it(run):
    checkpoint = newest_checkpoint(run, say_nothing_is_wrong)
    assert (checkpoint.step, checkpoint.facts) == (30, {"tokens": 210})
    manifest = json.loads((run / "checkpoints" / "00000030" / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["versions"]["jax"] == jax.__version__
    assert set(manifest["files"]) == {
        path.relative_to(checkpoint.folder).as_posix()
        for path in checkpoint.folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def test_a_run_may_lie_in_a_folder_called_checkpoints(run, tmp_path):
    moved = tmp_path / "checkpoints" / "a"
    shutil.copytree(run, moved)
    assert load_run(moved, make_mesh(1))[3].step == 30
    one = moved / "checkpoints" / "00000010"
    assert load_run(one, make_mesh(1))[3].step == 10
    for wrong in ("x" * 5000, "9" * 5000, "00000011"):
        with pytest.raises(CheckpointError, match="does not exist: give another checkpoint"):
            load_run(one.with_name(wrong), make_mesh(1))


def test_minutes_are_counted_from_the_last_save(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: now))
    with Checkpoints(tmp_path, 1, say_nothing_is_wrong) as checkpoints:
        now += 90
        assert checkpoints.minutes == 1.5
        checkpoints.save(small_state(10), {"tokens": 1})
        assert checkpoints.minutes == 0
        now += 60
        assert checkpoints.minutes == 1


def test_the_best_checkpoint_stays_besides_the_newest_ones_if_asked_for(tmp_path):
    def losses(**of):
        lines = [{"step": int(step[1:]), "val_loss": loss} for step, loss in of.items()]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    with Checkpoints(tmp_path, 1, say_nothing_is_wrong, keep_best=True) as checkpoints:
        for step, of in {10: {}, 20: {"s10": 2.0}, 30: {"s10": 2.0, "s20": 3.0}}.items():
            losses(**of)  # nothing is known about the saved step yet
            checkpoints.save(small_state(step), {"tokens": 1})
            checkpoints.wait()
        assert saves(tmp_path) == ["00000010", "00000030"]
        losses(s10=2.0, s20=3.0, s30=1.0)
        checkpoints.save(small_state(40), {"tokens": 1})
    assert saves(tmp_path) == ["00000030", "00000040"]
    save(tmp_path, small_state, 50, keep=1)
    assert saves(tmp_path) == ["00000050"]


def test_a_state_that_training_consumes_during_the_save_is_saved_as_it_was(tmp_path):
    train_step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state = train_step(jax.device_put(simple_state(0, 1 << 20)))
    before = state.params["w"].unsafe_buffer_pointer()
    state = train_step(state)
    # Otherwise this test shows nothing: a step overwrites its input.
    assert state.params["w"].unsafe_buffer_pointer() == before

    with Checkpoints(tmp_path, 100, say_nothing_is_wrong) as checkpoints:
        for _ in range(5):
            checkpoints.save(state, {})
            for _ in range(3):
                state = train_step(state)
    assert len(saves(tmp_path)) == 5
    for folder in (tmp_path / "checkpoints").iterdir():
        checkpoint = module.examined(folder)
        loaded = load_state(checkpoint, jax.tree.map(lambda a: a, state))
        for array in jax.tree.leaves(loaded):
            np.testing.assert_array_equal(array, checkpoint.step)


def simple_state(step, size):
    """Return a state with `step` everywhere."""
    full = np.full(size, step, np.float32)
    known = {"step": np.int32(step), "params": {"w": full, "v": full}, "opt_state": (full,)}
    return TrainState(**{f.name: known.get(f.name, np.float32(step)) for f in fields(TrainState)})


def small_state(step):
    """Return a state of few arrays, for what depends on no other."""
    return jax.device_put(simple_state(step, 9))


def test_a_save_waits_for_the_one_before_and_not_for_its_own_end(tmp_path, monkeypatch):
    may_write, write = threading.Event(), saving._write_manifest
    monkeypatch.setattr(saving, "_write_manifest", lambda *a: may_write.wait(60) and write(*a))
    checkpoints = Checkpoints(tmp_path, 2, say_nothing_is_wrong)
    checkpoints.save(small_state(1), {})
    with pytest.raises(CheckpointError):
        newest_checkpoint(tmp_path, print)  # not yet
    threading.Timer(0.3, may_write.set).start()
    checkpoints.save(small_state(2), {})
    assert newest_checkpoint(tmp_path, print).step >= 1
    checkpoints.wait()
    assert saves(tmp_path) == ["00000001", "00000002"]


def test_facts_are_those_of_the_moment_of_the_save(tmp_path):
    facts = {"tokens": 1}
    with Checkpoints(tmp_path, 1, say_nothing_is_wrong) as checkpoints:
        checkpoints.save(small_state(1), facts)
        facts["tokens"] = 2
    assert newest_checkpoint(tmp_path, print).facts == {"tokens": 1}


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, small_state, 8, 9, 10, 11, keep=2)
    assert saves(tmp_path) == ["00000010", "00000011"]


def test_only_good_ones_count_among_those_kept(run, state):
    flip_a_byte(run / "checkpoints" / "00000030")
    save(run, state, 25, keep=2)  # as in a run that was resumed from step 20
    assert saves(run) == ["00000020", "00000025"]


def test_a_damaged_one_is_replaced_when_its_step_comes_again(run, state):
    flip_a_byte(run / "checkpoints" / "00000030")
    save(run, state, 30)
    assert newest_checkpoint(run, say_nothing_is_wrong).step == 30
    assert saves(run) == ["00000010", "00000020", "00000030"]


def test_a_good_one_is_left_alone_when_its_step_comes_again(run, state):
    manifest = run / "checkpoints" / "00000030" / "manifest.json"
    before = manifest.stat()
    save(run, state, 30)
    after = manifest.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_an_interrupted_save_left_makes_room_for_the_next(run, state, monkeypatch):
    rests = [run / "checkpoints" / name for name in ("00000040.orbax-checkpoint-tmp", "00000050")]
    for rest in rests:
        (rest / "params").mkdir(parents=True)

    def usage(path):
        return shutil._ntuple_diskusage(10**9, 0, 0 if any(map(Path.exists, rests)) else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    save(run, state, 60)
    assert saves(run) == ["00000020", "00000030", "00000060"]


def test_what_is_no_checkpoint_is_not_deleted(run, state):
    (run / "checkpoints" / "00000020-best").mkdir()
    (run / "checkpoints" / "notes.txt").write_text("20 samples best")
    save(run, state, 40, keep=1)
    assert saves(run) == ["00000020-best", "00000040", "notes.txt"]


def test_the_same_step_is_not_saved_twice_unless_it_failed(tmp_path, monkeypatch):
    told, written, write = [], [], saving._write_manifest
    monkeypatch.setattr(
        saving, "_write_manifest", lambda *a: written.append(a[1]["step"]) or write(*a)
    )
    with Checkpoints(tmp_path, 2, told.append) as checkpoints:
        checkpoints.save(small_state(1), {})
        checkpoints.save(small_state(1), {})
        with monkeypatch.context() as full:
            full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
            checkpoints.save(small_state(2), {})
        checkpoints.save(small_state(2), {})
    assert written == [1, 2]
    assert len(told) == 1


# What is damaged


def a_file(folder):
    """Return the largest file, which holds arrays."""
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def flip_a_byte(folder):
    content = bytearray(a_file(folder).read_bytes())
    content[len(content) // 2] ^= 16
    a_file(folder).write_bytes(content)
    return f"changed bytes in .*{a_file(folder).name}"


def cut_a_file_short(folder):
    name, size = a_file(folder).name, a_file(folder).stat().st_size
    os.truncate(a_file(folder), size - 1)
    return f"{size - 1:,} bytes instead of {size:,} in .*{name}"


def lengthen_a_file(folder):
    with a_file(folder).open("ab") as file:
        file.write(b"\0")
    return f"bytes instead of .* in .*{a_file(folder).name}"


def delete_a_file(folder):
    a_file(folder).unlink()
    return "lacks (params|rest)/"


def delete_the_parameters(folder):
    shutil.rmtree(folder / "params")
    return "lacks params/"


def delete_the_manifest(folder):
    (folder / "manifest.json").unlink()
    return "no manifest.json, so its save was interrupted"


def empty_the_manifest(folder):
    os.truncate(folder / "manifest.json", 0)
    return "unreadable manifest.json"


def fill_the_manifest_with_garbage(folder):
    (folder / "manifest.json").write_bytes(np.random.default_rng(0).bytes(3000))
    return "unreadable manifest.json"


def nest_the_manifest(folder):
    (folder / "manifest.json").write_text("[" * 100_000)
    return "unreadable manifest.json"


def make_the_manifest_a_list(folder):
    (folder / "manifest.json").write_text("[1, 2]")
    return "unreadable manifest.json"


def change_the_tokens_in_the_manifest(folder):
    path = folder / "manifest.json"
    text = path.read_text()
    assert text.count('"tokens": 210') == 1
    path.write_text(text.replace('"tokens": 210', '"tokens": 211'))
    return "changed manifest.json"


def forget_a_file_in_the_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].popitem()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "changed manifest.json"


def copy_an_older_one_over_it(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "00000010", folder)
    return "is of step 10"


def rewrite_the_manifest(folder, **changes):
    """Add a correct digest."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    del manifest["sha256"]
    manifest["sha256"] = module.digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_a_later_format(folder):
    rewrite_the_manifest(folder, format=2)
    return "in format 2, not 1"


def list_the_files(folder):
    rewrite_the_manifest(folder, files=["params"])
    return r"manifest.json: files must be an object, not \["


def write_sizes_as_text(folder):
    rewrite_the_manifest(folder, files={"params/x": {"bytes": "9", "sha256": "0"}})
    return r"manifest.json: files\[...\].bytes must be an integer"


def count_the_tokens_in_words(folder):
    rewrite_the_manifest(folder, facts={"tokens": "all"})
    return 'manifest.json: facts.tokens must be an integer, not "all"'


def leave_the_format_out(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["format"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rewrite_the_manifest(folder)
    return "manifest.json: format is missing"


def make_it_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")
    return "unreadable manifest.json"


HARMS = [
    flip_a_byte,
    cut_a_file_short,
    lengthen_a_file,
    delete_a_file,
    delete_the_parameters,
    delete_the_manifest,
    empty_the_manifest,
    fill_the_manifest_with_garbage,
    nest_the_manifest,
    make_the_manifest_a_list,
    change_the_tokens_in_the_manifest,
    forget_a_file_in_the_manifest,
    copy_an_older_one_over_it,
    write_a_later_format,
    list_the_files,
    write_sizes_as_text,
    count_the_tokens_in_words,
    leave_the_format_out,
    make_it_a_file,
]


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_told_and_the_next_older_checkpoint_used(run, state, shapes, harm):
    flaw = harm(run / "checkpoints" / "00000030")
    told = []
    checkpoint = newest_checkpoint(run, told.append)
    assert checkpoint.step == 20
    assert_same_bits(load_state(checkpoint, shapes(1)), state(20))
    assert len(told) == 1
    assert re.fullmatch(
        f"WARNING: checkpoint 00000030 .*{flaw}.*: step 20 is used instead.", told[0]
    )


def test_of_several_damaged_ones_each_is_told(run):
    first, second = (
        flip_a_byte(run / "checkpoints" / "00000030"),
        cut_a_file_short(run / "checkpoints" / "00000020"),
    )
    told = []
    assert newest_checkpoint(run, told.append).step == 10
    assert len(told) == 2
    assert re.search(f"00000030 .*{first}", told[0])
    assert re.search(f"00000020 .*{second}", told[1])


def test_no_byte_of_a_manifest_can_change_unnoticed(run):
    folder = run / "checkpoints" / "00000030"
    whole = (folder / "manifest.json").read_bytes()
    for position in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[position] ^= 1
        (folder / "manifest.json").write_bytes(changed)
        assert isinstance(module.examined(folder), str), (position, chr(whole[position]))
    (folder / "manifest.json").write_bytes(whole)
    assert module.examined(folder).step == 30


def test_when_none_is_whole_the_error_names_them_all(run):
    for name, harm in zip(saves(run), HARMS[:3], strict=True):
        harm(run / "checkpoints" / name)
    with pytest.raises(CheckpointError, match="none of 3 is intact") as error:
        newest_checkpoint(run, say_nothing_is_wrong)
    assert all(f"0000{step} " in str(error.value) for step in ("0010", "0020", "0030"))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_pickle_among_the_files_is_never_run(run, state, shapes, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(f"pickle.{name}", forbidden)
    bomb = f"cos\nsystem\n(S'touch {tmp_path / 'ran'}'\ntR.".encode()
    checkpoint = newest_checkpoint(run, say_nothing_is_wrong)
    for folder in (checkpoint.folder, *checkpoint.folder.rglob("*/")):
        for name in ("state.pkl", "_METADATA.pkl", "treedef", "checkpoint", "a.pickle"):
            (folder / name).write_bytes(bomb)
    checkpoint = newest_checkpoint(run, say_nothing_is_wrong)  # its own files are undamaged
    assert_same_bits(load_state(checkpoint, shapes(1)), state(30))
    load_run(run, make_mesh(1))
    (checkpoint.folder / "manifest.json").write_bytes(bomb)
    a_file(checkpoint.folder / "params").write_bytes(bomb)
    assert newest_checkpoint(run, lambda line: None).step == 20
    save(run, state, 40)
    assert not (tmp_path / "ran").exists()


def test_no_module_imports_what_would_run_code_from_a_file():
    folders = PROJECT / "nanogpt", PROJECT / "benchmarks"
    modules = [*PROJECT.glob("*.py"), *(path for each in folders for path in each.rglob("*.py"))]
    assert PROJECT / "nanogpt" / "training" / "checkpoint.py" in modules
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}, (
                path
            )


# What fails


def test_a_save_without_space_is_not_begun_and_costs_no_other(run, state, monkeypatch):
    told, needed = [], 1.2 * sum(a.nbytes for a in jax.tree.leaves(state(40)))
    with monkeypatch.context() as full:  # deleting the older two would not make enough room
        full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 0))
        full.setattr(saving, "SPACE", 12)
        with pytest.raises(CheckpointError, match="step 40"):
            save(run, state, 40, keep=1, say=told.append)
    assert saves(run) == ["00000010", "00000020", "00000030"]
    assert len(told) == 1
    assert f"step 40 was not written: it needs {int(10 * needed):,} bytes" in told[0]
    save(run, state, 40, keep=1)
    assert saves(run) == ["00000040"]


def test_where_space_lacks_older_ones_make_way_for_the_new_but_for_the_newest(
    run, state, monkeypatch
):
    def used():
        return sum(path.stat().st_size for path in (run / "checkpoints").rglob("*"))

    free = []
    room = used() + sum(a.nbytes for a in jax.tree.leaves(state(40))) // 2

    def usage(path):
        assert newest_checkpoint(run, say_nothing_is_wrong).step == 30
        free.append(room - used())
        return shutil._ntuple_diskusage(room, used(), free[-1])

    monkeypatch.setattr(shutil, "disk_usage", usage)
    save(run, state, 40)
    assert free[0] < free[1]
    assert saves(run) == ["00000030", "00000040"]


def test_training_goes_on_after_a_failed_save_and_only_the_last_one_is_an_error(tmp_path):
    told = []
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with Checkpoints(tmp_path, 2, told.append) as checkpoints:
        checkpoints.save(small_state(1), {})
        assert len(told) == 1
        assert "step 1 was not written: " in told[0] and "File exists" in told[0]
        with pytest.raises(CheckpointError, match="step 1 was not written"):
            checkpoints.wait()
        (tmp_path / "checkpoints").unlink()
        checkpoints.save(small_state(2), {})
        checkpoints.wait()
    assert newest_checkpoint(tmp_path, say_nothing_is_wrong).step == 2


def test_a_failure_in_the_background_leaves_nothing_of_its_save(run, state, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device", str(path))

    told = []
    monkeypatch.setattr(saving, "_sync", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(run, state, 40, keep=1, say=told.append)
    assert len(told) == 1
    assert saves(run) == ["00000010", "00000020", "00000030"]


def test_leaving_by_an_exception_waits_and_does_not_hide_it(run, state, monkeypatch):
    with pytest.raises(KeyError), Checkpoints(run, 1, say_nothing_is_wrong) as checkpoints:
        checkpoints.save(state(40), {})
        raise KeyError
    assert saves(run) == ["00000040"]
    monkeypatch.setattr(saving, "_sync", None)  # so that the next save fails
    told = []
    with pytest.raises(KeyError), Checkpoints(run, 1, told.append) as checkpoints:
        checkpoints.save(state(50), {})
        raise KeyError
    assert len(told) == 1
    assert saves(run) == ["00000040"]


def big_state(step):
    """Return a state of 3 MB that differ at every step."""
    random = np.random.default_rng(step)
    big = {
        name: {c: random.standard_normal(200_000, np.float32) for c in "ab"}
        for name in ("params", "opt_state")
    }
    return jax.device_put(replace(simple_state(step, 1), **big))


def until_the_disk_is_full(arguments):
    """Save and load, which prints nothing, and then with little room for each file."""
    run = Path(arguments[0])
    with Checkpoints(run, 1, print) as checkpoints:
        for step in range(2):
            checkpoints.save(big_state(step), {})
    load_state(newest_checkpoint(run, print), big_state(0))
    for stream in (sys.stdout, sys.stderr):
        print("full", file=stream, flush=True)
    told = []
    checkpoints = Checkpoints(run, 1, told.append)
    for limit in (100, 10_000, 1_000_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, NO_LIMIT))
        checkpoints.save(big_state(1 + limit), {})
        try:
            checkpoints.wait()
        except CheckpointError as error:
            print(error)
        print(newest_checkpoint(run, lambda line: None).step)
    print(*told, sep="\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (NO_LIMIT, NO_LIMIT))
    checkpoints.save(big_state(2), {})
    checkpoints.wait()


def test_a_full_disk_costs_the_new_checkpoint_only_and_without_one_nothing_is_printed(
    tmp_path, cache
):
    done = run_to_end([tmp_path], tmp_path, cache, main=until_the_disk_is_full)
    assert done.returncode == 0, done.stderr
    before, after = done.stderr.split("full\n")
    assert before == ""
    assert "absl" not in after  # pages of tracebacks; TensorStore may still print a few lines
    lines = [
        f"The checkpoint of step {1 + limit} was not written: File too large; "
        "earlier checkpoints are kept."
        for limit in (100, 10_000, 1_000_000)
    ]
    expected = ["full", *(line for told in lines for line in (told, "1"))]
    expected += [f"WARNING: {line}" for line in lines]
    assert done.stdout.splitlines() == expected
    assert saves(tmp_path) == ["00000002"]


def save_on_and_on(arguments):
    """Save step after step, and say when the second is begun."""
    checkpoints, first = Checkpoints(Path(arguments[0]), 2, print), int(arguments[1])
    for step in range(first, first + 1_000):
        checkpoints.save(big_state(step), {"step": step})
        if step == first + 1:
            print("second", flush=True)


def test_whenever_a_save_is_killed_a_good_checkpoint_remains(tmp_path, cache):
    # One process after another saves until it is killed; the next one continues from what is left.
    chance, step, leftovers = random.Random(0), 0, 0
    for _ in range(6):
        with Process([tmp_path, step + 1], tmp_path, cache, main=save_on_and_on) as process:
            process.read_until("second")
            time.sleep(chance.uniform(0.0, 0.3))
            process.send(signal.SIGKILL)
            assert process.end() == -signal.SIGKILL
        checkpoint = newest_checkpoint(tmp_path, print)
        assert checkpoint.step > step
        step = checkpoint.step
        assert checkpoint.facts == {"step": step}
        loaded = load_state(checkpoint, big_state(0))
        assert_same_bits(loaded, big_state(step))
        folders = [tmp_path / "checkpoints" / name for name in saves(tmp_path)]
        leftovers += sum(isinstance(module.examined(folder), str) for folder in folders)
    assert leftovers  # otherwise no save was interrupted, and this test shows nothing
    with Checkpoints(tmp_path, 2, say_nothing_is_wrong) as checkpoints:
        checkpoints.save(small_state(step + 1), {})
    assert saves(tmp_path) == [f"{step:08}", f"{step + 1:08}"]


# Runs


@pytest.mark.parametrize("devices", [1, 8])
def test_a_loaded_run_is_the_model_that_was_configured_with_its_newest_weights(
    run, tiny, state, devices
):
    hp, graph, params, _ = load_run(run, make_mesh(devices))
    assert (hp.tokenizer, hp.val_tokens) == ("bytes", 5)
    assert_same_bits(params, state(30).params)
    model = nnx.merge(graph, params)
    assert model.config == tiny  # in JSON its tuple of windows was a list
    assert np.asarray(model.embed[...]).tobytes() == np.asarray(params["embed"]).tobytes()


@pytest.mark.parametrize(
    ("num_steps", "windows", "rotary_windows"),
    [
        (90, (4, 8), (8,)),  # step 30 is the last of the first stage
        (87, (16, 12), (8, 16)),
        (60, (16, 12), (8, 16)),
        (30, (32, 40), (8, 16, 24)),  # the windows of validation
        (29, (32, 40), (8, 16, 24)),  # resumed with fewer steps than it had done
    ],
)
def test_the_model_of_a_loaded_run_is_that_of_the_stage_its_weights_were_saved_in(
    run, tiny, num_steps, windows, rotary_windows
):
    stages = tuple(
        Stage(windows=train, validation_windows=used)
        for train, used in [((4, 8), None), ((16, 12), None), ((20, 24), (32, 40))]
    )
    configure(run, num_steps=num_steps, stages=stages, model=tiny)
    _, graph, params, _ = load_run(run, make_mesh(1))
    expected = replace(tiny, windows=windows, rotary_windows=rotary_windows)
    assert nnx.merge(graph, params).config == expected


def test_of_a_run_only_the_parameters_are_read(run, state, monkeypatch):
    checkpoint = newest_checkpoint(run, say_nothing_is_wrong)
    shutil.rmtree(checkpoint.folder / "rest")
    monkeypatch.setattr(module, "newest_checkpoint", lambda run, say: checkpoint)
    assert_same_bits(load_run(run, make_mesh(1))[2], state(30).params)


def test_a_run_is_found_from_a_relative_path_and_damage_told_on_the_side(
    run, state, monkeypatch, capsys
):
    flip_a_byte(run / "checkpoints" / "00000030")
    monkeypatch.chdir(run.parent.parent)
    _, _, params, _ = load_run(run.relative_to(run.parent.parent), make_mesh(1))
    assert_same_bits(params, state(20).params)
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch("WARNING: checkpoint 00000030 .*\n", output.err)


def no_folder(run):
    shutil.rmtree(run)


def no_checkpoint(run):
    shutil.rmtree(run / "checkpoints")


def no_good_checkpoint(run):
    for name in saves(run):
        delete_a_file(run / "checkpoints" / name)


def config_of_another_program(run):
    (run / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')


def config_cut_short(run):
    (run / "config.json").write_text('{"model": ')


def config_without_stages(run):
    hp = json.loads((run / "config.json").read_text())
    del hp["stages"]
    (run / "config.json").write_text(json.dumps(hp))


def config_of_another_width(run):
    hp = json.loads((run / "config.json").read_text())
    hp["model"]["width"] *= 2
    (run / "config.json").write_text(json.dumps(hp))


def config_of_another_depth(run):
    hp = json.loads((run / "config.json").read_text())
    hp["model"]["num_layers"] += 2
    (run / "config.json").write_text(json.dumps(hp))


def config_with_other_arrays(run):
    hp = json.loads((run / "config.json").read_text())
    hp["model"]["bigram_buckets"] = 0
    (run / "config.json").write_text(json.dumps(hp))


def weights_of_another_program(run):
    no_checkpoint(run)
    (run / "checkpoints" / "00000030").mkdir(parents=True)
    (run / "checkpoints" / "00000030" / "pytorch_model.bin").write_bytes(b"\x80")


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (no_folder, "is not a run folder: it does not exist"),
        (no_checkpoint, "has no checkpoint yet: start another run"),
        (no_good_checkpoint, "none of 3 is intact"),
        (config_of_another_program, "config.json: tokenizer is missing: restore it"),
        (config_cut_short, "config.json is not valid JSON .*: restore it"),
        (config_without_stages, "config.json: stages is missing: restore it"),
        (config_of_another_width, "00000030 does not match the model in config.json.* params.*"),
        (config_of_another_depth, "00000030 does not match the model in config.json.* params.*"),
        (config_with_other_arrays, "00000030 does not match the model in config.json.* params.*"),
        (weights_of_another_program, "none of 1 is intact"),
    ],
)
def test_a_folder_that_is_not_a_runs_is_told_in_one_sentence(run, harm, what):
    harm(run)
    with pytest.raises(ConfigError, match=what) as refusal:
        load_run(run, make_mesh(1))
    assert str(run) in str(refusal.value)
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)


def test_a_state_of_another_model_is_refused_with_what_differs(run, shapes):
    checkpoint, own = newest_checkpoint(run, say_nothing_is_wrong), shapes(1)
    longer = own.params | {"head": own.params["head"].update(shape=(32, 256))}
    half = own.params | {"head": own.params["head"].update(dtype=jnp.bfloat16)}
    for wrong, told in [
        (
            replace(own, params=longer),
            "params.head is float32[32, 128], but should be float32[32, 256]: ",
        ),
        (
            replace(own, params=half),
            "params.head is float32[32, 128], but should be bfloat16[32, 128]: ",
        ),
        (replace(own, opt_state=()), ", but should be absent: "),
    ]:
        with pytest.raises(CheckpointError, match=re.escape(told)) as refusal:
            load_state(checkpoint, wrong)
        assert "\n" not in str(refusal.value)


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_told(run, shapes):
    checkpoint = newest_checkpoint(run, say_nothing_is_wrong)
    shutil.rmtree(checkpoint.folder)
    with pytest.raises(CheckpointError, match="00000030 changed while it was read"):
        load_state(checkpoint, shapes(1))
