"""Architectures of the digits model compared: made by hand, and searched.

    python recipes/digits/architectures.py OUT [--rows NAME ...] [--only-table] [-- --set data.root=...]

Each row is one `mpq train` or `mpq search` of search.toml, then `mpq evaluate` on the five test sets; the test is
MAPSSWE against the baseline of the same seed. Rows named choice are searches without the training after it. What is
finished is not done again, and a row that was cut off goes on; several of these commands may share OUT if they do
different rows, once base-s0 and the supernets that rows share are trained. The tables go to stdout.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from mpq.pipeline.read import load_recipe
from mpq.scoring.compare import compare, read_evaluations

RECIPE = Path(__file__).with_name("search.toml")
TESTS = ("babble_0", "babble_5", "white_0", "white_5", "clean")
RANKS = "search.ffn_rank=[24, 32, 40, 48, 56, 64, 72, 80, 88]"
BOTH = ("search.ffn_width=[96, 144, 192, 240, 288, 336, 384]", "search.ffn_rank=[40, 56, 72, 88]")
WIDE = f"search.ffn_width={list(range(16, 385, 16))}"
SLLS = "train.semi_orthogonal=SLLS"
TRAINED = ("checkpoint={out}/base-s0/model.safetensors", "search.final_epochs=3")
SHARED = "search.supernet={out}/super-fw-s0"
CHOICE = (SHARED, "search.final_epochs=0")


def rows() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns {name: (command, what is set)}; the last part of a name is the seed."""
    found = {f"base-s{seed}": ("train", ()) for seed in (0, 1, 2)}
    for width in (96, 216, 768):
        for seed in (0, 1, 2) if width < 768 else (0,):
            found[f"w{width}-s{seed}"] = ("train", (f"model.ffn_width={width}",))
    for placing in ("LLLL", "SLLS", "LSSL"):
        found[f"r56-{placing}-s0"] = ("train", ("model.ffn_rank=56", f"train.semi_orthogonal={placing}"))
    target, ranks = "search.target_millions=1.3", ("search.space=ranks", RANKS, SLLS)
    found["fw-e0.1-s0"] = ("search", ("search.eta=0.1", SHARED))
    found["bn-t1.3-s0"] = ("search", (target, *ranks, "search.supernet_epochs=6", *TRAINED))
    both = ("search.space=both", *BOTH, SLLS, "search.supernet_epochs=2")
    found["fwbn-t1.1-s0"] = ("search", ("search.target_millions=1.1", *both, *TRAINED))
    found["wide-e0.1-s0"] = ("search", ("search.eta=0.1", WIDE, "search.supernet_epochs=4", *TRAINED))
    for eta in ("0", "0.03", "0.3"):
        found[f"choice-e{eta}-s0"] = ("search", (f"search.eta={eta}", *CHOICE))
    for method in ("gumbel", "softmax"):
        for noise in (0, 1):
            more = (f"search.method={method}", f"search.noise_seed={noise}")
            found[f"choice-{method}-n{noise}-s0"] = ("search", (target, *more, *CHOICE))
    return found


def run(name: str, out: Path, more: list[str]) -> None:
    """Does what is left of a row."""
    command, sets = rows()[name]
    mpq, folder = [sys.executable, "-m", "mpq"], out / name
    options = [text for one in sets for text in ("--set", one.format(out=out.resolve()))]
    seed = name.rpartition("-s")[2]
    subprocess.run([*mpq, command, RECIPE, "--out", folder, "--seed", seed, *options, *more], check=True)
    if name.startswith("choice"):
        return
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


def choice_line(name: str, out: Path) -> str:
    """Returns a row of the second table: what was chosen, with the supernet's weights, and the supernet as a whole."""
    found = json.loads((out / name / "search.json").read_text())["architecture"]
    widths = (" ".join(str(one["width"]) for one in found["modules"][part::2]) for part in (0, 1))
    cells = [name, f"{found['millions']:.3f}", *(f"{found[key]:.4f}" for key in ("loss", "largest_loss"))]
    return "| " + " | ".join([*cells, *(f"{100 * found[key]:.2f}" for key in ("wer", "largest_wer")), *widths]) + " |"


def main() -> None:
    """Runs the rows that are asked for and prints the tables of all that are there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", nargs="+", choices=rows(), default=list(rows()), metavar="NAME")
    parser.add_argument("--only-table", action="store_true")
    options, more = parser.parse_known_args()
    for name in () if options.only_table else options.rows:
        run(name, options.out, [text for text in more if text != "--"])
    there = [name for name in rows() if (options.out / name / "training.json").exists()]
    print(f"| model | M parameters | dev | {' | '.join(TESTS)} |")
    print("|---" * (len(TESTS) + 3) + "|")
    for name in there:
        if not name.startswith("choice"):
            print(line(name, options.out))
    print("\n| choice | M parameters | loss | of the supernet | WER % | of the supernet | FW | FW-m |")
    print("|---" * 8 + "|")
    for name in there:
        if (options.out / name / "search.json").exists():
            print(choice_line(name, options.out))


if __name__ == "__main__":
    main()
