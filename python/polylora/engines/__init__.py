"""Engines: what puts adapters under somebody else's model."""

from __future__ import annotations

from .hf import EngineError, HfEngine, attach

__all__ = ["EngineError", "HfEngine", "attach"]
