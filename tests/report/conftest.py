"""Run folders to report on: a finished one with realistic files, and one with a comparison too."""

from pathlib import Path

import pytest

from mlxtune.rundir import RunDir
from tests import reported


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return reported.make_run(tmp_path)


@pytest.fixture
def compared(run: RunDir) -> RunDir:
    """The run with a comparison."""
    reported.add_comparison(run)
    return run
