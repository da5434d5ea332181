"""Evaluation: NeMo's own word errors on real speech, invariances, resuming, and what is refused before any work."""

import json
import shutil
from pathlib import Path

import jiwer
import pytest
import soundfile
import torch
from tiny_models import LABELS
from tiny_training import write_recipe, write_speech

from mpq.errors import MpqError
from mpq.models.base import AsrModel
from mpq.models.checkpoint import write_checkpoint
from mpq.models.nemo import NemoConformerCtc
from mpq.pipeline.read import load_recipe
from mpq.scoring.compare import read_evaluations
from mpq.scoring.evaluate import evaluate
from mpq.scoring.groups import read_labels
from mpq.speech.audio import read_audio
from mpq.speech.decoding import DecodeOptions
from mpq.speech.text import CharTokenizer
from mpq.speech.trn import escape_markup, read_trn, write_trn
from mpq.training.building import build_model


def run(checkpoint: Path, data: Path, out: Path, **options):
    return evaluate(checkpoint, data, out, device="cpu", quiet=True, **options)


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Makes one batch, counted from 1, end as by Ctrl-C; returns a list that collects the sizes of the batches."""
    transcribe, calls = NemoConformerCtc.transcribe, []

    def counted(model, waveforms, lengths, options):
        calls.append(len(waveforms))
        if len(calls) == at:
            raise KeyboardInterrupt
        return transcribe(model, waveforms, lengths, options)

    monkeypatch.setattr(NemoConformerCtc, "transcribe", counted)
    return calls


def test_nvidias_model_has_nemos_word_errors(shared: Path, tmp_path: Path) -> None:
    """NeMo: 4.142 %, 45 substitutions, 1 deletion, 11 insertions in 1376 words, on the development part."""
    data = shared / "data/read_speech/dev.jsonl"
    result = run(shared / "data/stt_en_conformer_ctc_small.nemo", data, tmp_path / "run")
    m = result.metrics
    assert (m.substitutions, m.deletions, m.insertions, m.words, m.utterances) == (45, 1, 11, 1376, 155)
    assert f"{m.wer:.5f}" == "0.04142"
    ref, hyp = read_trn(tmp_path / "run/ref.trn").utterances, read_trn(tmp_path / "run/hyp.trn").utterances
    independent = jiwer.process_words([" ".join(words) for words in ref.values()], [" ".join(hyp[u]) for u in ref])
    assert independent.wer == pytest.approx(m.wer)
    assert 0 < result.real_time_factor < 10 and m.audio_seconds == pytest.approx(472.35, abs=0.01)
    lines = [json.loads(line) for line in data.read_text().splitlines()[:40]]
    few = [line | {"audio_filepath": str(data.parent / line["audio_filepath"])} for line in lines]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in few))
    run(shared / "data/stt_en_conformer_ctc_small.nemo", tmp_path / "few.jsonl", tmp_path / "few", max_batch_seconds=25)
    again = read_trn(tmp_path / "few/hyp.trn").utterances
    assert len(again) == 40 and again.items() <= hyp.items()  # whatever the batches are


def test_a_finished_batch_is_not_done_again(
    tmp_path: Path, tiny_archive: Path, tiny_manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = interrupt(monkeypatch, at=3)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_archive, tiny_manifest, tmp_path / "run", max_batch_seconds=1.5)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["hyp.journal"]
    done = sum(calls[:2])
    first = sum(json.loads(line).get("seconds", 0) for line in (tmp_path / "run/hyp.journal").read_text().splitlines())
    result = run(tiny_archive, tiny_manifest, tmp_path / "run", max_batch_seconds=1.5)
    assert sum(calls[3:]) == 6 - done
    assert result.compute_seconds > first > 0
    assert result.metrics.utterances == 6


def test_a_command_that_is_refused_leaves_a_finished_evaluation(
    tmp_path: Path, tiny_archive: Path, tiny_manifest: Path
) -> None:
    run(tiny_archive, tiny_manifest, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    (tmp_path / "empty.jsonl").touch()
    for checkpoint, data, decode in (
        (tiny_archive, tmp_path / "empty.jsonl", DecodeOptions()),
        (tmp_path / "gone.nemo", tiny_manifest, DecodeOptions()),
        (tiny_archive, tiny_manifest, DecodeOptions("joint")),
    ):
        with pytest.raises(MpqError):
            run(checkpoint, data, tmp_path / "run", decode=decode)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_unfinished_results_of_another_model_are_not_mixed_in(
    tmp_path: Path, tiny_archive: Path, tiny_manifest: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/hyp.journal").write_text('{"format": "mpq.journal/1", "fingerprint": "another"}\n{"hyp": {}}\n')
    with pytest.raises(MpqError, match="other input"):
        run(tiny_archive, tiny_manifest, tmp_path / "run")


def test_a_reference_that_sclite_could_not_read_is_refused_before_any_work(
    tmp_path: Path, tiny_archive: Path, tiny_manifest: Path
) -> None:
    lines = [json.loads(line) for line in tiny_manifest.read_text().splitlines()[:2]]
    for index, line in enumerate(lines):
        line["audio_filepath"] = str(tiny_manifest.parent / line["audio_filepath"])
        line["utt_id"] = ("same", "SAME")[index]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(MpqError, match=r"data\.jsonl:2: .*SAME"):
        run(tiny_archive, tmp_path / "data.jsonl", tmp_path / "run")
    lines[0] |= {"utt_id": "u0", "text": "a; b"}
    lines[1] |= {"text": 'say "a"'}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(MpqError, match=r"(?s)data\.jsonl:1: .*markup.*data\.jsonl:2: .*markup"):
        run(tiny_archive, tmp_path / "data.jsonl", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_audio_is_not_mixed_with_old_hypotheses(
    tmp_path: Path, tiny_archive: Path, tiny_manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_manifest.parent, data)
    interrupt(monkeypatch, at=2)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_archive, data / tiny_manifest.name, tmp_path / "run", max_batch_seconds=1.5)
    wave, rate = soundfile.read(data / "utt5.wav")
    soundfile.write(data / "utt5.wav", wave[::-1], rate)
    with pytest.raises(MpqError, match="other input"):
        run(tiny_archive, data / tiny_manifest.name, tmp_path / "run", max_batch_seconds=1.5)


def test_outputs_that_sclite_would_misread_are_escaped_and_counted(
    tmp_path: Path, tiny_archive: Path, tiny_manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        NemoConformerCtc,
        "transcribe",
        lambda model, waves, lengths, options: ['a "few* words'] * (len(waves) - 1) + ["a few words"],
    )
    result = run(tiny_archive, tiny_manifest, tmp_path / "run", max_batch_seconds=100)
    assert result.escaped == 5 and result.metrics.substitutions == 5
    hypotheses = list(read_trn(tmp_path / "run/hyp.trn").utterances.values())
    assert hypotheses.count(("a", "\ufffdfew\ufffd", "words")) == 5
    ref, _, _ = read_evaluations(tmp_path / "run", tmp_path / "run")
    assert len(ref.utterances) == 6


@pytest.mark.parametrize("text", ["", "a ; b", 'x"', "**a b*", "* ** ***", "@", "{ a / b }", "\ufeffa"])
def test_escaped_text_can_be_read_back(tmp_path: Path, text: str) -> None:
    write_trn(tmp_path / "x.trn", ["u"], [escape_markup(text)])
    assert len(read_trn(tmp_path / "x.trn").utterances["u"]) == len(text.split())


def test_the_folder_is_replaced(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    first = run(tiny_archive, tiny_manifest, tmp_path / "run")
    (tmp_path / "run/hyp.trn").write_text("stale (x)\n")
    second = run(tiny_archive, tiny_manifest, tmp_path / "run")
    assert first.metrics == second.metrics
    assert "stale" not in (tmp_path / "run/hyp.trn").read_text()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[AsrModel, Path]:
    """A tiny hybrid model whose searches disagree, and the folder of its checkpoint, with data.jsonl."""
    folder = tmp_path_factory.mktemp("hybrid")
    recipe = load_recipe(write_recipe(folder / "r.toml"), stages=[], need_files=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = build_model(recipe, CharTokenizer(LABELS[:6]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.4 * torch.randn_like(parameter))
    write_checkpoint(folder / "model.safetensors", model)
    write_speech(folder, name="data.jsonl")
    return model, folder


DECODES = [
    DecodeOptions(),
    DecodeOptions("prefix", beam_size=3),
    DecodeOptions("joint", beam_size=3, ctc_weight=0.5),
    DecodeOptions("joint", beam_size=2, ctc_weight=0.0, length_bonus=-0.5),
]


def test_every_search_gives_what_the_model_says_of_each_utterance_alone(
    hybrid: tuple[AsrModel, Path], tmp_path: Path
) -> None:
    model, folder = hybrid
    found = []
    for index, decode in enumerate(DECODES):
        out = tmp_path / str(index)
        run(folder, folder / "data.jsonl", out, decode=decode, max_batch_seconds=5)
        hypotheses = read_trn(out / "hyp.trn").utterances
        for name, words in hypotheses.items():
            waveform = read_audio(folder / f"{name}.wav", model.sample_rate)
            (text,) = model.transcribe(waveform[None], torch.tensor([len(waveform)]), decode)
            assert text.split() == list(words)
        found.append(hypotheses)
        said = json.loads((out / "metrics.json").read_text())["decode"]
        assert (said["method"], said["beam_size"]) == (decode.method, decode.beam_size)
        assert (said["ctc_weight"], said["length_bonus"]) == (decode.ctc_weight, decode.length_bonus)
    assert all(one != other for index, one in enumerate(found) for other in found[:index])


def test_hypotheses_of_another_search_are_not_mixed_in(
    hybrid: tuple[AsrModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpq.scoring import evaluate as module

    def once(*arguments: object) -> object:
        monkeypatch.setattr(module, "read_batch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        return read(*arguments)

    read = module.read_batch
    monkeypatch.setattr(module, "read_batch", once)
    _, folder = hybrid
    with pytest.raises(KeyboardInterrupt):
        run(folder, folder / "data.jsonl", tmp_path, decode=DECODES[1], max_batch_seconds=2)
    monkeypatch.undo()
    with pytest.raises(MpqError, match="other input"):
        run(folder, folder / "data.jsonl", tmp_path, decode=DECODES[2], max_batch_seconds=2)
    run(folder, folder / "data.jsonl", tmp_path, decode=DECODES[1], max_batch_seconds=2)


def test_the_joint_search_needs_a_decoder(tmp_path: Path, tiny_archive: Path, tiny_manifest: Path) -> None:
    with pytest.raises(MpqError, match="joint search needs a head that this model does not have; it has ctc"):
        run(tiny_archive, tiny_manifest, tmp_path / "run", decode=DecodeOptions("joint"))


def test_what_the_manifest_says_of_each_utterance_is_kept(
    tmp_path: Path, tiny_archive: Path, tiny_manifest: Path
) -> None:
    lines = [json.loads(line) for line in tiny_manifest.read_text().splitlines()[:3]]
    for line, more in zip(lines, ({"speaker": 7, "room": "A"}, {"room": 2}, {}), strict=True):
        line |= more | {"audio_filepath": str(tiny_manifest.parent / line["audio_filepath"])}
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(tiny_archive, tmp_path / "few.jsonl", tmp_path / "run")
    ids = list(read_trn(tmp_path / "run/ref.trn").utterances)
    assert read_labels(tmp_path / "run", "room").values == {ids[0]: "A", ids[1]: "2"}
    assert read_labels(tmp_path / "run", "speaker").values[ids[0]] == "7"
