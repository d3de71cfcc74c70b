"""How far prompts have been drawn: all that a resume needs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCursor:
    """How far one source of rows has been drawn."""

    epoch: int = 0
    """Pass over the source; of a live source: passes over its old rows, the first of which is 1."""
    index: int = 0
    """Rows drawn in this pass; streaming: in this block of it."""
    size: int = 0
    """Rows of a pass; 0: not known (streaming)."""
    block: int = 0
    """Streaming: blocks of this pass drawn completely."""
    stream: str = ""
    """Streaming: the reader's own state at the beginning of the block, JSON; empty: the beginning of the source."""
    fresh: int = 0
    """Live: rows drawn for the first time."""
    files: Mapping[str, int] = field(default_factory=dict[str, int])
    """Live folders: file -> its rows, in the order in which the files were found."""
    drawn: int = 0
    """Prompts made of its rows."""
    skipped: Mapping[str, int] = field(default_factory=dict[str, int])
    """Reason -> rows that no prompt was made of, each time they came round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCursor:
    """How far a stream of prompts has been drawn."""

    epoch: int
    """Pass over the problems; datasets: completed by every source."""
    index: int
    """Problems drawn in this pass; datasets: prompts drawn since the beginning."""
    sources: Mapping[str, SourceCursor] = field(default_factory=dict[str, SourceCursor])
    """Name -> position; empty for a built-in task."""

    @property
    def skipped(self) -> Mapping[str, int]:
        """Reason -> rows that no prompt was made of, all sources together."""
        counts: Counter[str] = Counter()
        for source in self.sources.values():
            counts.update(source.skipped)
        return dict(counts)

    def since(self, before: "PromptCursor") -> "PromptCursor":
        """This cursor without the files that `before` lists already: a journal need not say them again."""
        return replace(self, sources={name: _without_files(source, before.sources.get(name)) for name, source in self.sources.items()})

    def onto(self, before: "PromptCursor") -> "PromptCursor":
        """The whole cursor again: c.since(before).onto(before) == c."""
        return replace(self, sources={name: _with_files(source, before.sources.get(name)) for name, source in self.sources.items()})


def _without_files(source: SourceCursor, before: SourceCursor | None) -> SourceCursor:
    known = before.files if before is not None else {}
    return replace(source, files={name: rows for name, rows in source.files.items() if name not in known})


def _with_files(source: SourceCursor, before: SourceCursor | None) -> SourceCursor:
    return replace(source, files={**before.files, **source.files}) if before is not None else source
