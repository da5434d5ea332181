"""Segments of a model."""

from tiny_models import tiny_model


def test_stages_own_every_weight_once() -> None:
    model = tiny_model()
    segments = (*model.segments, *model.head("ctc").segments)
    for ref in model.weights():
        assert sum(ref.name.startswith(segment.prefixes) for segment in segments) == 1
