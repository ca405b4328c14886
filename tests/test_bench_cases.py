"""The benchmark's cases: floors as published, names that mean one thing, presets that hold what they promise."""

from __future__ import annotations

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
ROWS = ((1, 1), (16, 16), (64, 32), (256, 32), (2048, 4), (8192, 4))


@pytest.mark.parametrize(("module", "rank"), FLOORS)
def test_floors_are_the_published_ones(module, rank):
    for (rows, adapters), published in zip(ROWS, FLOORS[module, rank], strict=True):
        case = Case.parse(f"{module} r{rank} M{rows} a{adapters}")
        assert case.floor_us == pytest.approx(published, abs=0.25), case.name


def test_the_floor_never_falls_with_more_bytes():
    sizes = [0, 1, 1000, *(int(mib * 2**20) + d for mib, _ in READ_COLD_US for d in (-1, 0, 1)), 2**29, 2**31]
    times = [read_cold_us(size) for size in sizes]
    assert times == sorted(times) and times[0] == NODE_US
    for mib, us in READ_COLD_US:
        assert read_cold_us(mib * 2**20) == pytest.approx(us)
    assert floor_us(0, 31e6) > floor_us(0, 29e6)


def test_bytes_count_each_adapter_once_and_y_both_ways():
    case = Case.parse("llama8b.qkv r16 M16 a16")
    assert case.weight_bytes == 16 * 16 * (3 * 4096 + 6144) * 2
    assert case.xy_bytes == 16 * (4096 + 2 * 6144) * 2


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
    assert [case.name for case in issue] == want
    assert set(want) <= full
    assert {case.name for case in PRESETS["quick"]()} <= full
    cases = [Case.parse(name) for name in full]
    assert {case.module.name for case in cases} == set(MODULES)
    assert {case.rank for case in cases} == {8, 16, 32, 64, 128}
    layers = [case for case in cases if not case.module.is_lm_head]
    assert {case.rows for case in layers} == {1, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096, 8192}
    assert {case.adapters for case in layers if not case.is_decode} == {1, 4, 8}
    assert {case.rows for case in cases if case.module.is_lm_head} == {1, 16, 64}
    for preset in PRESETS.values():
        assert {case.regime for case in preset()} == {name for name, _ in REGIMES}


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
