"""The benchmark's cases: floors as published, names that mean one thing, presets that hold what they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from polylora.bench.cases import MODULES, PRESETS, REGIMES, Case, Module, select
from polylora.bench.floor import NODE_US, READ_COLD_US, floor_us, read_cold_us

# us at M 1, 16, 64, 256 (1, 16, 32, 32 adapters), 2048 and 8192 (4 adapters), by module and rank.
FLOORS = {
    ("llama8b.qkv", 16): (1.6, 4.6, 8.2, 9.1, 25.5, 96.2),
    ("llama8b.qkv", 64): (2.2, 14.0, 26.3, 27.3, 27.8, 98.4),
    ("llama8b.down", 16): (1.6, 4.7, 8.3, 9.6, 34.3, 131.5),
    ("llama8b.down", 64): (2.2, 14.0, 26.4, 27.8, 36.6, 133.8),
    ("qwen35moe.qkvz", 16): (1.6, 5.0, 9.0, 10.6, 40.3, 155.1),
    ("qwen35moe.qkvz", 64): (2.3, 15.4, 29.2, 30.7, 42.9, 157.7),
}
# MB of weights, MB of x and y, us: what is as large as a vocabulary, at r16. csrc/tests/test_bench_cases.cpp holds the
# C++ benchmarks to the same rows.
VOCABULARY_FLOORS = {
    "llama8b.lm_head r16 M1 a1": (4.24, 0.52, 2.94),
    "llama8b.lm_head r16 M16 a16": (67.76, 8.34, 24.79),
    "llama8b.lm_head r16 M64 a32": (135.53, 33.36, 50.05),
    "qwen35moe.lm_head r16 M1 a1": (8.01, 1.00, 4.20),
    "qwen35moe.lm_head r16 M16 a16": (128.19, 15.96, 45.05),
    "qwen35moe.lm_head r16 M64 a32": (256.38, 63.83, 106.57),
    "llama8b.embed r16 M1 a1": (0.13, 0.02, 1.34),
    "llama8b.embed r16 M64 a32": (4.23, 1.05, 3.02),
    "llama8b.embed r16 M2048 a4": (1.57, 33.55, 7.12),
    "qwen35moe.embed r16 M1 a1": (0.07, 0.01, 1.34),
    "qwen35moe.embed r16 M64 a32": (2.13, 0.52, 2.25),
    "qwen35moe.embed r16 M2048 a4": (1.31, 16.78, 4.44),
}
ROWS = ((1, 1), (16, 16), (64, 32), (256, 32), (2048, 4), (8192, 4))


@pytest.mark.parametrize(("module", "rank"), FLOORS)
def test_floors_are_the_published_ones(module, rank):
    for (rows, adapters), published in zip(ROWS, FLOORS[module, rank], strict=True):
        case = Case.parse(f"{module} r{rank} M{rows} a{adapters}")
        assert case.floor_us == pytest.approx(published, abs=0.25), case.name


@pytest.mark.parametrize("name", VOCABULARY_FLOORS)
def test_vocabularies_have_the_floors_of_the_cpp_benchmarks(name):
    case = Case.parse(name)
    found = case.weight_bytes / 1e6, case.xy_bytes / 1e6, case.floor_us
    assert found == pytest.approx(VOCABULARY_FLOORS[name], abs=0.006)


def test_y_that_fits_the_l2_is_hot_though_it_moves_twice():
    case = Case.parse("llama8b.lm_head r16 M64 a32")
    assert case.footprint < 30e6 < case.xy_bytes
    assert case.floor_us == pytest.approx(read_cold_us(case.weight_bytes) + case.xy_bytes / 6.5e6)


def test_the_floor_never_falls_with_more_bytes():
    sizes = [0, 1, 1000, *(int(mib * 2**20) + d for mib, _ in READ_COLD_US for d in (-1, 0, 1)), 2**29, 2**31]
    times = [read_cold_us(size) for size in sizes]
    assert times == sorted(times) and times[0] == NODE_US
    for mib, us in READ_COLD_US:
        assert read_cold_us(mib * 2**20) == pytest.approx(us)
    assert floor_us(0, 45e6, 31e6) > floor_us(0, 45e6, 29e6)
    assert read_cold_us(1) == READ_COLD_US[0][1], "a load's latency does not shrink"


def test_bytes_count_each_adapter_once_and_y_both_ways():
    case = Case.parse("llama8b.qkv r16 M16 a16")
    assert case.weight_bytes == 16 * 16 * (3 * 4096 + 6144) * 2
    assert case.xy_bytes == 16 * (4096 + 2 * 6144) * 2


def test_an_embedding_counts_the_sectors_it_touches_and_lies_in_memory_whole():
    rank_major, token_major = (Case.parse(f"llama8b.embed{end} r64 M3 a2") for end in ("", ".token_major"))
    b = 2 * 64 * 4096 * 2
    assert rank_major.weight_bytes == b + 3 * 64 * 32, "a sector an element"
    assert token_major.weight_bytes == b + 3 * 64 * 2, "a row of A"
    assert Case.parse("vocab:99->8.token_major r3 M5 a1").weight_bytes == 3 * 8 * 2 + 5 * 32
    assert rank_major.set_bytes == token_major.set_bytes == b + 2 * 64 * 128256 * 2
    assert rank_major.xy_bytes == 3 * 2 * 4096 * 2 == 2 * rank_major.footprint


def test_a_name_is_read_back_as_the_same_case():
    for preset in PRESETS.values():
        cases = preset()
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert Case.parse(case.name) == case


def test_adapters_left_out_are_the_usual_ones():
    for text, adapters in (("r8 M1", 1), ("r8 M20", 20), ("r8 M256", 32), ("r8 M257", 4), ("r8 M8192", 4)):
        assert Case.parse(f"llama8b.o {text}").adapters == adapters
    assert Case.parse("  80->19+1  r3 M5 a2 ") == Case(Module("80->19+1", 80, (19, 1)), 3, 5, 2)
    assert Case.parse("vocab:50->19 r3 M5 a2") == Case(Module("vocab:50->19", 0, (19,), 50), 3, 5, 2)
    for name in ("80->19+1", "vocab:50->19", "vocab:50->19.token_major"):
        assert Module.parse(name).shape == name


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must look like"),
        ("llama8b.qkv", "must look like"),
        ("llama8b.qkv r16 M1 a1 x", "must look like"),
        ("llama9b.qkv r16 M1", "or one of llama8b.qkv"),
        ("64->64+ r16 M1", "must be K->N"),
        ("64->0 r16 M1", "narrowest slice must be in"),
        ("0->64 r16 M1", "inputs must be in"),
        ("vocab:0->64 r1 M1", "must be in"),
        ("vocab:64->64+64 r1 M1", "must be K->N"),
        ("64->64 r0 M1", "rank must be in"),
        ("64->64 r257 M1", "rank must be in"),
        ("64->64 r1 M0", "rows must be in"),
        ("64->64 r1 M4 a5", "adapters must be in"),
        ("64->1+1+1+1+1+1+1+1+1 r1 M4", "slices must be in"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        Case.parse(text)


def test_every_row_has_the_adapter_that_its_request_has():
    for text in ("64->64 r8 M7 a3", "64->64 r8 M256 a32", "64->64 r8 M257 a4", "64->64 r8 M1000 a7"):
        case = Case.parse(text)
        slots = case.slot_of_row()
        assert len(slots) == case.rows and set(slots) == set(range(case.adapters))
        assert sum(length for length, _ in case.segments()) == case.rows
        if case.is_decode:
            assert slots == [row % case.adapters for row in range(case.rows)]
        else:
            assert slots == sorted(slots)
            counts = [slots.count(slot) for slot in range(case.adapters)]
            assert max(counts) - min(counts) <= 1


def test_presets_hold_what_they_promise():
    issue, full = PRESETS["issue"](), {case.name for case in PRESETS["full"]()}
    want = [f"{m} r{r} M{rows} a{a}" for m, r in FLOORS for rows, a in ROWS]
    assert [case.name for case in issue] == [*want, *VOCABULARY_FLOORS]
    assert {case.name for case in issue} <= full
    assert {case.name for case in PRESETS["quick"]()} <= full
    cases = [Case.parse(name) for name in full]
    assert {case.module.name for case in cases} == set(MODULES)
    assert {case.rank for case in cases} == {8, 16, 32, 64, 128}
    layers = [case for case in cases if case.regime in REGIMES[:3]]
    assert {case.rows for case in layers} == {1, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096, 8192}
    assert {case.adapters for case in layers if not case.is_decode} == {1, 4, 8}
    assert {case.rows for case in cases if case.module.is_lm_head} == {1, 16, 64}
    assert {case.rows for case in cases if case.module.is_embedding} == {1, 16, 64, 256, 2048, 8192}
    assert {case.regime for case in PRESETS["quick"]()} == set(REGIMES[:3])
    for cases in (issue, PRESETS["full"]()):
        assert {case.regime for case in cases} == set(REGIMES)


def test_lm_heads_and_embeddings_stay_out_of_the_means_of_layers():
    regimes = [case.regime for case in PRESETS["issue"]()]
    assert [regimes.count(regime) for regime in REGIMES] == [12, 12, 12, 6, 6]


HEADER = Path(__file__).parents[1] / "csrc/bench/cases.h"


@pytest.mark.skipif(not HEADER.exists(), reason="not a source checkout")
def test_a_name_means_the_same_shape_in_the_cpp_benchmarks():
    text = HEADER.read_text(encoding="utf-8")
    linears = re.findall(r'\{"(\w+\.\w+)", (\d+), \{([\d, ]+)\}\}', text)
    shapes = {name: Module(name, int(k), tuple(map(int, widths.split(",")))) for name, k, widths in linears}
    for name, vocab, width in re.findall(r'\{"(\w+\.\w+)", (\d+), (\d+)\}', text):
        for end in ("", ".token_major"):
            shapes[name + end] = Module(name + end, 0, (int(width),), int(vocab), end != "")
    assert shapes == MODULES


def test_fused_modules_have_the_widths_of_their_models():
    assert MODULES["nemotron3.in_proj"].widths == (8192, 8192, 1024, 1024, 128)
    assert MODULES["qwen35moe.qkvz"].width == 12288 and MODULES["deepseek.qkv_a"].shape == "7168->1536+576"


def test_a_filter_does_not_take_m16_for_m1():
    cases = PRESETS["issue"]()
    assert {case.rows for case in select(cases, ["M1"])} == {1}
    assert {case.rank for case in select(cases, ["r16"])} == {16}
    assert [case.name for case in select(cases, ["qkv r16 M1"])] == [
        "llama8b.qkv r16 M1 a1",
        "qwen35moe.qkvz r16 M1 a1",
    ]
    assert len(select(cases, ["llama8b.qkv r16", "down r64"])) == 12
    assert select(cases, []) == cases and select(cases, ["M3"]) == []
