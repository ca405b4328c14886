"""Adapters: PEFT folders read safely and bound to a model's sites, or refused with every reason."""

from __future__ import annotations

from .bind import bind, load_adapter
from .config import MAX_RANK, LoraConfig
from .errors import AdapterError
from .peft_reader import PeftAdapter, read_peft
from .shard import expert_window, shard, shard_site
from .weights import AdapterWeights, Entry, SiteWeights

__all__ = [
    "MAX_RANK",
    "AdapterError",
    "AdapterWeights",
    "Entry",
    "LoraConfig",
    "PeftAdapter",
    "SiteWeights",
    "bind",
    "expert_window",
    "load_adapter",
    "read_peft",
    "shard",
    "shard_site",
]
