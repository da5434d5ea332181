"""What several test modules use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared folder (papers, reference cases, real speech), or the test is skipped."""
    folder = Path(os.environ.get("MPQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"not run: needs the shared data folder, which is not at {folder} (set MPQ_SHARED)")
    return folder
