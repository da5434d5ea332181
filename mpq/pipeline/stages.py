"""The stages of a recipe, each with its inputs, its outputs and its work in the folder of `mpq run`.

To add a stage, write its class, put it into `STAGES`, and its name into `mpq.config.STAGES`. All of them work on one
`Setting`, which knows the paths of the run folder and the models.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from mpq import __version__
from mpq.allocation.pack import pack
from mpq.allocation.records import Allocation
from mpq.allocation.solve import allocate
from mpq.finetuning.loop import RESULT_FILE
from mpq.finetuning.run import finetune
from mpq.identity import Inputs, file_sha256, options_of
from mpq.loading import PACKED_FILE, model_sha256
from mpq.models.checkpoint import MODEL_FILE
from mpq.pipeline.figures import evaluation_figures, search_figures
from mpq.pipeline.setting import Setting, scheme_and_widths_of
from mpq.scoring.compare import compare, read_evaluations
from mpq.scoring.evaluate import evaluate
from mpq.search.record import SEARCH_FORMAT
from mpq.search.run import RESULT_FILE as SEARCH_FILE
from mpq.search.run import search
from mpq.search.start import imitates
from mpq.sensitivity.measure import METHODS, measure_sensitivity
from mpq.sensitivity.records import SensitivityTable
from mpq.training.objectives import IMITATION_OPTIONS
from mpq.training.run import train

SUPERNET_OPTIONS = ("space", "ffn_width", "ffn2_width", "ffn_rank", "ffn2_rank", "supernet_epochs", "loss")
"""The options of [search] that the training of the supernet depends on."""
EVALUATION_FILES = ("ref.trn", "hyp.trn", "metrics.json")


class Stage(ABC):
    """One stage.

    Attributes:
        name: Its name in a recipe.
        is_replaced: Whether it is done anew where its inputs have changed; else the command that it calls refuses that.
        is_adopted: Whether a result that is not on record is left to the command, which takes it as its own where its
            inputs are the same and refuses it otherwise; else it is set aside.
        after: The stages whose files it reads.
        outputs: The files that are there when it is complete.
    """

    name: ClassVar[str]
    is_replaced: ClassVar[bool] = True
    is_adopted: ClassVar[bool] = False
    after: tuple[str, ...]
    outputs: tuple[Path, ...]

    def __init__(self, setting: Setting) -> None:
        self.setting, self.recipe, self.out = setting, setting.recipe, setting.out

    @abstractmethod
    def inputs(self) -> Inputs:
        """Returns all that its result depends on; the files of earlier stages have to be there."""

    @abstractmethod
    def act(self) -> dict[str, Any]:
        """Does the work of the stage, and returns its figures."""

    def places(self) -> list[Path]:
        """Returns the files and folders that it writes; nothing else is in these folders."""
        return list(self.outputs)

    def kept(self) -> dict[Path, Inputs]:
        """Returns {folder inside its own: the folder's inputs}; it stays where these are unchanged."""
        return {}


class Train(Stage):
    """The training of the recipe's model."""

    name = "train"
    is_replaced = False  # it may have taken a week
    is_adopted = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.after, folder = (), self.out / self.name
        self.outputs = (folder / MODEL_FILE, folder / "training.json")

    def inputs(self) -> Inputs:
        return Inputs.of(**self.setting.training_inputs())

    def places(self) -> list[Path]:
        return [self.out / self.name]

    def act(self) -> dict[str, Any]:
        done = train(self.recipe, self.out / self.name, device=self.setting.device, quiet=self.setting.quiet)
        return {"dev_wer": done.dev_wer, "epochs": len(done.epochs), "parameters": done.parameters}


class Search(Stage):
    """The search for a smaller architecture, from scratch or from a trained model."""

    name = "search"
    is_adopted = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.after = ("train",) if self.recipe.search.trained else ()
        self.outputs = (setting.found / MODEL_FILE, setting.found / SEARCH_FILE)

    def inputs(self) -> Inputs:
        options = options_of(self.recipe.search, without=("supernet", "held_out", "trained"))
        held_out = self.setting.identity(self.recipe.search.held_out or self.recipe.data.dev or "")
        return Inputs.of(supernet=self._supernet_inputs().values, search=options, held_out=held_out)

    def _supernet_inputs(self) -> Inputs:
        start, recipe = self.setting.start, self.recipe
        trained = {
            "start": start and model_sha256(start),
            "calibration": start and self.setting.calibration_identity(),
            "finetune": options_of(recipe.finetune, only=IMITATION_OPTIONS) if imitates(recipe.search, start) else {},
        }
        options = options_of(recipe.search, only=SUPERNET_OPTIONS)
        return Inputs.of(
            **self.setting.training_inputs() | {"search_format": SEARCH_FORMAT, "search": options} | trained
        )

    def places(self) -> list[Path]:
        return [self.setting.found]

    def kept(self) -> dict[Path, Inputs]:
        return {self.setting.found / "supernet": self._supernet_inputs()}

    def act(self) -> dict[str, Any]:
        setting, start = self.setting, self.setting.start
        begun = self.recipe.model_copy(update={"checkpoint": start and str(start)})
        result = search(begun, setting.found, device=setting.device, quiet=setting.quiet)
        return search_figures(result, setting.found / MODEL_FILE, setting.baseline)


class Evaluate(Stage):
    """The word errors of the float model that the packed ones are compared with."""

    name = "evaluate"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.after = ("train",) if setting.baseline else ("search",)
        self.outputs = evaluation_files(setting, "float")

    def inputs(self) -> Inputs:
        model = model_sha256(self.setting.reference)
        return Inputs.of(mpq=__version__, model=model, **self.setting.test_inputs())

    def places(self) -> list[Path]:
        return [self.out / "float"]

    def act(self) -> dict[str, Any]:
        return {"tests": evaluate_all(self.setting, self.setting.reference, "float")}


class Sensitivity(Stage):
    """The change of the model's output that the rounding of each layer makes."""

    name = "sensitivity"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.after, self.outputs = (setting.maker,), (setting.table,)

    def inputs(self) -> Inputs:
        return Inputs.of(
            mpq=__version__,
            model=model_sha256(self.setting.checkpoint),
            seed=self.recipe.seed,
            data=self.setting.reading() | {"calibration": self.setting.calibration_identity()},
            sensitivity=options_of(self.recipe.sensitivity),
        )

    def places(self) -> list[Path]:
        return [self.setting.table, self.setting.table.with_name(self.setting.table.name + ".journal")]

    def act(self) -> dict[str, Any]:
        setting, options = self.setting, self.recipe.sensitivity
        measured = measure_sensitivity(
            setting.checkpoint,
            setting.calibration,
            scheme_and_widths_of(self.recipe)[1],
            setting.table,
            setting.quantizer(),
            method=options.method,
            output=options.output,
            max_seconds=options.seconds or METHODS[options.method],
            seed=self.recipe.seed,
            channel=self.recipe.data.channel,
            skip_bad=self.recipe.data.skip_bad,
            is_varied=options.vary,
            device=setting.device,
            quiet=setting.quiet,
        )
        return {"layers": len(measured.layers)}


class Allocate(Stage):
    """The bit-width of each layer."""

    name = "allocate"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.after, self.outputs = ("sensitivity",), (setting.allocation,)

    def inputs(self) -> Inputs:
        table = file_sha256(self.setting.table)
        return Inputs.of(mpq=__version__, sensitivity_file=table, allocate=options_of(self.recipe.allocate))

    def act(self) -> dict[str, Any]:
        answer = allocate(SensitivityTable.load(self.setting.table), **self.recipe.allocate.model_dump())
        answer.save(self.setting.allocation)
        return {"average_bits": answer.average_bits, "predicted_bytes": answer.predicted_bytes}


class Pack(Stage):
    """The packed file, rounded without training."""

    name = "pack"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.after, self.outputs = (setting.maker, "allocate"), (setting.packed,)

    def inputs(self) -> Inputs:
        model = model_sha256(self.setting.checkpoint)
        return Inputs.of(mpq=__version__, model=model, allocation=file_sha256(self.setting.allocation))

    def act(self) -> dict[str, Any]:
        setting, allocation = self.setting, Allocation.load(self.setting.allocation)
        data = setting.moved_calibration(allocation)
        done = pack(
            setting.checkpoint, setting.packed, allocation, device=setting.device, data=data, quiet=setting.quiet
        )
        return {"size_bytes": done.size_bytes, "float_bytes": done.float_bytes, "ratio": done.ratio}


class Finetune(Stage):
    """The packed file whose rounded weights were trained."""

    name = "finetune"
    is_adopted = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.after = (setting.maker, "allocate")
        self.outputs = (setting.tuned / PACKED_FILE, setting.tuned / RESULT_FILE)

    def inputs(self) -> Inputs:
        return Inputs.of(
            model=model_sha256(self.setting.checkpoint),
            allocation=file_sha256(self.setting.allocation),
            seed=self.recipe.seed,
            data=self.setting.training_data(),
            finetune=options_of(self.recipe.finetune),
            finetune_augment=options_of(self.recipe.finetune_augment),
        )

    def places(self) -> list[Path]:
        return [self.setting.tuned]

    def act(self) -> dict[str, Any]:
        setting = self.setting
        calibration = None
        if self.recipe.finetune.scales != "recomputed":
            calibration = setting.moved_calibration(Allocation.load(setting.allocation))
        result = finetune(
            setting.checkpoint,
            [setting.allocation],
            self.recipe,
            setting.tuned,
            calibration=calibration,
            device=setting.device,
            quiet=setting.quiet,
        )
        (size,) = result.sizes
        return {"size_bytes": size.size_bytes, "ratio": size.ratio, "dev_wer": size.wer}


class Compare(Stage):
    """The word errors of what was searched, packed and fine-tuned, each compared with the float model's."""

    name = "compare"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.after = ("search", "evaluate", "pack", "finetune")
        self.compared = {"tests": (setting.packed, "packed", "comparison")}
        if setting.is_searched and setting.baseline:
            self.compared["searched"] = (setting.found / MODEL_FILE, "searched", "comparison-searched")
        if "finetune" in self.recipe.stages:
            self.compared["finetuned"] = (setting.tuned / PACKED_FILE, "finetuned", "comparison-finetuned")
        self.outputs = tuple(
            path
            for _, what, prefix in self.compared.values()
            for path in (
                *evaluation_files(setting, what),
                *(self.out / f"{prefix}-{name}.json" for name in setting.tests),
            )
        )

    def inputs(self) -> Inputs:
        transcripts = {
            name: [file_sha256(self.out / "float" / name / file) for file in ("ref.trn", "hyp.trn")]
            for name in self.setting.tests
        }
        return Inputs.of(
            mpq=__version__,
            models={what: file_sha256(model) for model, what, _ in self.compared.values()},
            float=transcripts,
            seed=self.recipe.seed,
            compare=options_of(self.recipe.compare),
            **self.setting.test_inputs(),
        )

    def places(self) -> list[Path]:
        folders = [self.out / what for _, what, _ in self.compared.values()]
        return folders + [path for path in self.outputs if path.parent == self.out]

    def act(self) -> dict[str, Any]:
        return {key: self._compare(*one) for key, one in self.compared.items()}

    def _compare(self, model: Path, what: str, prefix: str) -> dict[str, Any]:
        """Returns the figures of one model on each test set, against the float model."""
        done = evaluate_all(self.setting, model, what)
        for name in self.setting.tests:
            transcripts = read_evaluations(self.out / "float" / name, self.out / what / name)
            alpha, seed = self.recipe.compare.alpha, self.recipe.seed
            comparison = compare(*transcripts, names=("float32", what), alpha=alpha, seed=seed)
            comparison.save(self.out / f"{prefix}-{name}.json")
            test = comparison.mapsswe
            done[name] |= {"lossless": comparison.lossless, "better": test.better, "p": test.p}
            done[name] |= asdict(comparison.non_inferiority) | {"detectable": comparison.detectable}
        return done


STAGES: tuple[type[Stage], ...] = (Train, Search, Evaluate, Sensitivity, Allocate, Pack, Finetune, Compare)
"""All stages, in the order in which they run."""


def stages_of(setting: Setting) -> list[Stage]:
    """Returns the stages that the recipe names."""
    return [stage(setting) for stage in STAGES if stage.name in setting.recipe.stages]


def evaluation_files(setting: Setting, what: str) -> tuple[Path, ...]:
    """Returns the files of a model's evaluations on all test sets."""
    return tuple(setting.out / what / name / file for name in setting.tests for file in EVALUATION_FILES)


def evaluate_all(setting: Setting, model: Path, what: str) -> dict[str, dict[str, Any]]:
    """Returns a model's figures on each test set, after evaluating it there."""
    done = {}
    for name, path in setting.tests.items():
        evaluation = evaluate(
            model,
            setting.recipe.path(path),
            setting.out / what / name,
            decode=setting.decode,
            channel=setting.recipe.data.channel,
            skip_bad=setting.recipe.data.skip_bad,
            device=setting.device,
            quiet=setting.quiet,
        )
        done[name] = evaluation_figures(evaluation)
    return done
