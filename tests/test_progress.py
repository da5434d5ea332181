"""Progress is shown by whoever asks for it, and by nobody else."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mpq.progress import Advance, progress, progress_shown_by


def test_a_display_is_told_of_all_progress_within_its_block() -> None:
    told: list[object] = []

    @contextmanager
    def display(description: str, total: float, unit: str) -> Iterator[Advance]:
        told.append((description, total, unit))
        yield told.append
        told.append("end")

    with progress_shown_by(display):
        with progress("packing", 3, unit="layers") as advance:
            advance(1)
            advance(2)
        for total, quiet in ((3, True), (0, False)):
            with progress("unseen", total, quiet) as advance:
                advance(1)
    with progress("later", 3) as advance:
        advance(1)
    assert told == [("packing", 3, "layers"), 1, 2, "end"]


def test_python_shows_nothing_by_itself(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich would take this for a terminal
    with progress("packing", 3) as advance:
        advance(1)
    assert capfd.readouterr() == ("", "")
