"""Runs with parameters sharded over processes, resumed on other devices."""

import shutil
from pathlib import Path

import pytest

import train_gpt
from tests.devices.test_processes import losses, processes
from tests.programs import Process
from tests.run_folders import died_after
from tests.small_runs import LONGER, RUN, resume

ARGUMENTS = [*RUN, "--model.num-heads", "4"]  # which two devices share, in pairs too


def assert_close(found, expected):
    """Assert equal losses, up to rounding errors, which grow from step to step."""
    assert found.keys() == expected.keys()
    for step, pair in expected.items():
        rel = 1e-5 if step <= 5 else 1e-4
        for loss, other in zip(found[step], pair, strict=True):
            assert loss == (other and pytest.approx(other, rel=rel)), step


def alone_and_in_parts(place, cache):
    """The same run on one device, and with both shardings on four devices of two processes."""
    with Process([*ARGUMENTS, "--run-name", "alone"], place, cache) as process:
        assert (process.end(), process.stderr) == (0, "")
    divided = ["--mesh", "data=2,model=2", "--shard-params", "--batch-size", "2"]
    divided += ["--canonical-masking"]  # bytes can come in any order, so it changes nothing
    with processes([*ARGUMENTS, *divided, "--run-name", "parts"], place, cache) as (
        (one, two),
        (end,),
    ):
        statuses = [one.end(), end.result()]
    assert statuses == [0, 0], (one.stderr, two.stderr)
    return Path("runs/alone"), Path("runs/parts")


def test_a_run_in_parts_loses_as_one_on_a_device_does_and_goes_on_on_any_devices(
    place,
    cache,
):
    alone, parts = alone_and_in_parts(place, cache)
    assert_close(losses(parts), losses(alone))
    assert "\ncanonical masking: " in (parts / "log.txt").read_text()

    for devices, arguments in {
        1: ["--mesh", "None", "--no-shard-params"],
        4: ["--mesh", "None", "--rematerialize", "True"],
    }.items():
        shutil.rmtree(place / "runs" / "a", ignore_errors=True)
        run = died_after(7, parts, place)
        process, status, errors = resume(
            run, cache, *arguments, "--batch-size", "2", devices=devices
        )
        assert (status, errors) == (0, "")
        assert "resuming runs/a after step 7" in process.lines
        assert_close(losses(run), losses(alone))
        assert max(losses(run)) == LONGER


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mesh", "8"], "mesh must give devices per axis, such as data=4,model=2"),
        (["--mesh", "data=2"], "mesh data=2 leaves 6 of 8 devices idle"),
        (["--mesh", "data=4,model=4"], "needs 16 devices, but JAX finds 8"),
        (
            ["--mesh", "model=2"],
            "Pairs of heads (num_heads / 2): 1 cannot be split over 2 devices",
        ),
        (
            ["--shard-params", "--model.bigram-buckets", "60"],
            "bigram_embed cannot be divided by data=8",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_told_in_one_sentence_before_a_run_is_made(
    place,
    capsys,
    arguments,
    told,
):
    assert train_gpt.main([*RUN, "--batch-size", "1", *arguments]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert told in sentence
    assert not Path("runs").exists()
