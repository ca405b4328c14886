"""Random sequences of loads, unloads and pins against a model of the pool."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from polylora.pool import PoolFrozen, PoolFull, SlotInUse
from test_pool_adapters import SITES, arenas, assert_empty, check, make_adapter, make_pool

NAMES = st.sampled_from("abcdef")


class PoolModel(RuleBasedStateMachine):
    """Who is loaded, in which slot, how often acquired; the weights are compared after every step."""

    def __init__(self):
        super().__init__()
        self.pool = make_pool(max_adapters=3)
        self.loaded: dict[str, tuple[int, object]] = {}
        self.pins: dict[str, int] = {}

    @rule(
        name=NAMES,
        rank=st.integers(1, 16),
        sites=st.lists(st.sampled_from(sorted(SITES)), min_size=1, max_size=3, unique=True),
        shared=st.booleans(),
    )
    def load(self, name: str, rank: int, sites: list[str], shared: bool):
        adapter = make_adapter(name, rank=rank, seed=rank, sites=sites, shared=shared)
        if name in self.loaded:
            with pytest.raises(ValueError, match="not loaded"):
                self.pool.load(adapter)
        elif len(self.loaded) == 3:
            with pytest.raises(PoolFull):
                self.pool.load(adapter)
        else:
            try:
                slot = self.pool.load(adapter)
            except PoolFrozen:
                assert self.pool.frozen
                return
            assert slot == min({0, 1, 2} - {s for s, _ in self.loaded.values()})
            self.loaded[name] = (slot, adapter)
            self.pins[name] = 0

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def unload(self, data):
        name = data.draw(st.sampled_from(sorted(self.loaded)))
        if self.pins[name]:
            with pytest.raises(SlotInUse):
                self.pool.unload(name)
        else:
            self.pool.unload(name)
            del self.loaded[name], self.pins[name]

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def acquire(self, data):
        name = data.draw(st.sampled_from(sorted(self.loaded)))
        assert self.pool.acquire([None, name]) == [-1, self.loaded[name][0]]
        self.pins[name] += 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def release(self, data):
        name = data.draw(st.sampled_from(sorted(n for n, pins in self.pins.items() if pins)))
        self.pool.release([name])
        self.pins[name] -= 1

    @rule()
    def freeze(self):
        self.pool.freeze()

    @invariant()
    def agrees_with_the_model(self):
        assert {name: self.pool.slot(name) for name in self.pool.names} == {n: s for n, (s, _) in self.loaded.items()}
        used = {name: it["pins"] for name, it in self.pool.stats()["adapters"].items()}
        assert used == self.pins
        check(self.pool, [adapter for _, adapter in self.loaded.values()])
        for arena in arenas(self.pool):
            assert arena.ranges.capacity == arena.tensor.size(0)
            for offset, size in arena.ranges.free_ranges():
                assert not arena.tensor[offset : offset + size].any(), "old weights are readable in free memory"

    def teardown(self):
        for name in list(self.loaded):
            self.pool.release([name] * self.pins[name])
            self.pool.unload(name)
        assert_empty(self.pool)


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
