"""Model tables: which sites a model has, by ``config.model_type``. One file a family."""

from __future__ import annotations

from dataclasses import replace

from . import deepseek_v3, llama, moe, nemotron_h, qwen3_5
from .base import Kind, ModelTable, Parallel, Part, Site, Slice, Source

_BUILDERS = {
    name: family.build for family in (llama, qwen3_5, nemotron_h, deepseek_v3, moe) for name in family.MODEL_TYPES
}

# Multimodal models: the decoder is that of their text config, under the prefix their class hangs it at.
_WRAPPERS = {
    "qwen3_5": "model.language_model.",
    "qwen3_5_moe": "model.language_model.",
    "gemma3": "model.language_model.",
    "kimi_k25": "model.language_model.",
    "mistral3": "model.language_model.",
}


class UnknownModelError(ValueError):
    """No family file knows this ``model_type``."""


def known_model_types() -> list[str]:
    """Every ``model_type`` that :func:`model_table` has a table for, sorted."""
    return sorted((*_BUILDERS, *_WRAPPERS))


def model_table(config_or_model, fused: bool) -> ModelTable:
    """Table of a model's sites.

    Args:
        config_or_model: a Hugging Face config, or the model itself (then the decoder's place is read off its modules,
            which a config of a multimodal model leaves open).
        fused: True for the modules engines run (``qkv_proj``, ``gate_up_proj``, ``in_proj_qkvz``, ...); False for one
            site a Hugging Face module, as ``named_modules()`` has them. Experts are the same two sites in both.

    Returns:
        The table; the site paths of an unfused one are module paths, those of expert sites parameter paths.

    Raises:
        UnknownModelError: no family file knows ``config.model_type``.
    """
    is_model = hasattr(config_or_model, "named_modules")
    config = config_or_model.config if is_model else config_or_model
    model_type, prefix = getattr(config, "model_type", None), "model."
    if model_type in _WRAPPERS:
        config, prefix = config.text_config, _WRAPPERS[model_type]
    build = _BUILDERS.get(getattr(config, "model_type", None))
    if build is None:
        known = ", ".join(known_model_types())
        raise UnknownModelError(f"polylora: model_table: model_type must be one of {known}, got {model_type!r}")
    if is_model:
        names = {name for name, _ in config_or_model.named_modules()}
        prefix = next((p for p in (prefix, "model.") if f"{p}layers" in names), prefix)
    table = build(config, fused, prefix)
    return _with_real_scales(table, config_or_model) if is_model and not fused else table


def _with_real_scales(table: ModelTable, model) -> ModelTable:
    """Gemma's factor sits in the embedding module or, in other versions of transformers, in the model around it."""
    sites = dict(table.sites)
    for path, site in table.sites.items():
        if site.kind == "embedding" and not hasattr(model.get_submodule(path), "embed_scale"):
            sites[path] = replace(site, output_scale=1.0)
    return replace(table, sites=sites)


__all__ = [
    "Kind",
    "ModelTable",
    "Parallel",
    "Part",
    "Site",
    "Slice",
    "Source",
    "UnknownModelError",
    "known_model_types",
    "model_table",
]
