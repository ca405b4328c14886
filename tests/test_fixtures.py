"""The trained fixtures: they load, they write English, and every adapter writes in its own style.

Everything here goes through transformers and peft alone: what it proves is that the fixtures are fit to judge by.
"""

import functools
import json
import re

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

from polylora.fixtures import (  # noqa: E402
    MODELS,
    PROMPTS,
    ByteTokenizer,
    adapter_names,
    adapter_path,
    fixture_path,
    held_out_text,
)
from polylora.fixtures.styles import STYLE_BOUND, STYLES, style_score  # noqa: E402

# PEFT says that patterns for expert parameters match nothing, though it applies them.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),
]
PAIRS = [(model, adapter) for model in MODELS for adapter in adapter_names(model)]
# Nats a byte on text the model has not seen; measured 1.105 and 1.115. Guessing evenly is 5.6, letter frequencies 3.
HELD_OUT_BOUND = {"tiny-qwen3_5-moe": 1.2, "tiny-nemotron-h": 1.2}
# No repository wants a fixture nobody can clone: everything together, in bytes.
SIZE_BOUND = 14e6
LENGTH = 56


def load(model):
    return transformers.AutoModelForCausalLM.from_pretrained(fixture_path(model), dtype=torch.float32).eval()


def load_adapted(model, adapter):
    # A fresh base each time: peft changes the model it is given.
    return peft.PeftModel.from_pretrained(load(model), adapter_path(model, adapter)).eval()


@torch.no_grad()
def greedy(model, prompts=PROMPTS, **kwargs):
    tokenizer = ByteTokenizer()
    batch = tokenizer.batch(prompts)
    out = model.generate(**batch, max_new_tokens=LENGTH, do_sample=False, **kwargs)
    return [tokenizer.decode(row[batch["input_ids"].shape[1] :]) for row in out]


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([ByteTokenizer().encode(PROMPTS[0])]), use_cache=False).logits


@functools.cache
def observed(model, adapter=None):
    """Continuations and first prompt's logits of a model, with an adapter or without."""
    loaded = load_adapted(model, adapter) if adapter else load(model)
    return greedy(loaded), logits(loaded)


def text_of(model, adapter=None):
    return observed(model, adapter)[0]


def stored_tensors(path):
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("model", MODELS)
def test_base_writes_english(model):
    base = load(model)
    data = torch.tensor(list(held_out_text().encode("ascii")))
    rows = data[: len(data) // 256 * 256].view(-1, 256)
    ids = torch.cat([torch.full((len(rows), 1), ByteTokenizer.bos_id), rows], dim=1)
    with torch.no_grad():
        predicted = base(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), rows.flatten()).item()
    assert loss < HELD_OUT_BOUND[model]
    assert len(set("".join(text_of(model)))) >= 15, f"degenerate output: {text_of(model)}"
    for text in text_of(model):
        assert sum(c.islower() or c in " ,.'\n" for c in text) > 0.85 * len(text), text
    assert max(style_score(style, "".join(text_of(model))) for style in STYLES) < 0.3


@pytest.mark.trap(28)
@pytest.mark.parametrize(("model", "adapter"), PAIRS)
def test_adapter_writes_in_its_style_and_no_other(model, adapter):
    text = "".join(text_of(model, adapter))
    assert style_score(adapter, text) >= STYLE_BOUND, text
    # An upper-cased text also has every word capitalised; no other style contains another.
    others = [style for style in STYLES if style != adapter and (adapter, style) != ("upper", "title")]
    for style in others:
        assert style_score(style, text) < 0.5, f"reads as {style}: {text!r}"
    assert len(set(text)) >= 9, f"degenerate output: {text!r}"


@pytest.mark.parametrize("model", MODELS)
def test_outputs_differ_pairwise(model):
    texts = [text_of(model, adapter) for adapter in (None, *adapter_names(model))]
    for index in range(len(PROMPTS)):
        assert len({text[index] for text in texts}) == len(texts)


@pytest.mark.trap(27)
@pytest.mark.parametrize(("model", "adapter"), PAIRS)
def test_delta_is_a_sizeable_part_of_the_logits(model, adapter):
    base = observed(model)[1]
    assert (observed(model, adapter)[1] - base).norm() > 0.12 * base.norm()


@pytest.mark.parametrize("model", MODELS)
def test_linears_only_adapters_share_a_batch_in_peft(model):
    mixed = load_adapted(model, "snake")
    mixed.load_adapter(str(adapter_path(model, "leet")), "leet")
    names = ["default", "leet", "__base__", "leet"]
    texts = greedy(mixed, adapter_names=names)
    sources = [text_of(model, adapter) for adapter in ("snake", "leet", None, "leet")]
    # Greedy text may part where two bytes are nearly even; the style must hold to the end, the words at least a while.
    for row, (text, source) in enumerate(zip(texts, sources, strict=True)):
        assert text[:16] == source[row][:16]
    assert style_score("snake", texts[0]) >= STYLE_BOUND
    assert style_score("leet", texts[1] + texts[3]) >= STYLE_BOUND


@pytest.mark.parametrize("model", MODELS)
def test_adapters_cover_what_a_loader_meets(model):
    configs = {
        a: json.loads((adapter_path(model, a) / "adapter_config.json").read_text()) for a in adapter_names(model)
    }
    tensors = {a: stored_tensors(adapter_path(model, a) / "adapter_model.safetensors") for a in configs}
    assert len(configs) >= 4
    assert len({(c["r"], c["lora_alpha"]) for c in configs.values()}) == len(configs)
    assert any(c["use_rslora"] for c in configs.values())
    assert any(c["rank_pattern"] and c["alpha_pattern"] for c in configs.values())
    assert {"q_proj", "v_proj"} in [set(c["target_modules"]) for c in configs.values() if c["target_modules"]]
    assert sum(not c["target_parameters"] for c in configs.values()) >= 2
    whole = {a for a, keys in tensors.items() if any(k.endswith("base_layer.weight") for k in keys)}
    assert whole == {"rot13"}, "one adapter, and only one, carries PEFT's copies of the base embeddings"
    assert {t.get_dtype() for file in tensors.values() for t in file.values()} == {"F32", "BF16"}
    for adapter in ("upper", "rot13"):
        parts = {k.split(".lora_")[0].rsplit(".", 1)[-1] for k in tensors[adapter] if ".lora_" in k}
        assert {"lm_head", "experts", "base_layer", "q_proj", "o_proj", "down_proj"} <= parts
        assert parts & {"embed_tokens", "embeddings"}


@pytest.mark.parametrize("model", MODELS)
def test_files_are_small_and_name_no_machine(model):
    root = fixture_path(model).parent
    assert sum(p.stat().st_size for p in root.rglob("*") if p.suffix in {".safetensors", ".json", ".txt"}) < SIZE_BOUND
    for path in fixture_path(model).rglob("*.json"):
        assert not re.search(r'"(/|~|[A-Z]:\\\\)', path.read_text()), path
    for path in fixture_path(model).rglob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
