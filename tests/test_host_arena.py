"""The arena allocator against a model: never overlaps, always coalesces, reports what it has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from polylora import _host


class ArenaModel(RuleBasedStateMachine):
    """Random alloc, free and grow beside a plain dictionary of ranges."""

    live = Bundle("live")

    @initialize(units=st.integers(0, 64), alignment=st.sampled_from([1, 3, 8]))
    def start(self, units: int, alignment: int):
        self.alignment = alignment
        self.arena = _host.ArenaAllocator(units * alignment, alignment)
        self.capacity = units * alignment
        self.ranges: dict[int, int] = {}

    @rule(target=live, size=st.integers(1, 80))
    def alloc(self, size: int):
        rounded = -(-size // self.alignment) * self.alignment
        free = [n for _, n in self.free()]
        needed = self.arena.capacity_for(size)
        offset = self.arena.alloc(size)
        if offset is None:
            assert max(free, default=0) < rounded, "refused although a range is long enough"
            assert needed > self.capacity
            return multiple()
        assert needed == self.capacity
        assert min(n for n in free if n >= rounded) == self.free_length_at(offset, rounded), "not the best fit"
        self.ranges[offset] = rounded
        return offset

    @rule(offset=consumes(live))
    def release(self, offset: int):
        self.arena.free(offset)
        del self.ranges[offset]
        with pytest.raises(ValueError, match="live allocation"):
            self.arena.free(offset)

    @rule(units=st.integers(0, 32))
    def grow(self, units: int):
        self.capacity += units * self.alignment
        self.arena.grow(self.capacity)

    @rule(size=st.integers(1, 80))
    def grow_for(self, size: int):
        needed = -(-self.arena.capacity_for(size) // self.alignment) * self.alignment
        self.arena.grow(needed)
        self.capacity = needed
        assert self.arena.stats()["largest_free"] >= size

    def free(self) -> list[tuple[int, int]]:
        """The free ranges, from the model alone: maximal gaps between live ranges."""
        gaps, at = [], 0
        for offset, size in sorted(self.ranges.items()):
            if offset > at:
                gaps.append((at, offset - at))
            at = offset + size
        if at < self.capacity:
            gaps.append((at, self.capacity - at))
        return gaps

    def free_length_at(self, offset: int, size: int) -> int:
        """Length of the gap that ``offset`` was taken from; called before the model knows of it."""
        return next(n for start, n in self.free() if start <= offset and offset + size <= start + n)

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "arena"):
            return
        end = 0
        for offset, size in self.arena.allocated_ranges():
            assert offset >= end, "two allocations overlap"
            assert offset % self.alignment == 0
            end = offset + size
        assert end <= self.capacity
        assert dict(self.arena.allocated_ranges()) == self.ranges
        assert self.arena.free_ranges() == self.free(), "free ranges are not coalesced"
        stats = self.arena.stats()
        assert stats["capacity"] == self.arena.capacity == self.capacity
        assert stats["used"] == sum(self.ranges.values())
        assert stats["largest_free"] == max((n for _, n in self.free()), default=0)
        assert stats["allocations"] == len(self.ranges)
        assert stats["free_ranges"] == len(self.free())


TestArenaModel = ArenaModel.TestCase


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20), order=st.randoms(use_true_random=False))
def test_freeing_all_in_any_order_leaves_one_range(sizes: list[int], order):
    arena = _host.ArenaAllocator(8 * len(sizes) * 50, 8)
    offsets = [arena.alloc(size) for size in sizes]
    order.shuffle(offsets)
    for offset in offsets:
        arena.free(offset)
    assert arena.free_ranges() == [(0, arena.capacity)]
    assert arena.stats()["used"] == 0


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match="alignment must be >= 1, got 0"):
        _host.ArenaAllocator(8, 0)
    with pytest.raises(ValueError, match="capacity must be a multiple of 8"):
        _host.ArenaAllocator(12, 8)
    arena = _host.ArenaAllocator(16, 8)
    for size in (0, -1, 2**62):
        with pytest.raises(ValueError, match=r"size must be in \[1, 2\^60\]"):
            arena.alloc(size)
    with pytest.raises(ValueError, match="live allocation, got 0"):
        arena.free(0)
    with pytest.raises(ValueError, match="capacity must be a multiple of 8 and >= 16, got 8"):
        arena.grow(8)


def test_offsets_beyond_32_bits():
    arena = _host.ArenaAllocator(2**40, 8)
    first = arena.alloc(2**35)
    second = arena.alloc(2**35)
    assert sorted((first, second)) == [0, 2**35]
    arena.free(first)
    arena.free(second)
    assert arena.free_ranges() == [(0, 2**40)]
