"""What no single key of a recipe shows: options that contradict each other, and files that are not there."""

from pathlib import Path

import pytest
from tiny_recipes import assert_faults, good

from mpq.config import Recipe
from mpq.errors import MpqError
from mpq.pipeline.contradictions import contradictions, missing_files
from mpq.pipeline.read import load_recipe

__all__ = ["good"]  # a fixture

FINETUNE = 'stages=["sensitivity","allocate","finetune"]'
SEARCH = 'stages=["search"]'


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (['stages=["evaluate","train"]'], ["stages: expected each at most once and in the order train, search"]),
        (['stages=["train","train"]'], ["stages: expected each at most once"]),
        (['stages=["train","pack"]'], ["stages: pack needs allocate before it"]),
        (['stages=["evaluate"]'], ["checkpoint: expected a trained model, since there is no stage train"]),
        (["data.test={}"], ["[data] test: expected one test set or more"]),
        (["data.train=[]"], ["[data] train: expected one manifest or more", "[data] calibration: expected audio"]),
        (["data.root=elsewhere"], ["[data] train[0]: ", "[data] dev: ", "[data] test.one: "]),
        (["model.decoder_layers=0"], ["[train] ctc_weight: expected 1 for a model without a decoder"]),
        (["train.ctc_weight=1"], ["[train] ctc_weight: 1 would leave the decoder untrained"]),
        (
            ["model.decoder_layers=0", "train.ctc_weight=1", "decode.method=joint", "sensitivity.output=decoder"],
            ['[decode] method: "joint" needs a decoder', '[sensitivity] output: "decoder" needs a decoder'],
        ),
        (["train.semi_orthogonal=SLLS"], ['[train] semi_orthogonal: "SLLS" needs factored matrices']),
        (["tokens.type=bpe"], ["[tokens] vocabulary_size: expected with type"]),
        (["tokens.vocabulary_size=9"], ["[tokens] vocabulary_size: expected with type"]),
        (["model.subsampling_factor=6"], ["[model] subsampling_factor: expected 2, 4, 8, ..., got 6"]),
        (["model.ffn_width=[8,8]"], ["[model] ffn_width: expected one number for each of the 12 blocks, got 2"]),
        (["augment.speed=[]"], ["[augment] speed: expected one factor or more"]),
        (["augment.level_db=[2,1]"], ["[augment] level_db: expected lowest and highest, got [2.0, 1.0]"]),
        (["finetune_augment.level_db=[2,1]"], ["[finetune_augment] level_db: expected lowest and highest, got"]),
        (["finetune.alpha=[9,1]"], ["[finetune] alpha: expected first and last, rising, got [9.0, 1.0]"]),
        (["finetune.anneal=[0.9,0.1]"], ["[finetune] anneal: expected first and last, rising, got [0.9, 0.1]"]),
        (['stages=["train","finetune"]'], ["stages: finetune needs allocate before it"]),
        (["sensitivity.bits=[4,4]"], ["[sensitivity] bits: expected different widths, got [4, 4]"]),
        (["allocate={}"], ["[allocate] target_mb: expected exactly one of"]),
        (["augment.speed=[0.93333]"], ["[augment] speed: expected two decimals at most, got 0.93333"]),
        (
            ["train.semi_orthogonal=SLLS", "model.ffn_rank=1000"],
            ["[train] semi_orthogonal: a rank of 1000 is above the width"],
        ),
        ([FINETUNE, "checkpoint=r.toml", "data.train=[]", "data.calibration=dev.jsonl"], ["[data] train: expected"]),
        ([FINETUNE, "checkpoint=r.toml", "data.train=['gone']"], ["[data] train[0]: "]),
        ([FINETUNE, "checkpoint=r.toml", "finetune_augment.noise=['street']"], ["[finetune_augment] noise: "]),
        ([SEARCH, "search.eta=1", "search.trained=true"], ["[search] trained: true needs the stage train before the"]),
        ([SEARCH, "search.eta=1", "search.trained=true", "checkpoint=r.toml"], ["[search] trained: true needs"]),
        ([SEARCH, "search.eta=1", "search.loss=distillation"], ['[search] loss: "distillation" needs a trained model']),
        (
            ['stages=["train","search"]', "search.eta=1", "search.loss=distillation"],
            ['[search] loss: "distillation" needs a trained model'],
        ),
        ([SEARCH, "search.eta=1", "search.temperature=[0.1,1.0]"], ["[search] temperature: expected first and"]),
        ([SEARCH, "search.eta=1", "search.held_out=gone.jsonl"], ["[search] held_out: "]),
        (
            ['stages=["train","search"]', "search.eta=1", "search.trained=true", "data.calibration=gone"],
            ["[data] calibration: "],
        ),
        ([SEARCH], ["[search] eta: expected one of eta and target_millions, got none"]),
        ([SEARCH, "search={eta=1, target_millions=2}"], ["[search] eta: expected one of eta and target_millions, got"]),
    ],
)  # fmt: skip
def test_each_contradiction_is_one_line(good: Path, overrides: list[str], words: list[str]) -> None:
    assert_faults(good, overrides, words)


def test_stages_that_need_held_out_data(good: Path) -> None:
    good.write_text(good.read_text().replace('dev = "dev.jsonl"\n', ""))
    assert_faults(
        good, [FINETUNE, "checkpoint=r.toml"], ["[data] dev: the stage finetune needs held-out data, got none"]
    )
    needed = ["[data] dev: train.select = ", "[search] held_out: expected data to choose on (or data.dev), got none"]
    assert_faults(good, [SEARCH, "search.eta=1"], needed)


def test_a_fault_says_which_keys_it_is_about() -> None:
    """So that a key which is at fault by itself silences it."""
    found = contradictions(Recipe.model_validate({"stages": ["train", "pack"], "model": {"width": 6, "heads": 4}}))
    about = {fault.partition(":")[0]: set(keys.split()) for keys, fault in found}
    assert about["[model] heads"] == {"model.heads", "model.width"} and about["stages"] == {"stages"}


def test_nothing_is_missing_where_no_stage_reads() -> None:
    data = {"train": ["gone.jsonl"], "dev": "gone.jsonl", "test": {"one": "gone.jsonl"}}
    assert missing_files(Recipe.model_validate({"stages": [], "checkpoint": "gone", "data": data})) == []


def test_only_the_files_of_the_stages_have_to_be_there(good: Path) -> None:
    recipe = load_recipe(good, ["data.calibration=no.jsonl", "data.test.no=no.jsonl"], stages=["train"])
    assert recipe.stages == ["train"]
    with pytest.raises(MpqError) as caught:
        load_recipe(good, ["data.calibration=no.jsonl", "data.test.no=no.jsonl"])
    assert str(caught.value).count("no such file") == 2
    assert load_recipe(good, ["data.calibration=no.jsonl"], need_files=False).data.calibration == "no.jsonl"
