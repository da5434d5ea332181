"""Cases that NIST SCTK itself has scored, and what it said of them."""

import json
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "mapsswe"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.json"))


def expected(case):
    return json.loads((GOLDEN / case / "expected.json").read_text(encoding="utf-8"))
