"""End to end on the trained fixtures: one batch with every adapter writes, row by row, what PEFT writes."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import transformers
from polylora.engines import attach
from polylora.fixtures import (
    MODELS,
    PROMPTS,
    ByteTokenizer,
    adapter_names,
    adapter_path,
    fixture_path,
    held_out_text,
)
from polylora.fixtures.styles import STYLE_BOUND, style_score

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

torch.backends.cudnn.allow_tf32 = False
LENGTH = 64


def make_model(model, device, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(fixture_path(model), dtype=dtype).to(device).eval()


def peft_model(model, adapter, device, dtype=torch.float32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = make_model(model, device, dtype)
        return peft.PeftModel.from_pretrained(base, adapter_path(model, adapter)).eval()


def attached(model, base):
    engine = attach(base)
    for name in adapter_names(model):
        engine.load(name, adapter_path(model, name))
    return engine


@torch.no_grad()
def write(model, prompts, device):
    tokenizer = ByteTokenizer()
    batch = {k: v.to(device) for k, v in tokenizer.batch(prompts).items()}
    out = model.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
    return [tokenizer.decode(row[batch["input_ids"].shape[1] :]) for row in out]


@pytest.mark.trap(28)
@pytest.mark.parametrize("model", MODELS)
def test_one_batch_writes_every_style(model, device):
    """Rows of one batch: prompt by prompt, every adapter and the base. PEFT gets the same padded batch."""
    adapters = adapter_names(model)
    assert len(adapters) >= 4
    names = [*adapters, None] * 2
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(len(names) // 2)]
    base = make_model(model, device)
    plain = write(base, prompts, device)
    with attached(model, base) as engine, engine.batch(names):
        got = write(base, prompts, device)
    equal = 0
    for name in adapters:
        rows = [i for i, n in enumerate(names) if n == name]
        texts = [got[i] for i in rows]
        assert style_score(name, "".join(texts)) >= STYLE_BOUND, texts
        want = write(peft_model(model, name, device), prompts, device)
        for i in rows:
            assert got[i][:10] == want[i][:10], (name, got[i], want[i])
            assert got[i] != plain[i]
        equal += sum(got[i] == want[i] for i in rows)
    # Somewhere two continuations may be nearly even, and rounding decides.
    assert equal >= 0.9 * 2 * len(adapters), f"{equal} of {2 * len(adapters)} texts are PEFT's"
    for i in (i for i, n in enumerate(names) if n is None):
        assert got[i][:10] == plain[i][:10]
    assert write(base, prompts, device) == plain


@pytest.mark.trap(27)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_log_probabilities_of_unseen_text(model, precision, device):
    """Every adapter in one batch, on text no adapter was trained on, against PEFT in the same dtype."""
    adapters = adapter_names(model)
    line = next(line for line in held_out_text().splitlines() if len(line) >= 200)
    ids = torch.tensor([ByteTokenizer().encode(line[:200])], device=device)
    base = make_model(model, device, precision)

    def log_probabilities(logits):
        return logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None].expand(len(logits), -1, 1))[..., 0]

    names = [None, *adapters]
    with attached(model, base) as engine, engine.batch(names):
        got = base(input_ids=ids.expand(len(names), -1), use_cache=False).logits.float()
    for i, name in enumerate(adapters, 1):
        want = peft_model(model, name, device, precision)(input_ids=ids, use_cache=False).logits.float()
        error = 0.5 * (log_probabilities(got[i : i + 1]) - log_probabilities(want)).square().mean()
        delta = 0.5 * (log_probabilities(got[i : i + 1]) - log_probabilities(got[:1])).square().mean()
        assert (want[0] - got[0]).norm() > 0.12 * got[0].norm(), name
        assert (got[i] - want[0]).norm() < 0.1 * (want[0] - got[0]).norm(), name
        bound = 1e-7 if precision == torch.float32 else 4e-3
        assert error < min(bound, 0.05 * delta), (name, error, delta)
