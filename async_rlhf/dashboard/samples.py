"""Completions to look at: of the held-out prompts before and now, and the newest ones that were sampled for training."""

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from async_rlhf import rollout_table
from async_rlhf.dashboard.reading import Fields, count, fields, number, open_inside, text
from async_rlhf.errors import JournalError
from async_rlhf.evaluation import Evaluation, Sample
from async_rlhf.evaluation_log import LATEST
from async_rlhf.history_codec import CARRIED, KEPT, TIED
from async_rlhf.journal_frames import FRAME_FIELDS, FRAME_HEADER_BYTES, FRAME_MAGIC, SEGMENT_HEADER_BYTES, segment_paths
from async_rlhf.report_samples import choose, kinds_of
from async_rlhf.report_text import MAX_TEXT, unhidden
from async_rlhf.types import ScoredGroup

MAX_HELD_OUT = 16
MAX_GROUPS = 4
MAX_COMPLETIONS = 8
MAX_PAYLOAD_BYTES = 32 << 20
"""A larger record is not looked into."""
MAX_FRAMES = 200_000
"""Headers hopped over in one reading."""
MAX_SEGMENTS = 3
"""Of the journal, the newest: the last one may hold no groups yet."""
JOURNAL = "journal"


def shown(written: str) -> str:
    """A text as the page may show it: nothing in it hides or reorders, and the middle of a long one is left out. Not escaped."""
    head, tail = written[: MAX_TEXT * 3 // 4], written[-MAX_TEXT // 4 :]
    left_out = len(written) - len(head) - len(tail)
    return unhidden(written if len(written) <= MAX_TEXT else f"{head} [{left_out:,} characters left out] {tail}")


def held_out(written: Fields) -> dict[str, object] | None:
    """What samples.json says: rows of before and now, those that changed first; None where it has no evaluation."""
    start = _evaluation(written.get("start"))
    newest = _evaluation(written.get("final")) or _evaluation(written.get(LATEST))
    if newest is None or start is None:
        only = newest or start
        if only is None:
            return None
        rows = [{"kind": "", "prompt": shown(s.prompt), "expected": shown(s.expected), "before": _answer(s)} for s in only.samples]
        return {"before": _when(only), "after": None, "counts": {"prompts": len(rows)}, "colours": {}, "rows": rows[:MAX_HELD_OUT]}
    chosen, counts = choose((start, newest), MAX_HELD_OUT)
    rows = [
        {"kind": kind, "prompt": shown(a.prompt), "expected": shown(a.expected), "before": _answer(a), "after": _answer(b)}
        for kind, a, b in chosen
    ]
    return {"before": _when(start), "after": _when(newest), "counts": counts, "colours": kinds_of((start, newest)), "rows": rows}


@dataclass
class NewestGroups:
    """Follows the journal of a run: which groups came in last. Hops over what it does not show, so that it costs next to nothing."""

    folder: Path
    """Of the run."""
    segment: int = -1
    offset: int = 0
    groups: Sequence[ScoredGroup] = ()

    def read(self) -> Sequence[ScoredGroup]:
        """The newest groups, newest first; what it found before where the journal has nothing newer that can be read."""
        segments = sorted(segment_paths(self.folder / JOURNAL))[-MAX_SEGMENTS:]
        for segment in [each for each in segments if each >= self.segment]:
            if segment != self.segment:
                self.segment, self.offset = segment, SEGMENT_HEADER_BYTES
            handle = open_inside(self.folder, f"{JOURNAL}/segment-{segment:08d}.log")
            if handle is None:
                continue
            try:
                for begin, num_bytes in self._hop(handle):
                    self._decode(os.pread(handle, num_bytes, begin))
            finally:
                os.close(handle)
        return self.groups

    def _hop(self, handle: int) -> Sequence[tuple[int, int]]:
        """Where the payloads of the newest records of groups begin, and their bytes, in order."""
        size, found = os.fstat(handle).st_size, deque[tuple[int, int]](maxlen=MAX_GROUPS)
        for _ in range(MAX_FRAMES):
            header = os.pread(handle, FRAME_HEADER_BYTES, self.offset)
            if len(header) < FRAME_HEADER_BYTES or not header.startswith(FRAME_MAGIC):
                break
            _, kind, num_bytes, *_ = FRAME_FIELDS.unpack(header[: FRAME_FIELDS.size])
            begin = self.offset + FRAME_HEADER_BYTES
            if begin + num_bytes > size:
                break
            if kind.decode("latin-1") in (KEPT, TIED, CARRIED) and num_bytes <= MAX_PAYLOAD_BYTES:
                found.append((begin, num_bytes))
            self.offset = begin + num_bytes
        return found

    def _decode(self, payload: bytes) -> None:
        try:
            groups = rollout_table.decode(payload)
        except (JournalError, ArithmeticError, LookupError, RecursionError, AttributeError):  # not what a run writes
            return
        self.groups = [*groups[::-1], *self.groups][:MAX_GROUPS]


def sampled(groups: Sequence[ScoredGroup]) -> list[dict[str, object]]:
    """Groups as the page shows them: the prompt, and its completions with their scores, best first."""
    return [
        {
            "prompt": shown(scored.group.ticket.prompt.text),
            "version": max((span.version for rollout in scored.group.rollouts for span in rollout.version_spans), default=0),
            "completions": [
                {
                    "text": shown(scored.completions[index]),
                    "score": number(float(scored.scores[index])),
                    "parts": {unhidden(name)[:80]: number(float(of[index])) for name, of in scored.reward_parts.items()},
                    "cut": scored.group.rollouts[index].finish_reason == "length",
                }
                for index in sorted(range(len(scored.scores)), key=lambda k: -float(scored.scores[k]))[:MAX_COMPLETIONS]
            ],
        }
        for scored in groups
    ]


def _evaluation(written: object) -> Evaluation | None:
    found = fields(written)
    listed = found.get("samples")
    samples = tuple(_sample(fields(each)) for each in listed) if isinstance(listed, list) else ()
    if not samples:
        return None
    oldest = number(found.get("oldest_version"))
    return Evaluation(
        version=count(found.get("version")), temperature=0.0, samples=samples, oldest_version=-1 if oldest is None else int(oldest)
    )


def _sample(found: Fields) -> Sample:
    return Sample(
        prompt=text(found.get("prompt")),
        completion=text(found.get("completion")),
        expected=text(found.get("expected")),
        score=number(found.get("score")) or 0.0,
        reward=number(found.get("reward")),
    )


def _answer(sample: Sample) -> dict[str, object]:
    return {"text": shown(sample.completion), "score": sample.score, "reward": sample.reward}


def _when(evaluation: Evaluation) -> str:
    oldest, newest = evaluation.versions
    return f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"
