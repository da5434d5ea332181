"""Tiny SentencePiece models with the tables of its normalisation rules."""

import io

import sentencepiece


def sentencepiece_model(rule: str) -> bytes:
    """Returns a model of one letter; `rule` is nmt_nfkc, nmt_nfkc_cf, nfkc, nfkc_cf, or identity without a table."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a"]),
        model_writer=model,
        model_type="char",
        vocab_size=5,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        minloglevel=2,
    )
    return model.getvalue()


def double_array(rule: str) -> bytes:
    """Returns the double array of a rule; it follows the rule's name, the key of its field and its length."""
    model = sentencepiece_model(rule)
    start = model.rindex(f"{rule}\x12".encode()) + len(rule) + 4
    return model[start + 4 : start + 4 + int.from_bytes(model[start : start + 4], "little")]
