"""Every family with a table under the engine, also those parts that PEFT does not adapt, against merged weights.

The adapter covers all sites. The reference is the same model with ``W + scale * B A`` written into it.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from polylora.adapters import AdapterError, AdapterWeights, Entry, SiteWeights
from polylora.engines import attach
from test_models_tables import CASES, WRAPPERS

transformers.logging.set_verbosity_error()
torch.backends.cudnn.allow_tf32 = False  # models with convolutions are compared in float32

SMALL = [case for case, (_, values) in CASES.items() if values.get("hidden_size", 0) <= 64]
# Wrappers whose vision tower can be made small; it is not run.
MULTIMODAL = [case for case, (_, _, vision) in WRAPPERS.items() if vision]
RANK = 3


def make_model(case, device):
    if case in WRAPPERS:
        name, text, vision = WRAPPERS[case]
        parts = {"text_config": dict(text)} | ({"vision_config": vision} if vision else {})
        make, config = getattr(transformers, name, None), (case, parts)
    else:
        make, config = transformers.AutoModelForCausalLM.from_config, CASES[case]
    if make is None or config[0] not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {case}")
    torch.manual_seed(7)
    model = make(transformers.AutoConfig.for_model(config[0], **config[1])).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, 0.1)
    return model.to(device)


def random_adapter(table, without=()):
    generator = torch.Generator().manual_seed(11)
    sites = {}
    for path, site in table.sites.items():
        if path in without:
            continue
        a, entries = [], []
        for _ in range(site.experts or 1):
            entries.append([])
            for part in site.slices:
                a.append(torch.randn(RANK, site.k, generator=generator) * 0.2)
                b = torch.randn(part.width, RANK, generator=generator) * 0.2
                entries[-1].append(Entry(len(a) - 1, b, 0.8))
        sites[path] = SiteWeights(a, entries)
    return AdapterWeights("random", sites)


def merge(model, table, adapter):
    """Writes the adapter into the weights; tied ones are taken apart first."""
    for path, weights in adapter.sites.items():
        site = table.sites[path]
        deltas = [
            [(entry.b @ weights.a[entry.a] * entry.scale).to(model.device) for entry in row] for row in weights.entries
        ]
        if site.experts:
            parameter = model.get_parameter(path)
            for expert, parts in enumerate(deltas):
                delta = torch.stack(parts, 1).flatten(0, 1) if site.interleaved else torch.cat(parts)
                parameter[expert] += delta.T if site.transposed else delta
            continue
        module = model.get_submodule(path)
        module.weight = torch.nn.Parameter(module.weight.clone(), requires_grad=False)
        if site.kind == "embedding":
            module.weight += deltas[0][0].T / site.output_scale
        else:
            module.weight += torch.cat(deltas[0])


@torch.no_grad()
@pytest.mark.parametrize("case", [*SMALL, *MULTIMODAL])
def test_every_site_of_every_family(case, device):
    model = make_model(case, device)
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0)).to(device)
    base = model(input_ids=ids, use_cache=False).logits
    engine = attach(model)
    # Llama 4 weights the tokens before the experts and runs all of them through all: served elsewhere, not here.
    without = [path for path, site in engine.table.sites.items() if site.experts] if case == "llama4_text" else []
    if without:
        with pytest.raises(AdapterError, match="forward must take"):
            engine.load("all", random_adapter(engine.table))
    adapter = random_adapter(engine.table, without)
    engine.load("all", adapter)
    with engine.batch(["all", None, "all"]):
        got = model(input_ids=ids, use_cache=False).logits
    engine.detach()
    merge(model, engine.table, adapter)
    want = model(input_ids=ids, use_cache=False).logits
    for row in (0, 2):
        assert (want[row] - base[row]).norm() > 0.12 * want[row].norm()
        assert (got[row] - want[row]).norm() < 1e-4 * want[row].norm()
    assert (got[1] - base[1]).norm() < 1e-4 * base[1].norm()
