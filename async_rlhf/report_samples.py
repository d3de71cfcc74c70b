"""Completions for people to read: the held-out prompts, before and after."""

from collections.abc import Iterator
from itertools import zip_longest

from async_rlhf.evaluation import Evaluation, Sample, pair_up
from async_rlhf.report_text import folded

MAX_SAMPLES = 40
RIGHT_OR_WRONG = {"fixed": "good", "broken": "bad", "still wrong": "muted", "still right": "muted"}
GRADED = {"better": "good", "worse": "bad", "equal": "muted"}
"""Kind of change -> colour, in the order of the page; where scores are not 0 or 1 only they say what is better."""


def kinds_of(evaluations: tuple[Evaluation, Evaluation]) -> dict[str, str]:
    """The kinds of change between two evaluations, each with its colour."""
    binary = all(score in (0, 1) for evaluation in evaluations for score in evaluation.scores)
    return RIGHT_OR_WRONG if binary else GRADED


def changes(start: Evaluation, final: Evaluation) -> Iterator[tuple[str, Sample, Sample]]:
    """(kind, before, after) of each prompt, in the order of the start."""
    better, worse, *same = kinds_of((start, final))
    for before, after in pair_up(start, final):
        if after.score == before.score:
            yield same[-1] if after.score >= 1 else same[0], before, after
        else:
            yield better if after.score > before.score else worse, before, after


def choose(evaluations: tuple[Evaluation, Evaluation], max_samples: int) -> tuple[list[tuple[str, Sample, Sample]], dict[str, int]]:
    """What to show of two evaluations, as `changes` gives it, changed ones first, by kind; and how many of each kind there are."""
    kinds, pairs = kinds_of(evaluations), list(changes(*evaluations))
    by_kind = {kind: [pair for pair in pairs if pair[0] == kind] for kind in kinds}
    # Better and worse by turns, so that many of one do not hide the few of the other.
    better, worse, *same = by_kind.values()
    changed = [pair for turn in zip_longest(better, worse) for pair in turn if pair is not None]
    rest = [pair for of_kind in same for pair in of_kind]
    chosen = sorted((changed + rest)[:max_samples], key=lambda pair: [*kinds].index(pair[0]))
    return chosen, {kind: len(of_kind) for kind, of_kind in by_kind.items()}


def render_samples(evaluations: tuple[Evaluation, Evaluation] | None) -> str:
    """A table of prompts, references, and completions with their scores; those that changed come first.

    Args:
        evaluations: before and after; None: the run has not come so far.
    """
    if evaluations is None:
        return '<p class="note">No completions to show yet: they are written with the first evaluation after the start.</p>'
    kinds = kinds_of(evaluations)
    chosen, num_of_kind = choose(evaluations, MAX_SAMPLES)
    body = "".join(
        f'<tr><td><span class="{kinds[kind]}">{kind}</span></td><td>{folded(start.prompt)}</td><td>{folded(start.expected)}</td>'
        f"<td>{_answer(start)}</td><td>{_answer(final)}</td></tr>"
        for kind, start, final in chosen
    )
    counts = ", ".join(f"{num} {kind}" for kind, num in num_of_kind.items())
    before, after = _when(evaluations[0], "before"), _when(evaluations[1], "after")
    head = f'<tr><th style="width: 7.5em"></th><th>prompt</th><th>reference</th><th>{before}</th><th>{after}</th></tr>'
    return (
        f'<p class="note">{len(chosen)} of {sum(num_of_kind.values())} held-out prompts ({counts}); those that changed come first.</p>'
        f'<div class="card scroll"><table class="samples"><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    )


def _when(evaluation: Evaluation, name: str) -> str:
    oldest, newest = evaluation.versions
    return f"{name} (version {newest})" if oldest == newest else f"{name} (versions {oldest} to {newest})"


def _answer(sample: Sample) -> str:
    text = folded(sample.completion) or "<span class=muted>(empty)</span>"
    if sample.score not in (0, 1):
        marks = [f"{sample.score:.3g}"] + ([f"reward {sample.reward:.3g}"] if sample.reward is not None else [])
        return f'<span class="score">{", ".join(marks)}</span> {text}'
    mark = '<b class="good" title="right">&#10003;</b>' if sample.score else '<b class="bad" title="wrong">&#10007;</b>'
    return f"{mark} {text}"
