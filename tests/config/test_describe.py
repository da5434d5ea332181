"""The page that documents the keys of recipes is what the schema says, and says it in full.

`MPQ_WRITE_DOCS=1 pytest tests/config/test_describe.py` rewrites the tables of docs/recipes.md.
"""

import os
import re
import tomllib
from pathlib import Path

from mpq.config import Recipe, sections
from mpq.config.describe import describe
from mpq.pipeline.read import load_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs/recipes.md"


def tables() -> str:
    """Returns the part of docs/recipes.md that the schema writes."""
    lines = []
    for name, text, rows in describe():
        lines += [f"## {f'`[{name}]`' if name else 'Top level'}", "", text, ""]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        for key, kind, default, description in rows:
            lines.append(f"| `{key}` | {kind} | {f'`{default}`' if default else ''} | {description} |")
        lines.append("")
    return "\n".join(lines)


def test_the_page_says_what_the_schema_says() -> None:
    head, mark, old = PAGE.read_text().partition("<!-- from mpq/config.py -->\n\n")
    if os.environ.get("MPQ_WRITE_DOCS"):
        PAGE.write_text(head + mark + tables())
        return
    assert old == tables(), (
        "docs/recipes.md is behind mpq/config: MPQ_WRITE_DOCS=1 pytest tests/config/test_describe.py"
    )


def test_the_schema_is_described_in_full() -> None:
    """Every key of every section, with a type and a text, and defaults that TOML can read back."""
    described = {name: rows for name, _, rows in describe()}
    assert list(described) == ["", *sections()]
    for name, section in ({"": Recipe} | sections()).items():
        keys = [key for key in section.model_fields if name or key not in sections()]
        assert [row[0] for row in described[name]] == keys
        for key, kind, default, text in described[name]:
            value = section.model_fields[key].default
            assert kind and text.endswith((".", "...")) and (default == "") == (value is None), key
            if default:
                read = tomllib.loads(f"x = {default}")["x"]
                assert read == (list(value) if isinstance(value, tuple) else value)


def test_the_example_of_the_page_is_a_recipe(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(text.splitlines()) <= 30
    (tmp_path / "r.toml").write_text(text)
    recipe = load_recipe(tmp_path / "r.toml", need_files=False)
    assert recipe.stages == ["train", "evaluate", "sensitivity", "allocate", "pack", "compare"]
