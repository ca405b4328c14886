"""The README does not rot: its Python runs as printed, its links lead somewhere, its commands exist."""

from __future__ import annotations

import ast
import builtins
import contextlib
import re
import shutil
from pathlib import Path

import numpy as np
import polylora
import pytest
import torch
from polylora import cli
from polylora.fixtures import PROMPTS, ByteTokenizer, adapter_names, adapter_path, fixture_path
from polylora.fixtures.styles import STYLE_BOUND, style_score

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OPS = ROOT / "docs/ops.md"
INTEGRATION = ROOT / "docs/integration.md"
HUGGING_FACE = ROOT / "docs/huggingface.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "python/polylora/fixtures/README.md"]

if not README.exists():
    pytest.skip("not a source checkout", allow_module_level=True)


def fenced(page: Path, language: str) -> list[str]:
    """Contents of the page's code blocks in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def block_with(page: Path, text: str) -> str:
    """The one Python block of the page that holds ``text``."""
    found = [block for block in fenced(page, "python") if text in block]
    assert len(found) == 1, f"{page.name} must have one Python block with {text!r}, got {len(found)}"
    return found[0]


def missing_names(code: str) -> set[str]:
    """Names that a block reads and does not make itself."""
    read, made = set(), set(dir(builtins))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
    return read - made


def execute(code: str, given: dict) -> dict:
    """Runs a block with the names it leaves to the reader; these and no others."""
    assert missing_names(code) == set(given), "a block's open names must be those that this test gives it"
    names = dict(given)
    exec(compile(code, "<block>", "exec"), names)
    return names


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def usable(device: str) -> str:
    if device == "cuda" and not polylora.has_cuda_kernels():
        pytest.skip("this build has no CUDA kernels")
    return device


# --------------------------------------------------------------------------------------------------------------- code


def test_every_python_block_is_run_here():
    """A new block needs a test of its own: the ones below run these."""
    marks = {README: ["polylora.attach", "from_dense_pool"], PAGES[-1]: ["ByteTokenizer"]}
    marks |= {
        OPS: ["linear_delta", "moe_delta", "moe_gate_up_act"],
        INTEGRATION: ["class Layer"],
        HUGGING_FACE: ["max_rank=64"],
    }
    for page in PAGES:
        blocks, known = fenced(page, "python"), marks.get(page, [])
        assert len(blocks) == len(known), f"{page.name}: {len(blocks)} Python blocks, {len(known)} of them are run"
        for mark in known:
            block_with(page, mark)


def test_the_engine_block_serves_each_row_its_adapter(usable, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    code = block_with(README, "polylora.attach")
    loads = re.findall(r'engine\.load\("([^"]+)", "([^"]+)"\)', code)
    batch = ast.literal_eval(re.search(r"engine\.batch\((\[.*?\])\)", code)[1])
    assert len(loads) == 2 and {name for name, _ in loads} == set(batch) - {None} and None in batch
    styles = {}
    for (name, folder), style in zip(loads, ("upper", "rot13"), strict=True):
        assert not Path(folder).is_absolute()
        shutil.copytree(adapter_path("tiny-qwen3_5-moe", style), tmp_path / folder)
        styles[name] = style
    monkeypatch.chdir(tmp_path)

    model = transformers.AutoModelForCausalLM.from_pretrained(fixture_path("tiny-qwen3_5-moe"), dtype=torch.float32)
    model, tokenizer = model.to(usable).eval(), ByteTokenizer()
    inputs = {key: value.to(usable) for key, value in tokenizer.batch(PROMPTS[: len(batch)]).items()}
    start = inputs["input_ids"].shape[1]
    inputs |= {"max_new_tokens": 32, "do_sample": False}
    before = model.generate(**inputs)
    out = execute(code, {"model": model, "inputs": inputs})["out"]

    texts = [tokenizer.decode(row[start:]) for row in out]
    plain = [tokenizer.decode(row[start:]) for row in before]
    for name, text, base in zip(batch, texts, plain, strict=True):
        if name is None:
            # Experts of a mixed batch agree with the base up to rounding: the first words are the same, all may be.
            assert text[:10] == base[:10]
            assert all(style_score(style, text) < STYLE_BOUND for style in styles.values()), text
        else:
            assert style_score(styles[name], text) >= STYLE_BOUND, text
            assert text != base
    assert torch.equal(model.generate(**inputs), before), "the model is as it was after the block"


def test_the_hugging_face_block_serves_each_row_its_adapter():
    pytest.importorskip("transformers")
    names = execute(block_with(HUGGING_FACE, "max_rank=64"), {})
    upper, base, rot13 = (ByteTokenizer().decode(row[-32:]) for row in names["out"])
    for style, text in (("upper", upper), ("rot13", rot13)):
        assert style_score(style, text) >= STYLE_BOUND, text
        assert style_score(style, base) < STYLE_BOUND, base
    assert names["engine"].adapters == ["rot13"] and not names["engine"].attached


class NoStream:
    """A stream where there is but one."""

    def __init__(self, priority: int = 0):
        pass

    def wait_stream(self, other: NoStream) -> None:
        pass

    def record_event(self) -> None:
        pass

    def wait_event(self, event: None) -> None:
        pass


@pytest.fixture
def streams(usable, monkeypatch) -> None:
    if usable == "cpu":
        monkeypatch.setattr(torch.cuda, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def test_the_block_of_a_linears_delta_beside_the_gemm_is_linear_(usable, streams):
    code = block_with(OPS, "linear_delta")
    rows, slots, rank, k, widths = 7, 3, 8, 64, [40, 24]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(usable)

    a, b, w = random(slots, len(widths) * rank, k) / 8, random(slots, sum(widths), rank), random(sum(widths), k) / 8
    table = polylora.SliceTable.from_sglang_dense(a, b, [rank] * slots, widths=widths)
    ids = torch.tensor([0, 2, -1, 1, 1, 0, -1], dtype=torch.int32).to(usable)
    plan = polylora.Plan(rows, slots, device=usable).fill(ids)
    given = {"torch": torch, "ops": torch.ops.polylora, "gemm": lambda x: x @ w.T, "x": random(rows, k)}
    got = execute(code, given | {"rows": rows, "table": table, "plan": plan})["y"]
    base = given["x"] @ w.T
    want = base.clone()
    torch.ops.polylora.linear_(want, given["x"], plan=plan.tensor, **table.args("linear_"))
    torch.testing.assert_close(got, want)
    assert (want - base).norm() > 0.1 * want.norm()


def test_the_block_of_a_gated_mlp_is_linear_and_the_activation(usable):
    code = block_with(OPS, "moe_gate_up_act")
    rows, slots, rank, k, inner = 7, 3, 8, 64, 40
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(usable)

    a, b = random(slots, 2 * rank, k) / 8, random(slots, 2 * inner, rank)
    gate_up = polylora.SliceTable.from_sglang_dense(a, b, [rank] * slots, widths=[inner] * 2)
    ids = torch.tensor([0, 2, -1, 1, 1, 0, -1], dtype=torch.int32).to(usable)
    plan = polylora.Plan(rows, slots, device=usable).fill(ids)
    x, y, ops = random(rows, k), random(rows, 2 * inner), torch.ops.polylora
    given = {"torch": torch, "ops": ops, "rows": rows, "inner": inner}
    got = execute(code, given | {"x": x, "y": y, "plan": plan, "gate_up": gate_up})["h"]
    base = torch.nn.functional.silu(y[:, :inner]) * y[:, inner:]
    ops.linear_(y, x, plan=plan.tensor, **gate_up.args("linear_"))
    want = torch.nn.functional.silu(y[:, :inner]) * y[:, inner:]
    torch.testing.assert_close(got, want)
    assert ((want - base).abs().amax(1) > 1e-2).tolist() == [i >= 0 for i in ids.tolist()]


def test_the_block_of_deltas_beside_the_gemms_is_the_fused_layer(usable, streams):
    code = block_with(OPS, "moe_delta")
    tokens, k, slots, experts, rank, hidden, inner = 9, 3, 2, 4, 8, 64, 32
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(usable)

    of_up = random(slots, experts, 2 * rank, hidden) / 8, random(slots, experts, 2 * inner, rank)
    of_down = random(slots, experts, rank, inner) / 8, random(slots, experts, hidden, rank)
    up = polylora.SliceTable.from_sglang_moe(*of_up, [rank] * slots, widths=[inner] * 2)
    down = polylora.SliceTable.from_sglang_moe(*of_down, [rank] * slots, widths=[hidden])
    ids = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)]).int().to(usable)
    adapter = torch.tensor([0, 1, -1] * 3, dtype=torch.int32, device=usable)
    pairs, ops = tokens * k, torch.ops.polylora
    x, w, y1, y2 = random(tokens, hidden), random(tokens, k).abs(), random(pairs, 2 * inner), random(pairs, hidden)
    h, out = torch.empty(pairs, inner, device=usable), torch.empty(tokens, hidden, device=usable)
    plan = polylora.Plan(pairs, slots * experts, device=usable)
    given = {"torch": torch, "ops": ops, "ACTIVATIONS": polylora.ops.ACTIVATIONS, "x": x, "k": k, "w": w, "h": h}
    given |= {"plan": plan, "topk_ids": ids, "slots": adapter, "num_slots": slots, "experts": experts, "out": out}
    given |= {"up": up, "down": down, "gate_up_gemm": lambda x: y1, "down_gemm": lambda h: y2}
    given |= {"d1": torch.empty(pairs, 2 * inner, device=usable), "d2": torch.empty(pairs, hidden, device=usable)}
    execute(code, given)

    fused_h, fused_out = torch.empty_like(h), torch.empty_like(out)
    ops.moe_gate_up_act(fused_h, y1, x, **up.args("moe_gate_up_act"), plan=plan.tensor, top_k=k, act=0)
    assert torch.allclose(h, fused_h, rtol=1e-4, atol=1e-5)
    moved = (h - torch.nn.functional.silu(y1[:, :inner]) * y1[:, inner:]).abs().view(tokens, -1).amax(1) > 1e-2
    assert moved.tolist() == [a >= 0 for a in adapter.tolist()]
    ops.moe_down_reduce(fused_out, y2, h, **down.args("moe_down_reduce"), plan=plan.tensor, topk_weights=w)
    assert torch.allclose(out, fused_out, rtol=1e-4, atol=1e-4)
    base = (y2.view(tokens, k, hidden) * w[:, :, None]).sum(1)
    changed = (out - base).abs().amax(1) > 1e-2
    assert changed.tolist() == [a >= 0 for a in adapter.tolist()]


def test_the_ops_block_adds_the_delta_in_place(usable):
    code = block_with(README, "from_dense_pool")
    if usable == "cpu":
        code = code.replace('device="cuda"', 'device="cpu"')
        assert "cuda" not in code
    slots, capacity, k, n = 3, 8, 40, 24
    slot_of_row = [0, -1, 2, 1, 1, 0, -1]
    rows, ranks, scales = len(slot_of_row), [8, 3, 5], [1.0, 0.5, 2.0]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    a, b, x, y = random(slots, capacity, k), random(slots, n, capacity), random(rows, k), random(rows, n)
    for slot, rank in enumerate(ranks):
        a[slot, rank:] = float("nan")
        b[slot, :, rank:] = float("nan")
    want = y.double()
    for row, slot in enumerate(slot_of_row):
        if slot >= 0:
            rank = ranks[slot]
            low = a[slot, :rank].double() @ x[row].double()
            want[row] += scales[slot] * (b[slot, :, :rank].double() @ low)

    a, b, x, out = (t.to(usable) for t in (a[:, None], b, x, y.clone()))
    names = execute(
        code,
        {
            "polylora": polylora,
            "torch": torch,
            "a_pool": a,
            "b_pool": b,
            "ranks": ranks,
            "scales": scales,
            "rows": rows,
            "slots": slots,
            "slot_of_row": torch.tensor(slot_of_row, device=usable),
            "x": x,
            "y": out,
        },
    )
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=1e-4)
    for row in (row for row, slot in enumerate(slot_of_row) if slot < 0):
        assert torch.equal(out[row].cpu(), y[row]), "rows without an adapter keep their bits"
    table = names["table"]
    assert table.a[0].data_ptr() == a.data_ptr() and table.b[0].data_ptr() == b.data_ptr(), "in place, zero copy"


def test_the_fixtures_block_makes_a_model_and_a_batch():
    transformers = pytest.importorskip("transformers")
    names = execute(block_with(PAGES[-1], "ByteTokenizer"), {"torch": torch, "transformers": transformers})
    with torch.no_grad():
        logits = names["model"].eval()(**names["batch"]).logits
    assert logits.shape[:2] == names["batch"]["input_ids"].shape and logits.isfinite().all()


def test_the_engine_of_your_own_runs_as_printed():
    """It takes the GPU where there is one, and checks each of its rows itself."""
    code = block_with(INTEGRATION, "class Layer")
    assert code.count("\n") <= 60
    torch.manual_seed(0)
    names = execute(code, {})
    layers = [names[name] for name in ("embed", "qkv", "head")]
    assert names["batch"] and {names["scales"][slot] for slot in names["batch"]} != {0.0}, "an adapter was checked"
    assert all(layer.merged(0, 1.0).ne(layer.weight).any() for layer in layers), "and changes every layer"


def test_the_cpp_example_is_the_file_that_is_built():
    (shown,) = fenced(INTEGRATION, "cpp")
    assert shown == (ROOT / "examples/integration.cpp").read_text(encoding="utf-8")
    assert shown.count("\n") <= 60


def test_the_words_of_an_entry_are_as_told():
    text = INTEGRATION.read_text(encoding="utf-8")
    entry = np.dtype(re.search(r'in numpy `"([^"]+)"`', text)[1])
    names = ("a_row", "rank", "v_col", "b_stride", "b_offset", "scale", "reserved")
    told = text[text.index("**Tables without") :]
    places = [told.index(f"`{name}`") for name in names[:-1]]
    assert places == sorted(places)
    a, b = torch.zeros(9, 16), torch.zeros(500)
    table = polylora.SliceTable.from_ragged_arena(a, b, slots=2, widths=[20], v_width=8)
    values = (3, 5, 2, 7, 11, 0.5, 0)
    table.set_groups([1], **dict(zip(names[:-1], values, strict=False)))
    assert table.words()[1, 0].view(entry)[0].tolist() == values


def test_punica_weights_serve_in_place():
    """``[slots, layers, ...]``, a layer at a time, as the table of calls says; segments as rows."""
    slots, layers, rank, k, n = 3, 2, 8, 24, 40
    generator = torch.Generator().manual_seed(0)
    wa = torch.randn(slots, layers, rank, k, generator=generator)
    wb = torch.randn(slots, layers, n, rank, generator=generator)
    starts, slot_of_segment = torch.tensor([0, 2, 3, 6]), torch.tensor([2, -1, 0])
    rows = int(starts[-1])
    slot_of_row = slot_of_segment.repeat_interleave(starts.diff(), output_size=rows)
    x = torch.randn(rows, k, generator=generator)
    plan = polylora.Plan(rows, slots).fill(slot_of_row)
    for layer in range(layers):
        table = polylora.SliceTable.from_dense_pool([wa[:, layer]], [wb[:, layer]], [rank] * slots, 0.5)
        assert table.a[0].data_ptr() == wa[:, layer].data_ptr() and table.b[0].data_ptr() == wb[:, layer].data_ptr()
        want = torch.zeros(rows, n)
        for row, slot in enumerate(slot_of_row.tolist()):
            if slot >= 0:
                want[row] = 0.5 * wb[slot, layer] @ (wa[slot, layer] @ x[row])
        y, halves, v = torch.zeros(rows, n), torch.zeros(rows, n), torch.full((rows, table.v_width), float("nan"))
        torch.ops.polylora.linear_(y, x, plan=plan.tensor, **table.args("linear_"))
        torch.ops.polylora.shrink(v, x, plan=plan.tensor, **table.args("shrink"))
        torch.ops.polylora.expand_(halves, v, plan=plan.tensor, **table.args("expand_"))
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(halves, want, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- links, commands


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that a Git host gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (page.parent / path).resolve() if path else page
        inside = there.is_relative_to(ROOT)
        if not inside or not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            dead.append(target)
    assert not dead, f"{page.relative_to(ROOT)} has dead links: {', '.join(dead)}"


def test_the_readme_links_the_docs():
    linked = {(ROOT / t.partition("#")[0]).resolve() for t in re.findall(r"\]\(([^)\s]+)\)", prose(README))}
    assert {
        ROOT / "docs" / name
        for name in ("architecture.md", "huggingface.md", "ops.md", "building.md", "integration.md")
    } <= linked


def test_commands_of_the_readme_exist(capsys):
    text = README.read_text(encoding="utf-8")
    commands = set(re.findall(r"(?:^|`|-m )polylora ([a-z]+)\b", text, re.MULTILINE))
    assert {"check", "info"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as exit_:
            cli.main([command, "--help"])
        assert exit_.value.code == 0, command
        assert f"polylora {command}" in capsys.readouterr().out
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)\b", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"the Makefile has no target {target!r}"


def test_the_output_shown_names_the_fixtures():
    """What the README shows of the demo is of a fixture model, and has a row for each of its adapters, twice."""
    shown = [block for block in fenced(README, "") if block.startswith("== ")]
    assert len(shown) == 1, "one excerpt of the demo"
    model = re.match(r"== ([\w-]+):", shown[0])[1]
    starts = [line.split()[0] for line in shown[0].splitlines() if line.strip()]
    for name in adapter_names(model):
        assert starts.count(name) >= 2, f"{model}'s {name} must stand in both tables"
