"""Tiny models to fine-tune, allocations for them, and the command's recipe for it."""

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import recipe as training_recipe
from tiny_training import write_speech
from torch import Tensor

from mpq.allocation.assignment import planned_bytes
from mpq.allocation.records import Allocation
from mpq.artifact.sizes import file_bytes
from mpq.artifact.weights import WeightFormat, quantize_weight
from mpq.config import Recipe
from mpq.files import sha256_file
from mpq.finetuning.loop import Finetuner
from mpq.finetuning.record import FinetuneResult
from mpq.finetuning.run import finetune
from mpq.loading import load_model
from mpq.models.checkpoint import write_checkpoint
from mpq.pipeline.read import make_recipe
from mpq.quantization.spec import FLOAT_BITS, QuantSpec
from mpq.speech.text import CharTokenizer
from mpq.training.building import build_model
from mpq.training.distillation import Distillation, DistillationLosses

NEAREST = WeightFormat(QuantSpec(8, rounding="nearest"))
OPTIONS = {
    "epochs": 2,
    "batch_frames": 260,
    "warmup_steps": 1,
    "learning_rate": 0.3,
    "scale_rate": 0.01,
    "rest_rate": 0.001,
    "workers": 0,
    "precision": "float32",
    "select": "last",
}
"""Of the section finetune: rates at which a few updates change the codes."""


TRAINED = ("abc", "bad", "deed", "bed cab")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, dev.jsonl and the checkpoint `hybrid`."""
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder, TRAINED)
    write_speech(folder, ("abed", "a bee"), "dev.jsonl")
    write_hybrid(folder)
    return folder


@pytest.fixture(scope="module")
def four(speech: Path) -> Path:
    """An allocation of 4 bits to every layer."""
    return write_allocation(speech / "four.json", speech / "hybrid", 4)


def disturbed(model: torch.nn.Module, seed: int = 7) -> None:
    """Makes the outputs of an untrained model far from uniform."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=random)
            elif tensor.is_floating_point() and not name.startswith("featurizer"):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=random))


def write_hybrid(folder: Path, **changes: Any) -> Path:
    """Writes a checkpoint folder of mpq's own model, with an attention decoder and random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = build_model(training_recipe(folder, **changes), CharTokenizer([" ", *"abcde"]))
    disturbed(model)
    out = folder / "hybrid"
    out.mkdir()
    write_checkpoint(out / "model.safetensors", model)
    return out


def write_allocation(
    path: Path,
    checkpoint: Path,
    bits: Callable[[str], float] | float,
    weight_format: WeightFormat = NEAREST,
    **fields: Any,
) -> Path:
    """Writes an allocation that gives each layer the bits that a function of its name says; rounded to nearest."""
    model = load_model(checkpoint)
    file = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    widths = {ref.name: bits(ref.name) if callable(bits) else bits for ref in model.weights()}
    size = planned_bytes(model, widths, weight_format)
    if size is None:
        state = model.state_dict()
        stored = {
            name: quantize_weight(name, state[name], weight_format, [width], {})[0]
            for name, width in widths.items()
            if width not in FLOAT_BITS
        }
        size = file_bytes(model, widths, weight_format, stored)
    found = {
        "bits": widths,
        "target_bytes": size,
        "predicted_bytes": size,
        "predicted_kl": 0.1,
        "average_bits": 3.0,
        "frontier": ((size, 0.1),),
        "quantizer": weight_format.to_json(),
        "model": {"path": str(file), "sha256": sha256_file(file)},
    }
    Allocation(**(found | fields)).save(path)
    return path


def tuning_recipe(train: Path, dev: Path, **options: Any) -> Recipe:
    """Returns what `mpq finetune` makes of its options; keys such as seed or finetune_augment are sections."""
    table: dict[str, Any] = {"data": {"train": [str(train)], "dev": str(dev)}}
    for key in ("seed", "finetune_augment"):
        if key in options:
            table[key] = options.pop(key)
    table["finetune"] = OPTIONS | options
    return make_recipe(table, [], "test")


def with_data(folder: Path, **options: Any) -> Recipe:
    return tuning_recipe(folder / "train.jsonl", folder / "dev.jsonl", **options)


class Spy:
    """Keeps, at the end of each epoch, what the loop evaluated and what it trained.

    Attributes:
        seen: {epoch: [{name: weight as the model saw it} of each allocation]}, of the candidates' weights.
        latents: {epoch: {name: latent}}.
        updates: [{name: trained tensor}] after each update, the start first.
    """

    def __init__(self) -> None:
        self.seen: dict[int, list[dict[str, Tensor]]] = {}
        self.states: dict[int, dict[str, Tensor]] = {}
        self.updates: list[list[Tensor]] = []
        self.tuner: Finetuner | None = None

    def watch(self, patch: Any) -> "Spy":
        keep, finish, start = Finetuner._write_candidate, Finetuner.finish_update, Finetuner.begin

        def keeping(tuner: Finetuner) -> list[int]:
            self.tuner = tuner
            with torch.no_grad():
                self.seen[tuner.epochs[-1].epoch] = [
                    {name: weight.clone() for name, weight in tuner.weights(index).items()}
                    for index in range(len(tuner.targets))
                ]
            self.states[tuner.epochs[-1].epoch] = {key: one.clone() for key, one in tuner._tensors().items()}
            return keep(tuner)

        def starting(tuner: Finetuner) -> None:
            self.updates.append([one.detach().clone() for one in tuner._trained()])
            start(tuner)

        def finishing(tuner: Finetuner) -> None:
            finish(tuner)
            self.updates.append([one.detach().clone() for one in tuner._trained()])

        patch.setattr(Finetuner, "_write_candidate", keeping)
        patch.setattr(Finetuner, "finish_update", finishing)
        patch.setattr(Finetuner, "begin", starting)
        return self


def tune(checkpoint: Path, allocation: Path | list[Path], recipe: Recipe, out: Path, **more: Any) -> FinetuneResult:
    paths = allocation if isinstance(allocation, list) else [allocation]
    return finetune(checkpoint, paths, recipe, out, device="cpu", quiet=True, **more)


def without_times(folder: Path) -> dict[str, Any]:
    """Returns what a folder says of a training, times and its own path aside."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    raw = json.loads((folder / "finetune.json").read_text())
    raw.pop("seconds")
    for entry in (*lines, *raw["epochs"]):
        entry.pop("seconds", None)
    for size in raw["sizes"]:
        size["path"] = Path(size["path"]).name
    return {"log": lines, "result": raw}


def assert_same_training(out: Path, other: Path) -> None:
    """The same log and result but for the times, and the same files to the last bit (how often to save aside)."""
    assert without_times(out) == without_times(other)
    names = {path.name for path in other.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"log.jsonl", "finetune.json", "recipe.json"}:
        assert (out / name).read_bytes() == (other / name).read_bytes(), name


def assert_holds(path: Path, weights: Mapping[str, Tensor]) -> None:
    """The model in a file has exactly these weights."""
    state = load_model(path).state_dict()
    for name, weight in weights.items():
        assert torch.equal(state[name], weight), name


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def run_as_process(rank: int, port: int, arguments: list[str], is_spoilt: bool) -> None:
    """Runs a command as one of the two processes that torchrun would start, and exits as the command line does.

    Args:
        rank: 0 or 1.
        port: Where a TCPStore listens.
        arguments: The command.
        is_spoilt: Whether this process's losses are not finite from the third update on.
    """
    from mpq.cli.main import main

    losses = Distillation.forward

    def spoilt(self: Distillation, *inputs: Any) -> DistillationLosses:
        found, self.calls = losses(self, *inputs), getattr(self, "calls", 0) + 1
        return (
            found._replace(kl={head: one * float("nan") for head, one in found.kl.items()}) if self.calls > 2 else found
        )

    if is_spoilt:
        Distillation.forward = spoilt

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    main(arguments)


def two_processes(arguments: list[object], spoilt: int | None = None) -> list[int | None]:
    """Returns the exit statuses of two processes that run a command together; the losses of one may be spoilt."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_finetune", "torch._dynamo"])
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = list(map(str, arguments))
    running = [
        context.Process(target=run_as_process, args=(rank, store.port, words, rank == spoilt)) for rank in range(2)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(600)  # a loaded machine is slow
    return [process.exitcode for process in running]
