"""Architectures of the digits model compared: made by hand, and searched.

    python recipes/digits/architectures.py OUT [--rows NAME ...] [--only-table] [-- --set data.root=...]

Each row is one `mpq train` or `mpq search` of search.toml, then `mpq evaluate` on the five test sets; the test is
MAPSSWE against the baseline of the same seed. What is finished is not done again, and a row that was cut off goes on;
several of these commands may share OUT if they do different rows, once base-s0 and the supernets that rows share are
trained. The table goes to stdout.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from mpq.compare import compare, read_evaluations

RECIPE = Path(__file__).with_name("search.toml")
TESTS = ("babble_0", "babble_5", "white_0", "white_5", "clean")
RANKS = "search.ffn_rank=[24, 32, 40, 48, 56, 64, 72, 80, 88]"
WIDE = f"search.ffn_width={list(range(16, 385, 16))}"
BOTH = ("search.ffn_width=[96, 144, 192, 240, 288, 336, 384]", "search.ffn_rank=[40, 56, 72, 88]")
TRAINED = ("checkpoint={out}/base-s0/model.safetensors", "search.supernet_epochs=6")
SLLS = "train.semi_orthogonal=SLLS"
WIDTHS = "search.supernet={out}/super-fw-s0"


def rows() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns {name: (command, what is set)}; the last part of a name is the seed."""
    found = {f"base-s{seed}": ("train", ()) for seed in (0, 1, 2)}
    for width in (96, 216, 768):
        for seed in (0, 1, 2) if width < 768 else (0,):
            found[f"w{width}-s{seed}"] = ("train", (f"model.ffn_width={width}",))
    for placing in ("LLLL", "SLLL", "SLLS", "LSSL"):
        found[f"r56-{placing}-s0"] = ("train", ("model.ffn_rank=56", f"train.semi_orthogonal={placing}"))
    for eta in ("0", "0.03", "0.1", "0.3"):
        found[f"fw-e{eta}-s0"] = ("search", (f"search.eta={eta}", WIDTHS))
    found["fw-t13-s0"] = ("search", ("search.target_millions=1.3", WIDTHS))
    found["soft-t13-s0"] = ("search", ("search.target_millions=1.3", "search.method=softmax", WIDTHS))
    found["bn-t13-s0"] = ("search", ("search.target_millions=1.3", "search.space=ranks", RANKS, SLLS, *TRAINED))
    found["fwbn-t11-s0"] = ("search", ("search.target_millions=1.1", "search.space=both", *BOTH, SLLS, *TRAINED))
    found["wide-e0.1-s0"] = ("search", ("search.eta=0.1", WIDE, *TRAINED))
    return found


def run(name: str, out: Path, more: list[str]) -> None:
    """Does what is left of a row."""
    command, sets = rows()[name]
    mpq, folder = [sys.executable, "-m", "mpq"], out / name
    options = [text for one in sets for text in ("--set", one.format(out=out.resolve()))]
    seed = name.rpartition("-s")[2]
    subprocess.run([*mpq, command, RECIPE, "--out", folder, "--seed", seed, *options, *more], check=True)
    from mpq.recipes import load_recipe

    overrides = [text for flag, text in pairwise(more) if flag == "--set"]
    recipe = load_recipe(RECIPE, overrides, stages=[])
    for test in TESTS:
        data = recipe.path(recipe.data.test[test])
        decode = ["--decode", recipe.decode.method, "--beam-size", str(recipe.decode.beam_size)]
        evaluate = [*mpq, "evaluate", folder, "--data", data, "--out", folder / "eval" / test, *decode]
        subprocess.run(evaluate, check=True, stdout=sys.stderr)


def line(name: str, out: Path) -> str:
    """Returns a row of the table: parameters, WER % and p of each test, worse ones in bold."""
    folder, base = out / name, out / f"base-s{name.rpartition('-s')[2]}"
    training = json.loads((folder / "training.json").read_text())
    cells = [name, f"{training['parameters']['total'] / 1e6:.3f}", f"{100 * training['dev_wer']:.2f}"]
    for test in TESTS:
        if not (folder / "eval" / test / "metrics.json").exists():
            cells.append("")
            continue
        found = compare(*read_evaluations(base / "eval" / test, folder / "eval" / test), names=("baseline", name))
        p = "" if folder == base else f" (p {found.mapsswe.p:.2g})"
        cells.append(f"{100 * found.b.wer:.2f}{p}" if found.lossless else f"**{100 * found.b.wer:.2f}**{p}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Runs the rows that are asked for and prints the table of all that are there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", nargs="+", choices=rows(), default=list(rows()), metavar="NAME")
    parser.add_argument("--only-table", action="store_true")
    options, more = parser.parse_known_args()
    for name in () if options.only_table else options.rows:
        run(name, options.out, [text for text in more if text != "--"])
    print(f"| model | M parameters | dev | {' | '.join(TESTS)} |")
    print("|---" * (len(TESTS) + 3) + "|")
    for name in rows():
        if (options.out / name / "training.json").exists():
            print(line(name, options.out))


if __name__ == "__main__":
    main()
