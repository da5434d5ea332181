"""The chain of commands that several test modules look at."""

from pathlib import Path

import pytest
from tiny_cli import result_json


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_archive: Path, tiny_manifest: Path) -> dict:
    """The README's six commands on the tiny model; the JSON that each printed."""
    folder = tmp_path_factory.mktemp("chain")
    sens, alloc, small = folder / "sens.json", folder / "alloc.json", folder / "small.safetensors"
    found = {"folder": folder}
    data = ["--data", tiny_manifest]
    found["fp32"] = result_json("evaluate", tiny_archive, *data, "--out", folder / "fp32")
    found["sensitivity"] = result_json("sensitivity", tiny_archive, *data, "--bits", "2,4,8", "--out", sens)
    found["target"] = sum(
        found["sensitivity"]["layers"][i]["bytes"]["4"] for i in range(len(found["sensitivity"]["layers"]))
    )
    found["target"] += found["sensitivity"]["fixed_bytes"]
    found["allocation"] = result_json("allocate", sens, "--target-mb", found["target"] / 2**20, "--out", alloc)
    found["pack"] = result_json("pack", tiny_archive, "--allocation", alloc, "--out", small)
    found["small"] = result_json("evaluate", small, *data, "--out", folder / "small")
    found["comparison"] = result_json("compare", folder / "fp32", folder / "small", "--out", folder / "comparison.json")
    found["inspection"] = result_json("inspect", small)
    return found
