"""A run to write to."""

import pytest

from nanogpt.runs.folder import Run, new_folder


@pytest.fixture
def run(tmp_path):
    with Run(new_folder(tmp_path / "runs", "some", "laptop")) as run:
        yield run
