"""The Hugging Face engine against PEFT: real classes, random weights, one PEFT model an adapter as reference."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import shutil
import threading

import peft
import polylora
import pytest
import torch
import transformers
from engine_cases import (
    FAMILIES,
    TOKENS,
    adapter_folder,
    adapter_names,
    left_padded,
    logits_of,
    make_model,
    peft_model,
)
from polylora.adapters import AdapterError
from polylora.engines import EngineError, HfEngine, attach, hf
from polylora.engines.hf_experts import grouped_mm
from polylora.layers import BatchPlans
from polylora.pool import PoolFull, SlotInUse, UnknownAdapter

transformers.logging.set_verbosity_error()

DENSE = ("llama", "gemma3")
LENGTHS = (11, 4, 9, 1, 7, 11)


def loaded(family, model, **kwargs):
    engine = attach(model, **kwargs)
    for name in adapter_names(family):
        engine.load(name, adapter_folder(family, name))
    return engine


def mixed_names(family):
    """Every adapter, base rows between them, and one adapter in two places."""
    names = adapter_names(family)
    return [names[0], None, *names[1:], names[0], None]


def prompts_for(names, device, seed=0):
    return left_padded([LENGTHS[i % len(LENGTHS)] for i in range(len(names))], device, seed)


def relative(got, want):
    """Of each row (the last dimension)."""
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


@pytest.mark.trap(27)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_mixed_batch_says_what_peft_says(family, device):
    names = mixed_names(family)
    batch = prompts_for(names, device)
    real = batch["attention_mask"].bool()
    model = make_model(family, device=device)
    base = logits_of(model, batch)
    with loaded(family, model) as engine, engine.batch(names):
        got = logits_of(model, batch)
    for name in adapter_names(family):
        want = logits_of(peft_model(family, name, device=device), batch)
        for row in (i for i, n in enumerate(names) if n == name):
            error = (got[row] - want[row])[real[row]].norm()
            delta = (want[row] - base[row])[real[row]].norm()
            whole = want[row][real[row]].norm()
            assert delta > 0.12 * whole, f"{name}: the adapter changes too little to prove anything"
            assert error < 2e-5 * whole, f"{name}, row {row}: {error / whole:.1e} off, delta {delta / whole:.2f}"
    for row in (i for i, n in enumerate(names) if n is None):
        if family in DENSE:
            assert torch.equal(got[row], base[row])
        else:
            torch.testing.assert_close(got[row][real[row]], base[row][real[row]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_good_as_peft(family, half, device):
    """Against PEFT in float32: the median token is at most 1.5 times as far off as PEFT in the same dtype is. The
    median, because where a router is nearly undecided one rounding sends a token to another expert, and the rest of
    that sequence sees it."""
    names = adapter_names(family) * 4 + [None]
    batch = left_padded([12] * len(names), device)
    real = batch["attention_mask"].bool()
    model = make_model(family, half, device)
    base = logits_of(model, batch)
    with loaded(family, model) as engine, engine.batch(names):
        got = logits_of(model, batch)
    for name in adapter_names(family):
        rows = [i for i, n in enumerate(names) if n == name]
        here = real[rows]
        exact = logits_of(peft_model(family, name, device=device), batch)[rows][here]
        theirs = relative(logits_of(peft_model(family, name, half, device), batch)[rows][here], exact)
        ours = relative(got[rows][here], exact)
        delta = relative(base[rows][here], exact)
        assert delta.median() > 0.12
        assert ours.median() < 0.1 * delta.median()
        assert ours.median() < 1.5 * theirs.median() + 1e-4, f"{name}: ours {ours.median()}, peft {theirs.median()}"
        assert (ours < 0.5 * delta).float().mean() > 0.75


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_whatever_implementation_the_model_uses(implementation, device):
    model = make_model("qwen3_5_moe", device=device)
    model.set_experts_implementation(implementation)
    batch = prompts_for([0, 1], device)
    want = logits_of(peft_model("qwen3_5_moe", "experts", device=device), batch)[0]
    base = logits_of(model, batch)
    with loaded("qwen3_5_moe", model) as engine, engine.batch(["experts", None]):
        got = logits_of(model, batch)
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], base[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_adapter_touches_keeps_its_bits(family, device):
    model = make_model(family, device=device)
    batch = prompts_for([0, 1, 2], device)
    base = logits_of(model, batch)
    with loaded(family, model) as engine:
        assert torch.equal(logits_of(model, batch), base), "outside a batch"
        with engine.batch([None, None, None]):
            assert torch.equal(logits_of(model, batch), base), "a batch of the base model"
        # No adapter of this batch touches the experts: the module's own forward runs.
        with engine.batch(["linears", None, "q_and_ends"]):
            got = logits_of(model, batch)
        if family in DENSE:
            assert torch.equal(got[1], base[1])
        else:  # even so an expert's GEMM has other rows than before, where the adapters route other tokens to it
            torch.testing.assert_close(got[1], base[1], rtol=1e-4, atol=1e-4)
        assert not torch.equal(got[0], base[0]) and not torch.equal(got[2], base[2])
        assert torch.equal(logits_of(model, batch), base), "after a batch"


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_a_cache_writes_what_peft_writes(family, device):
    names = mixed_names(family)
    batch = prompts_for(names, device, seed=3)
    model = make_model(family, device=device)
    settings = {"max_new_tokens": 10, "do_sample": False, "use_cache": True}
    base = model.generate(**batch, **settings)
    with loaded(family, model) as engine, engine.batch(names):
        got = model.generate(**batch, **settings)
    for name in adapter_names(family):
        want = peft_model(family, name, device=device).generate(**batch, **settings)
        assert not torch.equal(want, base)
        for row in (i for i, n in enumerate(names) if n == name):
            assert got[row].tolist() == want[row].tolist(), name
    for row in (i for i, n in enumerate(names) if n is None):
        assert got[row].tolist() == base[row].tolist()


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_beams_and_return_sequences_follow_their_prompt(family, device):
    names = ["everything", None, "linears"]
    batch = prompts_for(names, device, seed=5)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    model = make_model(family, device=device)
    with loaded(family, model) as engine, engine.batch(names):
        got = model.generate(**batch, **settings)
        assert got.shape[0] == 6
    for i, name in enumerate(names):
        reference = make_model(family, device=device) if name is None else peft_model(family, name, device=device)
        want = reference.generate(**batch, **settings)
        assert got[2 * i : 2 * i + 2].tolist() == want[2 * i : 2 * i + 2].tolist(), name


def test_a_compiled_model_follows_the_batch(device):
    model = make_model("llama", device=device)
    batch = prompts_for([0, 1, 2], device)
    base = logits_of(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    with loaded("llama", model) as engine:
        for names in (["everything", None, "linears"], ["linears", "everything", None], [None] * 3):
            with engine.batch(names):
                want = logits_of(model, batch)
                torch.testing.assert_close(logits_of(compiled, batch), want, rtol=1e-5, atol=1e-5)
                assert torch.equal(want, base) == (set(names) == {None})
        torch.testing.assert_close(logits_of(compiled, batch), base, rtol=1e-5, atol=1e-5)
        with engine.batch(["everything", None, "linears"]):
            assert isinstance(in_thread(lambda: logits_of(compiled, batch)), EngineError)


def test_attached_in_inference_mode_and_used_outside(device):
    model = make_model("llama", device=device)
    batch = prompts_for([0, 1], device)
    with torch.inference_mode():
        engine = loaded("llama", model)
    with engine:
        engine.unload("linears")
        engine.load("linears", adapter_folder("llama", "linears"))
        with engine.batch(["linears", "everything"]):
            outside = logits_of(model, batch)
            with torch.inference_mode():
                torch.testing.assert_close(logits_of(model, batch), outside, rtol=0, atol=0)


def test_a_compiled_model_takes_batches_and_lengths_it_has_not_seen(device):
    """Nothing ran before uncompiled: what a batch makes once is asked for by the compiled model first."""
    model = make_model("llama", device=device)
    compiled = torch.compile(model, backend="aot_eager")
    # by default dynamo gives up, and runs uncompiled, after 8
    with torch.no_grad(), loaded("llama", model) as engine, torch._dynamo.config.patch(recompile_limit=64):
        for names in (["everything", None, "linears"], ["linears", None, None]):
            for length in (5, 9, 6):
                ids = torch.randint(0, model.config.vocab_size, (3, length), device=device)
                with engine.batch(names):
                    got = [compiled(ids, logits_to_keep=keep).logits for keep in (0, 1)]
                    want = [model(ids, logits_to_keep=keep).logits for keep in (0, 1)]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_lm_head_on_some_positions_only(device):
    """The head then gets a slice of the hidden states, whose rows lie apart."""
    names = ["q_and_ends", None]
    batch = prompts_for(names, device)
    model = make_model("llama", device=device)
    want = logits_of(peft_model("llama", "q_and_ends", device=device), batch)
    with loaded("llama", model) as engine, engine.batch(names):
        for keep in (1, 3, torch.tensor([0, 4], device=device)):
            got = logits_of(model, batch, logits_to_keep=keep)
            at = slice(-keep, None) if isinstance(keep, int) else keep
            torch.testing.assert_close(got[0], want[0, at], rtol=1e-4, atol=1e-4)


def test_inputs_whose_rows_are_not_contiguous(device):
    model = make_model("llama", device=device)
    down = model.model.layers[0].mlp.down_proj
    x = torch.randn(80, 5, 2, device=device).permute(2, 1, 0)
    reference = peft_model("llama", "linears", device=device).base_model.model.model.layers[0].mlp.down_proj
    with loaded("llama", model) as engine, torch.no_grad():
        with engine.batch(["linears", None]):
            got = down(x)
            flat = down(x.reshape(10, 80))
        torch.testing.assert_close(got[0], reference(x)[0])
        assert torch.equal(got[1], down(x)[1])
        torch.testing.assert_close(flat.view(2, 5, 48), got)
        with engine.batch(["linears", None, None]), pytest.raises(ValueError, match="3 sequences.*multiple.*got 10"):
            down(x)


def test_the_input_is_found_by_its_name(device):
    class Noted(torch.nn.Linear):
        def forward(self, input, note=None):
            return super().forward(input)

    model = make_model("llama", device=device)
    down = model.model.layers[0].mlp.down_proj
    down.__class__ = Noted
    x = torch.randn(2, 5, 80, device=device)
    embedding = model.model.embed_tokens
    ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    with loaded("llama", model) as engine, torch.no_grad(), engine.batch(["everything", None]):
        assert torch.equal(down(note=torch.zeros(3), input=x), down(x))
        assert torch.equal(embedding(input=ids), embedding(ids))


@pytest.mark.parametrize("family", ["llama", "qwen3_5_moe"])
def test_autocast(family, device):
    """Served where the layers' outputs keep the engine's dtype, refused where they do not."""
    batch = prompts_for([0, 1], device)
    model = make_model(family, device=device)
    for name in ("linears", "experts") if family == "qwen3_5_moe" else ("linears",):
        cast, refused = torch.autocast(device, torch.bfloat16), pytest.raises(EngineError, match="autocast")
        with loaded(family, model) as engine, engine.batch([name, None]), cast, refused:
            logits_of(model, batch)
    model = make_model(family, torch.bfloat16, device)
    with loaded(family, model) as engine, engine.batch(["linears", None]), torch.autocast(device, torch.bfloat16):
        layer = model.model.layers[0].mlp
        layer = layer.shared_expert.down_proj if family == "qwen3_5_moe" else layer.down_proj
        x = torch.randn(2, 3, layer.in_features, device=device)
        with torch.no_grad():
            assert torch.equal(layer(x), layer(x.bfloat16()))  # as the layer casts it
        logits_of(model, batch)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "both"])
def test_tied_weights_are_adapted_one_module_at_a_time(family, target, device, tmp_path):
    """As in PEFT: the weight is shared, the adapter is not."""
    changes = {"tie_word_embeddings": True} if family == "llama" else {}
    source = adapter_folder(family, "q_and_ends")
    tensors = load_tensors(source)
    kept = {k: v for k, v in tensors.items() if target == "both" or target in k}
    modules = ["lm_head", "embed_tokens"] if target == "both" else [target]
    folder = write_adapter(tmp_path / "a", source, kept if target != "both" else tensors, target_modules=None)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = modules if target != "both" else [*modules, "q_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))

    batch = prompts_for([0, 1], device)
    model = make_model(family, device=device, **changes)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    base = logits_of(model, batch)
    with pytest.warns(UserWarning, match="tie"):
        reference = peft.PeftModel.from_pretrained(make_model(family, device=device, **changes), folder).eval()
    want = logits_of(reference, batch)
    engine = attach(model)
    engine.load("a", folder)
    with engine.batch([None, "a"]):
        got = logits_of(model, batch)
    assert torch.equal(got[0], base[0])
    assert (want[1] - base[1]).norm() > 0.12 * base[1].norm()
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_saved_base_weights_must_be_those_of_the_model(module, precision, device, tmp_path):
    """PEFT would load them into the base model; a batch has one base for all its adapters."""
    source = adapter_folder("llama", "q_and_ends")
    tensors = load_tensors(source)
    key = next(k for k in tensors if f"{module}.lora" in k).split(".lora")[0] + ".base_layer.weight"
    path = key.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
    # The files hold float32: rounded to the model's dtype they are its weights.
    saved = make_model("llama", device="cpu").get_submodule(path).weight.clone()
    same = write_adapter(tmp_path / "same", source, {**tensors, key: saved})
    bare = write_adapter(tmp_path / "bare", source, {**tensors, key.removeprefix("base_model.model."): saved})
    trained = saved.clone()
    trained[-1, -1] += 0.5
    other = write_adapter(tmp_path / "other", source, {**tensors, key: trained})
    nan = saved.clone()
    nan[3, 0] = float("nan")
    broken = write_adapter(tmp_path / "nan", source, {**tensors, key: nan})
    with attach(make_model("llama", precision, device)) as engine:
        engine.load("same", same)
        engine.load("bare", bare)
        for folder, row in ((other, 71), (broken, 3)):
            with pytest.raises(AdapterError) as refused:
                engine.load("other", folder)
            assert key in str(refused.value) and f"row {row}" in str(refused.value)
        assert engine.adapters == ["same", "bare"]


def test_saved_base_weights_are_read_in_pieces(device, tmp_path, monkeypatch):
    monkeypatch.setattr("polylora.engines.base_weights.PIECE_BYTES", 1000)  # 5 of 72 rows, and 2 at the end
    source = adapter_folder("llama", "q_and_ends")
    key, weight = "base_model.model.lm_head.base_layer.weight", make_model("llama").lm_head.weight.clone()
    with attach(make_model("llama", device=device)) as engine:
        engine.load("same", write_adapter(tmp_path / "same", source, {**load_tensors(source), key: weight}))
        for row in (0, 4, 5, 70, 71):
            changed = weight.clone()
            changed[row, 7] += 1
            folder = write_adapter(tmp_path / f"{row}", source, {**load_tensors(source), key: changed})
            with pytest.raises(AdapterError, match=f"lm_head.base_layer.weight.*row {row}"):
                engine.load("other", folder)


def test_saved_base_weights_of_a_quantised_module_are_refused(device, tmp_path):
    source = adapter_folder("llama", "q_and_ends")
    model = make_model("llama", device=device)
    key, weight = "base_model.model.lm_head.base_layer.weight", model.lm_head.weight.clone().cpu()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with attach(model) as engine, pytest.raises(AdapterError, match="lm_head.base_layer.weight.*int8"):
        engine.load("a", write_adapter(tmp_path / "a", source, {**load_tensors(source), key: weight}))


def test_adapters_come_and_go_between_batches(device):
    names = adapter_names("qwen3_5_moe")
    model = make_model("qwen3_5_moe", device=device)
    batch = prompts_for([0, 1], device)
    base = logits_of(model, batch)
    wanted = {n: logits_of(peft_model("qwen3_5_moe", n, device=device), batch) for n in names}
    engine = attach(model, max_adapters=2)
    for first, second in zip(names, names[1:] + names[:1], strict=True):
        for name in (first, second):
            if name not in engine.adapters:
                engine.load(name, adapter_folder("qwen3_5_moe", name))
        with engine.batch([second, first]):
            got = logits_of(model, batch)
        torch.testing.assert_close(got[0], wanted[second][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1], wanted[first][1], rtol=1e-4, atol=1e-4)
        engine.unload(first)
        with engine.batch([second, None]):
            got = logits_of(model, batch)
        torch.testing.assert_close(got[1], base[1], rtol=1e-4, atol=1e-4)


def test_loading_while_a_batch_runs_does_not_disturb_it(device):
    model = make_model("qwen3_5_moe", device=device)
    batch = prompts_for([0, 1], device)
    engine = attach(model)
    engine.load("experts", adapter_folder("qwen3_5_moe", "experts"))
    with engine.batch(["experts", None]):
        before = logits_of(model, batch)
        engine.load("everything", adapter_folder("qwen3_5_moe", "everything"))  # the arenas move
        assert torch.equal(logits_of(model, batch), before)
        with pytest.raises(SlotInUse, match="experts"):
            engine.unload("experts")
        engine.unload("everything")
        assert torch.equal(logits_of(model, batch), before)
    engine.unload("experts")
    assert engine.adapters == []


def state_of(model):
    """Everything attach could leave behind, module by module."""
    return [
        (name, sorted(m.__dict__), {k: list(v) for k, v in m.__dict__.items() if "_hooks" in k}, type(m))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_leaves_the_model_as_it_was(family, device):
    model = make_model(family, device=device)
    batch = prompts_for([0, 1, 2], device)
    output, state = logits_of(model, batch), state_of(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    addresses = {k: v.data_ptr() for k, v in model.state_dict().items()}
    engine = loaded(family, model)
    assert state_of(model) != state
    with engine.batch(["everything", None, "linears"]):
        assert not torch.equal(logits_of(model, batch), output)
        with pytest.raises(EngineError, match="running"):
            engine.detach()
    engine.detach()
    engine.detach()
    assert state_of(model) == state
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == addresses
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits_of(model, batch), output)
    for use in (lambda: engine.load("x", "y"), lambda: engine.unload("x"), lambda: engine.batch([None]).__enter__()):
        with pytest.raises(EngineError, match="detached"):
            use()
    with attach(model) as again:
        assert again.adapters == []


def test_a_forward_set_on_the_instance_survives(device):
    """As accelerate sets it."""
    model = make_model("qwen3_5_moe", device=device)
    experts = model.model.layers[0].mlp.experts
    original, calls = experts.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    experts.forward = forward
    with attach(model):
        logits_of(model, prompts_for([0], device))
    assert calls and experts.__dict__["forward"] is forward


def test_what_somebody_else_put_over_the_engine_stays(device):
    model = make_model("qwen3_5_moe", device=device)
    batch = prompts_for([0], device)
    base = logits_of(model, batch)
    experts = model.model.layers[0].mlp.experts
    engine = attach(model)
    ours, calls = {"generate": model.generate, "forward": experts.forward}, []

    def over(name):
        def wrapper(*args, **kwargs):
            calls.append(name)
            return ours[name](*args, **kwargs)

        return wrapper

    model.generate, experts.forward = generate, forward = over("generate"), over("forward")
    engine.detach()
    assert model.__dict__["generate"] is generate and experts.__dict__["forward"] is forward
    assert torch.equal(logits_of(model, batch), base)
    assert model.generate(**batch, max_new_tokens=2).shape[0] == 1
    assert set(calls) == {"generate", "forward"}
    del model.generate  # and once it is taken away already
    engine = attach(model)
    del model.generate
    engine.detach()
    assert not engine.attached


def test_detach_undoes_all_it_can_before_it_raises(device):
    model = make_model("llama", device=device)
    state = state_of(model)
    engine = attach(model)

    def fail():
        raise ZeroDivisionError

    engine._undo.insert(len(engine._undo) // 2, fail)
    with pytest.raises(ZeroDivisionError):
        engine.detach()
    assert not engine.attached and HfEngine.of(model) is None and state_of(model) == state
    engine.detach()
    with attach(model):
        pass


def test_a_lost_engine_is_found_again(device):
    model = make_model("llama", device=device)
    assert HfEngine.of(model) is None
    attach(model).load("a", adapter_folder("llama", "linears"))
    with pytest.raises(EngineError, match=r"HfEngine\.of"):
        attach(model)
    engine = HfEngine.of(model)
    assert engine.adapters == ["a"] and engine.model is model
    engine.detach()
    assert HfEngine.of(model) is None


def test_an_attached_model_cannot_be_copied_as_its_docs_say(device):
    model = make_model("llama", device=device)
    with attach(model):
        with pytest.raises(TypeError):
            copy.deepcopy(model)
        with pytest.raises((TypeError, AttributeError)):
            torch.save(model, io.BytesIO())
        state = model.state_dict()
    assert set(copy.deepcopy(model).state_dict()) == set(state)


# ---------------------------------------------------------------------------------------------------------------
# Refusals


def load_tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def write_adapter(folder, source, tensors=None, **config):
    """A copy of an adapter with other tensors or config keys."""
    from safetensors.torch import save_file

    shutil.copytree(source, folder)
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "adapter_config.json").read_text())
    values.update(config)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def llama(device):
    model = make_model("llama", device=device)
    with attach(model, max_adapters=2) as engine:
        yield engine


@pytest.mark.trap(20)
def test_a_refused_adapter_leaves_nothing_behind(llama, tmp_path, device):
    batch = prompts_for([0, 1], device)
    llama.load("good", adapter_folder("llama", "linears"))
    with llama.batch(["good", None]):
        before = logits_of(llama.model, batch)
    source = adapter_folder("llama", "everything")
    tensors = load_tensors(source)
    key = next(k for k in tensors if "layers.1.mlp.down_proj.lora_B" in k)
    bad_shape = write_adapter(tmp_path / "shape", source, {**tensors, key: tensors[key][:-1].contiguous()})
    unmatched = write_adapter(tmp_path / "name", source, {k.replace("q_proj", "query"): v for k, v in tensors.items()})
    for folder, what in (
        (bad_shape, "down_proj"),
        (unmatched, "query"),
        (write_adapter(tmp_path / "dora", source, use_dora=True), "use_dora"),
        (adapter_folder("qwen3_5_moe", "everything"), "linear_attn"),
    ):
        with pytest.raises(AdapterError, match=what):
            llama.load("bad", folder)
        assert llama.adapters == ["good"]
    with pytest.raises((AdapterError, OSError)):
        llama.load("bad", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="good"):
        llama.load("good", source)
    with llama.batch(["good", None]):
        assert torch.equal(logits_of(llama.model, batch), before)
    with pytest.raises(UnknownAdapter, match="good"), llama.batch(["bad"]):
        pass
    llama.load("bad", source)  # the name is free


@pytest.mark.trap(24)
def test_one_adapter_too_many(llama):
    llama.load("a", adapter_folder("llama", "linears"))
    llama.load("b", adapter_folder("llama", "everything"))
    with pytest.raises(PoolFull, match="2 slots"):
        llama.load("c", adapter_folder("llama", "q_and_ends"))
    assert llama.adapters == ["a", "b"]
    llama.unload("a")
    llama.load("c", adapter_folder("llama", "q_and_ends"))
    assert llama.adapters == ["c", "b"]
    with pytest.raises(UnknownAdapter):
        llama.unload("a")


def test_a_rank_above_the_limit(device):
    with attach(make_model("llama", device=device), max_rank=8) as engine:
        engine.load("small", adapter_folder("llama", "everything"))
        with pytest.raises(polylora.AdapterError, match="rank must be at most max_rank = 8, got"):
            engine.load("large", adapter_folder("llama", "linears"))
        assert engine.adapters == ["small"]


def test_batches_of_another_size(llama, device):
    llama.load("a", adapter_folder("llama", "linears"))
    for sizes, names in ((3, ["a", None]), (1, ["a", None]), (4, ["a", None])):
        batch = prompts_for(range(sizes), device)
        with llama.batch(names), pytest.raises(EngineError, match=f"2 sequences, got {sizes}"):
            logits_of(llama.model, batch)
    with llama.batch(["a", None]):
        # Also where the decoder is called alone, and with embeddings instead of ids.
        with pytest.raises(EngineError, match="got 4"):
            llama.model.model(torch.zeros(4, 3, dtype=torch.int64, device=device))
        with pytest.raises(EngineError, match="got 4"), torch.no_grad():
            llama.model(inputs_embeds=torch.zeros(4, 3, 48, device=device))
        with pytest.raises(EngineError, match="got 3"):
            llama.model.generate(**prompts_for(range(3), device), max_new_tokens=2)
        logits_of(llama.model, prompts_for(range(2), device))


@pytest.mark.parametrize("key", ["inputs", "positional", "input_ids", "inputs_embeds"])
def test_generate_takes_as_many_prompts_as_were_named(llama, key, device):
    """Twice or four times as many are a mistake, not beams."""
    model = llama.model
    llama.load("everything", adapter_folder("llama", "everything"))

    def generate(rows, **kwargs):
        batch = left_padded([5] * rows, device)
        ids = batch.pop("input_ids")
        kwargs |= batch | {"max_new_tokens": 2, "do_sample": False}
        if key == "positional":
            return model.generate(ids, **kwargs)
        given = torch.ones(rows, 5, 48, device=device) if key == "inputs_embeds" else ids
        return model.generate(**{key: given}, **kwargs)

    with llama.batch(["everything", None]):
        for rows in (1, 3, 4, 8):
            for kwargs in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 4}):
                with pytest.raises(EngineError, match=f"2 sequences, got {rows}"):
                    generate(rows, **kwargs)
        assert generate(2).shape[0] == 2
        assert generate(2, num_beams=4, num_return_sequences=2).shape[0] == 4
        with pytest.raises(EngineError, match="2 sequences, got 4"):  # after beams as before
            logits_of(model, prompts_for(range(4), device))
    with llama.batch(["everything", None]), pytest.raises(EngineError, match="2 sequences, got 1"):
        model.generate(max_new_tokens=2, num_return_sequences=2, do_sample=True)  # one made up from the start token
    with llama.batch(["everything"]):
        assert model.generate(max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize("where", ["keywords", "config", "model"])
def test_return_sequences_from_wherever_they_are_set(llama, where, device):
    """Sampled from the one most likely token, so that every copy of a prompt is its greedy text."""
    model, values = llama.model, {"num_return_sequences": 3, "do_sample": True, "top_k": 1, "max_new_tokens": 5}
    llama.load("everything", adapter_folder("llama", "everything"))
    batch = prompts_for(range(2), device)
    with llama.batch(["everything", None]):
        want = model.generate(**batch, max_new_tokens=5, do_sample=False)
        if where == "keywords":
            got = model.generate(**batch, **values)
        elif where == "config":
            got = model.generate(**batch, generation_config=transformers.GenerationConfig(**values))
        else:
            model.generation_config = transformers.GenerationConfig(**values)
            got = model.generate(batch["input_ids"], None, attention_mask=batch["attention_mask"])
    assert not torch.equal(want[0], want[1])
    assert got.tolist() == want.repeat_interleave(3, 0).tolist()


def in_thread(function):
    """What it returned or raised, from another thread."""
    result = []

    def call():
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return result[0]


def test_other_threads_stay_out_of_a_batch(device):
    model = make_model("qwen3_5_moe", device=device)
    batch = prompts_for([0, 1], device)
    base = logits_of(model, batch)
    with loaded("qwen3_5_moe", model) as engine:
        layer = model.model.layers[0].mlp
        x = torch.zeros(2, 3, 48, device=device)
        expert = x.flatten(0, 1), torch.zeros(6, 2, dtype=torch.int64, device=device), torch.ones(6, 2, device=device)
        with engine.batch(["everything", None]):
            want = logits_of(model, batch)
            for stranger in (
                lambda: logits_of(model, batch),
                lambda: model.generate(**batch, max_new_tokens=2),
                lambda: layer.shared_expert.up_proj(x),
                lambda: layer.experts(*expert),
            ):
                error = in_thread(stranger)
                assert isinstance(error, EngineError) and "any_thread" in str(error)
            assert torch.equal(logits_of(model, batch), want)
        assert torch.equal(in_thread(lambda: logits_of(model, batch)), base)
        with engine.batch(["everything", None], any_thread=True):
            assert torch.equal(in_thread(lambda: logits_of(model, batch)), want)
        with engine.batch(["everything", None]):
            assert isinstance(in_thread(lambda: logits_of(model, batch)), EngineError)


def test_a_streamer_reads_what_another_thread_generates(llama, device):
    llama.load("a", adapter_folder("llama", "everything"))
    batch = prompts_for([0], device)
    settings = {"max_new_tokens": 6, "do_sample": False}

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    with llama.batch(["a"]):
        want = llama.model.generate(**batch, **settings)
    streamer = Streamer()
    with llama.batch(["a"], any_thread=True):
        in_thread(lambda: llama.model.generate(**batch, **settings, streamer=streamer))
    assert streamer.tokens == [*want[0].tolist(), "end"]


def test_other_tasks_stay_out_of_a_batch(llama, device):
    """Tasks of one event loop share a thread, and any await may let another one run."""
    llama.load("a", adapter_folder("llama", "linears"))
    batch = prompts_for([0], device)

    async def named(entered, leave):
        with llama.batch(["a"]):
            first = logits_of(llama.model, batch)
            entered.set()
            await leave.wait()
            assert torch.equal(logits_of(llama.model, batch), first)
            # A thread made for this task knows its batch.
            assert torch.equal(await asyncio.to_thread(logits_of, llama.model, batch), first)

    async def main():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(named(entered, leave))
        await entered.wait()
        with pytest.raises(EngineError, match="task"):
            logits_of(llama.model, batch)
        leave.set()
        await task

    asyncio.run(main())


def test_two_engines_have_a_batch_each(device):
    one, two = make_model("llama", device=device), make_model("gemma3", device=device)
    batch = prompts_for([0], device)
    with loaded("llama", one) as first, loaded("gemma3", two) as second, first.batch(["everything"]):
        want = logits_of(one, batch)
        with second.batch(["everything"]):
            assert torch.equal(logits_of(one, batch), want)
            logits_of(two, batch)
        assert torch.equal(logits_of(one, batch), want)


def test_batches_do_not_nest(llama, device):
    llama.load("a", adapter_folder("llama", "linears"))
    batch = prompts_for([0], device)
    with llama.batch(["a"]):
        want = logits_of(llama.model, batch)
        with pytest.raises(EngineError, match="nest"), llama.batch([None]):
            pass
        assert torch.equal(logits_of(llama.model, batch), want)
    with pytest.raises(ZeroDivisionError), llama.batch(["a"]):
        raise ZeroDivisionError
    llama.unload("a")  # nothing is left pinned


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        ("a", TypeError, "list of adapter names"),
        ([1], TypeError, "list of adapter names"),
        ([], ValueError, "none"),
        (["a", "other"], LookupError, r"\['a'\], got 'other'"),
    ],
)
def test_names_that_make_no_batch(llama, names, error, text):
    llama.load("a", adapter_folder("llama", "linears"))
    with pytest.raises(error, match=text), llama.batch(names):
        pass
    llama.unload("a")


def test_training_is_refused(device):
    model = make_model("llama", device=device)
    with pytest.raises(EngineError, match="eval"):
        attach(model.train())
    model.eval()
    batch = prompts_for([0], device)
    with attach(model) as engine:
        engine.load("a", adapter_folder("llama", "linears"))
        with engine.batch(["a"]):
            with pytest.raises(EngineError, match="eval"):
                model.train()(**batch)
            model.eval().requires_grad_(True)
            with pytest.raises(RuntimeError, match="no_grad"):
                model(**batch)
            want = logits_of(model, batch)
            with torch.inference_mode():
                got = model(**batch, use_cache=False).logits
            assert torch.equal(got, want)
            assert torch.equal(logits_of(model, batch), want)  # after the plans were made in inference mode


def test_loading_in_inference_mode(device):
    model = make_model("llama", device=device)
    batch = prompts_for([0], device)
    with attach(model) as engine:
        with torch.inference_mode():
            engine.load("a", adapter_folder("llama", "linears"))
            with engine.batch(["a"]):
                got = model(**batch, use_cache=False).logits
        engine.load("b", adapter_folder("llama", "everything"))
        engine.unload("a")
        engine.load("a", adapter_folder("llama", "linears"))
        with engine.batch(["a"]):
            torch.testing.assert_close(logits_of(model, batch), got)


def test_models_that_cannot_be_attached(device):
    with pytest.raises(EngineError, match="PEFT"):
        attach(peft_model("llama", "linears", device=device))
    model = make_model("llama", device=device)
    with attach(model), pytest.raises(EngineError, match="already"):
        attach(model)
    with attach(model):
        pass
    state = state_of(model)
    model.model.layers[1].mlp.up_proj = None
    with pytest.raises(EngineError, match="layers.1.mlp.up_proj"):
        attach(model)
    model = make_model("llama", device=device)
    assert state_of(model) == state
    with pytest.raises(EngineError, match="dtype"):
        attach(model, dtype=torch.float64)
    model.lm_head.to("meta")
    with pytest.raises(EngineError, match="one CPU or CUDA device"):
        attach(model)
    gpt2 = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, **TOKENS)
    )
    with pytest.raises(ValueError, match="gpt2"):
        attach(gpt2.eval())


def test_experts_the_seams_cannot_compute(device):
    """Adapters of everything else are served; those of the experts are refused, with the reason."""
    model = make_model("qwen3_5_moe", device=device, hidden_act="tanh")
    state = state_of(model)
    with attach(model) as engine:
        with pytest.raises(AdapterError, match=r"experts\.gate_up_proj: .*activation must be one of .*got Tanh"):
            engine.load("experts", adapter_folder("qwen3_5_moe", "experts"))
        engine.load("linears", adapter_folder("qwen3_5_moe", "linears"))
        batch = prompts_for([0], device)
        want = logits_of(peft_model("qwen3_5_moe", "linears", device=device, hidden_act="tanh"), batch)
        with engine.batch(["linears"]):
            torch.testing.assert_close(logits_of(model, batch), want, rtol=1e-4, atol=1e-4)
    assert state_of(model) == state


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_every_gated_activation(act, device):
    model = make_model("qwen3_5_moe", device=device, hidden_act=act)
    batch = prompts_for([0, 1], device)
    want = logits_of(peft_model("qwen3_5_moe", "experts", device=device, hidden_act=act), batch)
    with loaded("qwen3_5_moe", model) as engine, engine.batch(["experts", None]):
        torch.testing.assert_close(logits_of(model, batch)[0], want[0], rtol=1e-4, atol=1e-4)


def test_modules_in_another_dtype_are_served_by_refusing_their_adapters(device):
    model = make_model("llama", torch.bfloat16, device)
    model.lm_head.float()
    with attach(model) as engine:
        with pytest.raises(AdapterError, match="lm_head.*float32"):
            engine.load("a", adapter_folder("llama", "everything"))
        engine.load("b", adapter_folder("llama", "linears"))


# ---------------------------------------------------------------------------------------------------------------
# Parts


def test_plans_are_made_once_and_forgotten_in_turn(device):
    plans = BatchPlans([2, -1, 0], 4, device)
    assert plans.row_slots(6).tolist() == [2, 2, -1, -1, 0, 0]
    assert plans.plan(6) is plans.plan(6)
    first = plans.plan(6)
    for rows in range(9, 9 + 3 * 20, 3):
        plans.plan(rows)
    assert plans.plan(6) is not first and torch.equal(plans.plan(6), first)
    assert plans.row_slots(0).tolist() == []
    with pytest.raises(ValueError, match="multiple"):
        plans.plan(7)


def test_grouped_mm(device):
    x, weight = torch.randn(10, 16, device=device), torch.randn(5, 16, 24, device=device)
    ends = torch.tensor([0, 3, 3, 9, 10], device=device)
    groups = [1, 1, 1, 3, 3, 3, 3, 3, 3, 4]
    want = torch.stack([x[i] @ weight[g] for i, g in enumerate(groups)])
    torch.testing.assert_close(grouped_mm(x, weight, ends), want)
    torch.testing.assert_close(grouped_mm(x, weight.mT.contiguous().mT, ends), want)
    assert grouped_mm(x[:0], weight, torch.zeros_like(ends)).shape == (0, 24)
    half = grouped_mm(x.bfloat16(), weight.bfloat16(), ends).float()
    torch.testing.assert_close(half, want, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("what", ["meta-llama/Llama-3.1-8B", None, torch.nn.Linear(3, 3)])
def test_what_is_no_model_is_refused(what):
    with pytest.raises(
        polylora.EngineError, match=f"must be a transformers model that is loaded, got {type(what).__name__}"
    ):
        attach(what)


def test_a_gpu_that_no_kernel_was_built_for_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(polylora.EngineError, match=r"compute capability 8.0 or later, or on the CPU, got 7.5"):
        hf._refuse_old_gpu(torch.device("cuda"))
    hf._refuse_old_gpu(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    hf._refuse_old_gpu(torch.device("cuda"))
