"""Engines: what puts adapters under somebody else's model."""

from __future__ import annotations

from .errors import EngineError
from .hf import HfEngine, attach

__all__ = ["EngineError", "HfEngine", "attach"]
