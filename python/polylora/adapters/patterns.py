"""Regular expressions of an adapter's config, matched in time linear in the module's path.

Patterns come with the adapter, and :mod:`re` backtracks: a hostile one (``.?`` thirty times, ``(a+)+``, ``(a|a)``
thirty times) would match for years. Here a set of positions, one bit each, goes through the pattern once: every
operation maps the positions where it may start to those where it may end. That answers "does the whole path match"
exactly, which is all peft asks; what it cannot answer (back-references, possessive and atomic groups) and flags are
refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property

try:
    from re import _parser
except ImportError:  # Python 3.10
    import sre_parse as _parser

_MAX_LENGTH = 4096
# Operations for a path of _PATH characters; one takes some 0.3 us.
_MAX_COST, _PATH = 60_000, 300

_MAX_DEPTH = 40  # groups within groups: matching recurses
_UNSUPPORTED = "back-references, possessive and atomic groups and flags are not supported"


class _Path:
    """A text and, for a set of characters, the positions where one of them stands."""

    def __init__(self, text: str):
        self.text, self.length = text, len(text)
        self.where: dict[str, int] = {}
        for i, char in enumerate(text):
            self.where[char] = self.where.get(char, 0) | 1 << i
        self._classes: dict[Callable, int] = {}

    def positions(self, accepts: Callable[[str], bool]) -> int:
        if accepts not in self._classes:
            self._classes[accepts] = sum(mask for char, mask in self.where.items() if accepts(char))
        return self._classes[accepts]

    def boundaries(self) -> int:
        words = [False, *(_is_word(char) for char in self.text), False]
        return sum(1 << i for i in range(self.length + 1) if words[i] != words[i + 1])


_Step = Callable[[_Path, int], int]


class Pattern:
    """A compiled pattern.

    Raises:
        re.error: it is no regular expression, or not one that this module can match in bounded time.
    """

    def __init__(self, pattern: str):
        if len(pattern) > _MAX_LENGTH:
            raise re.error(f"longer than {_MAX_LENGTH} characters")
        parsed = _parser.parse(pattern)
        if parsed.state.flags & ~re.UNICODE.value:
            raise re.error(_UNSUPPORTED)
        self._step, cost = _sequence(parsed, 0)
        if cost > _MAX_COST:
            raise re.error("too many repeats within repeats")
        self._pattern = pattern
        # Without a choice there is nothing to go back to, and re is faster: a rank of its own for every module.
        self._straight = _is_straight(parsed)

    @cached_property
    def _whole(self) -> re.Pattern:
        return re.compile(self._pattern)

    @cached_property
    def _tail(self) -> re.Pattern:
        return re.compile(rf"(.*\.)?({self._pattern})$")

    def matches(self, path: str) -> bool:
        """As ``re.fullmatch``, the rule of ``target_modules`` and ``exclude_modules``."""
        if self._straight:
            return self._whole.fullmatch(path) is not None
        return self._run(path, 1)

    def matches_tail(self, path: str) -> bool:
        """The whole of a dotted tail, the rule of ``rank_pattern`` and ``alpha_pattern``."""
        if self._straight:
            return self._tail.match(path) is not None
        return self._run(path, 1 | sum(1 << i + 1 for i, char in enumerate(path) if char == "."))

    def _run(self, text: str, starts: int) -> bool:
        path = _Path(text)
        return bool(self._step(path, starts) >> path.length & 1)


def _is_straight(parsed) -> bool:
    return all(op in (_parser.LITERAL, _parser.NOT_LITERAL, _parser.ANY, _parser.IN, _parser.AT) for op, _ in parsed)


def _sequence(parsed, depth: int) -> tuple[_Step, int]:
    if depth > _MAX_DEPTH:
        raise re.error("groups nested too deep")
    steps, cost = [], 1
    for op, value in parsed:
        step, more = _operation(op, value, depth + 1)
        steps.append(step)
        cost += more

    def run(path: _Path, starts: int) -> int:
        for step in steps:
            if not starts:
                break
            starts = step(path, starts)
        return starts

    return run, cost


def _operation(op, value, depth: int) -> tuple[_Step, int]:
    if op is _parser.LITERAL:
        char = chr(value)
        return (lambda path, starts: (starts & path.where.get(char, 0)) << 1), 1
    accepts = _character(op, value)
    if accepts is not None:
        return (lambda path, starts: (starts & path.positions(accepts)) << 1), 1
    if op is _parser.SUBPATTERN:
        _, on, off, body = value
        if on or off:
            raise re.error(_UNSUPPORTED)
        return _sequence(body, depth)
    if op is _parser.BRANCH:
        return _branch([_sequence(body, depth) for body in value[1]])
    if op in (_parser.MAX_REPEAT, _parser.MIN_REPEAT):
        return _repeat(*value, depth)
    if op in (_parser.ASSERT, _parser.ASSERT_NOT):
        return _look(op is _parser.ASSERT, *value, depth)
    if op is _parser.AT:
        return _anchor(value), 1
    raise re.error(_UNSUPPORTED)


def _branch(branches: list[tuple[_Step, int]]) -> tuple[_Step, int]:
    def run(path: _Path, starts: int) -> int:
        ends = 0
        for step, _ in branches:
            ends |= step(path, starts)
        return ends

    return run, sum(cost for _, cost in branches)


def _repeat(least: int, most: int, body, depth: int) -> tuple[_Step, int]:
    accepts = _character(*body[0]) if len(body) == 1 else None
    if accepts is not None and most is _parser.MAXREPEAT and least <= 1:

        def run_of_characters(path: _Path, starts: int) -> int:
            there = path.positions(accepts)
            if least:
                starts = (starts & there) << 1
            # Adding carries every start through the run of characters it stands in.
            return (((starts & there) + there) ^ there) | starts

        return run_of_characters, 1
    step, cost = _sequence(body, depth)

    def run(path: _Path, starts: int) -> int:
        # Once more than the path is long changes nothing: some turn was empty, and may be left out or done again.
        for _ in range(min(least, path.length + 1)):
            starts = step(path, starts)
            if not starts:
                return 0
        ends = new = starts
        turns = most - least
        while new and turns > 0:
            new = step(path, new) & ~ends
            ends |= new
            turns -= 1
        return ends

    return run, (min(least, _PATH) + min(most - least, _PATH)) * cost


def _look(wanted: bool, direction: int, body, depth: int) -> tuple[_Step, int]:
    step, cost = _sequence(body, depth)
    width, widest = body.getwidth()
    if direction < 0 and width != widest:
        raise re.error("look-behind requires fixed-width pattern")
    back = width if direction < 0 else 0

    def holds(path: _Path, at: int) -> bool:
        if at < back:
            return False
        ends = step(path, 1 << at - back)
        return bool(ends >> at & 1 if direction < 0 else ends)

    def run(path: _Path, starts: int) -> int:
        return sum(1 << at for at in range(path.length + 1) if starts >> at & 1 and holds(path, at) == wanted)

    return run, _PATH * cost


def _anchor(where) -> _Step:
    if where in (_parser.AT_BEGINNING, _parser.AT_BEGINNING_STRING):
        return lambda path, starts: starts & 1
    if where is _parser.AT_END:
        return lambda path, starts: starts & (1 << path.length | (path.text.endswith("\n") << path.length >> 1))
    if where is _parser.AT_END_STRING:
        return lambda path, starts: starts & 1 << path.length
    if where is _parser.AT_BOUNDARY:
        return lambda path, starts: starts & path.boundaries()
    if where is _parser.AT_NON_BOUNDARY:
        return lambda path, starts: starts & ~path.boundaries()
    raise re.error(_UNSUPPORTED)


# -- characters ------------------------------------------------------------------------------------------------------


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES = {
    _parser.CATEGORY_DIGIT: str.isdecimal,
    _parser.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    _parser.CATEGORY_SPACE: str.isspace,
    _parser.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    _parser.CATEGORY_WORD: _is_word,
    _parser.CATEGORY_NOT_WORD: lambda char: not _is_word(char),
}


def _character(op, value) -> Callable[[str], bool] | None:
    """Which characters an operation takes, where it takes one; None where it is of another kind."""
    if op is _parser.LITERAL:
        return lambda char: ord(char) == value
    if op is _parser.NOT_LITERAL:
        return lambda char: ord(char) != value
    if op is _parser.ANY:
        return lambda char: char != "\n"
    if op is not _parser.IN:
        return None
    negate = value[0][0] is _parser.NEGATE
    members = [_member(*item) for item in value[negate:]]
    return lambda char: any(member(char) for member in members) != negate


def _member(op, value) -> Callable[[str], bool]:
    if op is _parser.RANGE:
        return lambda char: value[0] <= ord(char) <= value[1]
    if op is _parser.CATEGORY:
        return _CATEGORIES[value]
    return lambda char: ord(char) == value
