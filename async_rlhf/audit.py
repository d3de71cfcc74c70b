"""What a run left behind, held against its contract: every sample used once, no token beyond the bound, every count true.

    journal/          booked anew, event by event
    rollouts/         stands for the segments that left the journal, and must agree with those that are still there
    metrics.jsonl, state.json, summary.json, checkpoints/    must say what the journal says

For a run that ended or was killed: a living one moves on between two of these files.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rlhf.audit_books import Books, Dataset, Sample, some
from async_rlhf.checkpoints import Checkpoint, newest
from async_rlhf.config import Config, load_config
from async_rlhf.errors import JournalError
from async_rlhf.journal import check_mark, read_frames
from async_rlhf.recorder import read_rows
from async_rlhf.rollouts import FOLDER
from async_rlhf.state import LIVE_PHASES, TrainingState, read_state

COUNTED = ("prompts", "completions", "tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What was counted, in groups where nothing else is said, and everything that is wrong."""

    updates: int
    """Batches trained, in the history that survived."""
    groups: int
    """Trained."""
    completions: int
    """Trained, all of each group."""
    tokens: int
    """Of these."""
    issued: int
    """Tickets."""
    live: int
    """Leased or waiting at the end."""
    voided: Mapping[str, int]
    """By reason; those dropped when the prompts ran out are among them."""
    staleness_max: int
    """Largest update minus version of a trained token."""
    lost: int
    """Tickets, or acknowledged samples, of which nothing became."""
    duplicated: int
    """Tickets that were used twice, and prompts that were drawn twice in one pass."""
    bound_violations: int
    """Trained with a token beyond the bound."""
    problems: tuple[str, ...]
    """Each says what, got, expected. Empty: the run kept its contract."""


def audit(run_folder: Path) -> Audit:
    """Check a run.

    Raises:
        ConfigError: no folder of a run. JournalError: the journal is damaged.
    """
    config, state = load_config([run_folder / "config.yaml"]).config, read_state(run_folder)
    finished = state.phase == "finished"
    frames = read_frames(run_folder / "journal")
    opening = next(frames, None)
    if opening is None:
        raise JournalError(f"{run_folder / 'journal'} must begin with a whole record, got none; the run ended before its first ticket")
    books, before, dataset = Books(), Dataset(), Dataset()
    for path in sorted((run_folder / FOLDER).glob("part-*.parquet")):
        left_journal = int(path.stem.removeprefix("part-")) < opening.position.segment
        for reader in (*([before] if left_journal else []), *([dataset] if left_journal or finished else [])):
            reader.read(path)
    books.begin(before)
    books.read(opening)
    for frame in frames:
        books.read(frame)
    lost, duplicated = _placed(books)
    bad, staleness_max, of_bound = _bound(books, config)
    totals = _totals(books, len(books.batches[: books.num_trained]))
    problems = [
        *books.problems,
        *dataset.problems,
        *of_bound,
        *(f"{what}: {some(tickets)}" for what, tickets in ((_LOST, lost), (_TWICE, duplicated)) if tickets),
        *_of_batches(books, config, finished=finished),
        *_of_dataset(books, dataset, finished=finished),
        *_of_files(run_folder, books, state),
    ]
    return Audit(
        updates=books.num_trained,
        groups=totals["prompts"],
        completions=totals["completions"],
        tokens=totals["tokens"],
        issued=books.issued,
        live=len(books.live),
        voided=Counter(reason for _, reason in books.ended),
        staleness_max=staleness_max,
        lost=len(lost | books.lost),
        duplicated=len(duplicated | books.duplicated),
        bound_violations=len(bad),
        problems=tuple(problems),
    )


_LOST = "tickets of which nothing became, expected each to be trained, voided or live"
_TWICE = "tickets that are in two places, expected one"


def _placed(books: Books) -> tuple[set[int], set[int]]:
    """Tickets that are nowhere, and tickets that are in more than one place."""
    places = Counter(number for batch in books.batches for number in batch)
    places.update(books.live.keys())
    places.update(number for number, _ in books.ended)
    known = {*range(books.issued), *books.samples}
    return known - places.keys(), {number for number, count in places.items() if count > 1}


def _bound(books: Books, config: Config) -> tuple[set[int], int, list[str]]:
    """Groups beyond the staleness bound, the largest staleness trained, and what to say."""
    bad: dict[int, str] = {}
    largest = 0
    for update, batch in enumerate(books.batches):
        for number in batch:
            sample = books.samples.get(number)
            if sample is None:
                continue
            if update < books.num_trained:
                largest = max(largest, update - sample.oldest)
            if not 0 <= update - sample.newest <= update - sample.oldest <= config.max_staleness:
                bad[number] = f"update {update} trains ticket {number} of versions {sample.oldest} to {sample.newest}"
    rule = f"expected {config.max_staleness} updates of age at most, and none from the future"
    return set(bad), largest, [f"{what}, {rule}" for what in bad.values()]


def _of_batches(books: Books, config: Config, *, finished: bool) -> list[str]:
    sizes = [len(batch) for batch in books.batches]
    problems = [f"batch {update} has {size} groups, expected {config.batch_groups}" for update, size in enumerate(sizes[:-1])]
    problems = [text for text, size in zip(problems, sizes, strict=False) if size != config.batch_groups]
    if sizes and not 0 < sizes[-1] <= config.batch_groups:
        problems.append(f"the last batch has {sizes[-1]} groups, expected 1 to {config.batch_groups}")
    untrained = len(sizes) - books.num_trained
    if untrained > (0 if finished else 1):
        problems.append(f"{untrained} decided batches were not trained, expected {'none' if finished else 'one at most'}")
    torn = [number for batch in books.batches for number in batch if number in books.samples and not books.samples[number].ordered]
    if torn:
        problems.append(f"tickets with tokens of no version, or of one that fell: {some(torn)}, expected none")
    return problems


def _of_dataset(books: Books, dataset: Dataset, *, finished: bool) -> list[str]:
    """The parts hold the trained batches; of a run that is not finished, those that left the journal."""
    problems: list[str] = []
    expected = set(range(books.num_trained)) if finished else set(dataset.batches)
    for update in sorted(expected ^ set(dataset.batches)):
        problems.append(f"the rollouts dataset {'lacks' if update in expected else 'has'} batch {update}, expected {len(expected)} batches")
    for update, groups in sorted(dataset.batches.items()):
        batch = books.batches[update] if update < len(books.batches) else ()
        if sorted(groups) != list(range(len(groups))) or tuple(groups[position] for position in sorted(groups)) != batch:
            problems.append(f"batch {update} of the rollouts dataset is {some(groups.values())}, expected {some(batch)}")
    other = [number for number, sample in dataset.samples.items() if books.samples.get(number, sample) != sample]
    if other:
        problems.append(f"the rollouts dataset has other samples than the journal for tickets {some(other)}")
    return problems


def _of_files(run_folder: Path, books: Books, state: TrainingState) -> list[str]:
    """What the other files say, against the journal."""
    problems = _of_state("state.json", state, books)
    versions = [int(row["version"]) for row in read_rows(run_folder)]
    # The state goes first, then the row. A driver that was killed may have gone back to a checkpoint before that.
    fewest = {"finished": state.version, "interrupted": state.version - 1, "failed": state.version - 1}.get(state.phase, 0)
    if versions != list(range(1, len(versions) + 1)) or not fewest <= len(versions) <= state.version:
        problems.append(f"metrics.jsonl has rows of versions {_ranges(versions)}, expected 1 to {state.version}, each once")
    if state.phase == "finished" and state.version != books.num_trained:
        problems.append(f"state.json is at version {state.version}, expected {books.num_trained}, as many batches as were trained")
    summary = run_folder / "summary.json"
    if state.phase not in LIVE_PHASES and summary.is_file():
        problems += _of_summary(json.loads(summary.read_text(encoding="utf-8")), state)
    checkpoint, _ = newest(run_folder)
    return problems + (_of_checkpoint(run_folder, checkpoint, books) if checkpoint else [])


def _of_state(name: str, state: TrainingState, books: Books) -> list[str]:
    if state.version > books.num_trained:
        return [f"{name} is at version {state.version}, expected {books.num_trained} at most: no more batches were trained"]
    totals = _totals(books, state.version)
    return [
        f"{name} counts {getattr(state, what)} {what} at version {state.version}, expected {totals[what]}"
        for what in COUNTED
        if getattr(state, what) != totals[what]
    ]


def _of_summary(summary: Mapping[str, Any], state: TrainingState) -> list[str]:
    pairs = [("updates", state.version), *((what, getattr(state, what)) for what in (*COUNTED, "optimizer_steps", "staleness_max"))]
    return [f"summary.json counts {summary[what]} {what}, expected {told}, as state.json" for what, told in pairs if summary[what] != told]


def _of_checkpoint(run_folder: Path, checkpoint: Checkpoint, books: Books) -> list[str]:
    name = f"checkpoint {checkpoint.version}"
    try:
        check_mark(run_folder / "journal", checkpoint.mark)
    except JournalError as error:
        return [f"{name} does not belong to the journal: {error}"]
    return _of_state(name, checkpoint.state, books)


def _totals(books: Books, version: int) -> dict[str, int]:
    """What was trained up to `version`."""
    samples: list[Sample] = [books.samples[number] for batch in books.batches[:version] for number in batch if number in books.samples]
    return {
        "prompts": sum(len(batch) for batch in books.batches[:version]),
        "completions": sum(sample.num_completions for sample in samples),
        "tokens": sum(sample.num_tokens for sample in samples),
    }


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges of consecutive ones: 1-4, 4-9."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{begin}-{end}" for begin, end in ranges) or "none"
