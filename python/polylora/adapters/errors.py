"""The one error adapters are refused with."""

from __future__ import annotations

from collections.abc import Sequence


class AdapterError(ValueError):
    """An adapter that cannot be served exactly. Nothing of it was loaded.

    Args:
        adapter: name of the adapter.
        problems: everything that is wrong with it, each ``<problem>: expected ..., got ...``.

    Attributes:
        adapter: the name.
        problems: the list, one entry an offending tensor, file or config key.
    """

    def __init__(self, adapter: str, problems: Sequence[str]):
        self.adapter, self.problems = adapter, list(problems)
        super().__init__("\n".join(f"polylora: adapter {adapter!r}: {problem}" for problem in self.problems))

    def __reduce__(self):
        return type(self), (self.adapter, self.problems)
