"""Tiny corpora for the tests of the recipes."""

from pathlib import Path

import pytest
from tiny_corpora import DICTIONARY, STM, TRANSCRIPTS, write_sph


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Path]:
    """The four folders, by the options that name them."""
    root = tmp_path / "corpora"
    for side, lines in TRANSCRIPTS.items():
        folder = root / "ms98" / side[:2] / side[:4]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"sw{side}-ms98-a-trans.text").write_text(lines)
        (folder / f"sw{side}-ms98-a-word.text").write_text("not read\n")
    (root / "ms98/sw-ms98-dict.text").write_text(DICTIONARY)
    write_sph(root / "swbd/swb1_d1/data/sw02001.sph", seed=1)
    write_sph(root / "swbd/swb1_d2/data/sw2005.sph", seed=2)
    write_sph(root / "audio/hub5e_00/english/en_4156.sph", seed=3)
    write_sph(root / "audio/hub5e_00/english/sw_4390.sph", seed=4)
    (root / "text/reference").mkdir(parents=True)
    (root / "text/reference/hub5e00.english.000405.stm").write_text(STM)
    return {
        "--swbd": root / "swbd",
        "--ms98": root / "ms98",
        "--hub5-audio": root / "audio",
        "--hub5-text": root / "text",
    }
