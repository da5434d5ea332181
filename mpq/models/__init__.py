"""Models of every family behind one interface: `load_model(path)` returns an `AsrModel`."""

from mpq.models.loading import load_model, model_file

__all__ = ["load_model", "model_file"]
