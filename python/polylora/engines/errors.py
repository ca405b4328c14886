"""The one error engines raise themselves."""

from __future__ import annotations


class EngineError(RuntimeError):
    """The engine cannot do what was asked of it, in the state it or the model is in."""
