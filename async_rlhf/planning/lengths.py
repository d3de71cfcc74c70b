"""How long completions are, group by group: drawn from what a run sampled, or from a log-normal."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from async_rlhf.config import Config
from async_rlhf.errors import ConfigError
from async_rlhf.rollouts import FOLDER, fates

MAX_GROUPS = 5000
"""Of a run, the last ones: policies change how long they answer."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Groups to draw from."""

    tokens: Array
    """[G, K] completion tokens."""
    tied: Array
    """[G] bool: all scores of the group were equal."""
    prompt_tokens: float
    """Mean, per prompt."""
    still_tied: float = 1.0
    """Of the groups that are tied without one of their completions, the share that is tied with it, too."""

    @property
    def mean_tokens(self) -> float:
        """Per completion."""
        return float(self.tokens.mean())

    @property
    def mean_sequence_tokens(self) -> float:
        """Per sequence, prompt included."""
        return self.mean_tokens + self.prompt_tokens

    def draw(self, rng: np.random.Generator, num_completions: int) -> tuple[Array, bool]:
        """One group: [num_completions] lengths, and whether it is tied. Siblings stay siblings; missing ones are drawn among them."""
        index = int(rng.integers(len(self.tokens)))
        group, tied = self.tokens[index], bool(self.tied[index])
        more = num_completions - len(group)
        if more > 0:
            group, tied = rng.choice(group, num_completions), tied and rng.random() < self.still_tied**more
        elif more < 0 and not tied:
            tied = rng.random() < self._tied_without(-more)
        return group[:num_completions], bool(tied)

    def _tied_without(self, fewer: int) -> float:
        """Of the groups that are not tied, the share that is without so many of their completions."""
        now = float(self.tied.mean())
        then = min(1.0, now / max(self.still_tied**fewer, 1e-9))
        return (then - now) / (1 - now) if now < 1 else 0.0


def lognormal_lengths(*, median: float, sigma: float, prompt_tokens: float, config: Config, seed: int = 0) -> Lengths:
    """Log-normal completions, cut at generator.max_new_tokens; no group is tied.

    Raises:
        ConfigError: a median that is no length, or a negative spread.
    """
    if not (
        math.isfinite(median)
        and median >= 1
        and math.isfinite(sigma)
        and sigma >= 0
        and math.isfinite(prompt_tokens)
        and prompt_tokens >= 0
    ):
        raise ConfigError(f"lengths need a median >= 1, a sigma >= 0 and prompt tokens >= 0, got {median:g}, {sigma:g}, {prompt_tokens:g}")
    rng = np.random.default_rng(seed)
    tokens = np.exp(rng.normal(math.log(median), sigma, size=(MAX_GROUPS // 5, config.completions_per_prompt)))
    tokens = np.clip(np.ceil(tokens), 1, config.generator.max_new_tokens)
    return Lengths(tokens=tokens, tied=np.zeros(len(tokens), dtype=bool), prompt_tokens=prompt_tokens)


def measured_lengths(run: Path, config: Config) -> Lengths:
    """The last MAX_GROUPS groups that a run sampled: from its dataset, and where that is empty from its journal.

    Raises:
        ConfigError: it has neither, or they hold no whole group.
    """
    groups = _from_parts(sorted((run / FOLDER).glob("part-*.parquet")), config.completions_per_prompt)
    if not groups:
        groups = _from_journal(run / "journal", config.completions_per_prompt)
    if not groups:
        raise ConfigError(f"{run} holds no sampled groups (rollouts/, journal/); give the lengths (--median-tokens), or another run")
    groups = groups[-MAX_GROUPS:]
    return Lengths(
        tokens=np.array([lengths for lengths, _, _ in groups]),
        tied=np.array([spread == 1.0 for _, spread, _ in groups]),
        prompt_tokens=float(np.mean([prompt for _, _, prompt in groups])),
        still_tied=_still_tied([spread for _, spread, _ in groups]),
    )


Group = tuple[list[int], float, int]
"""Lengths of the completions, share of them without which the rest is tied (1: all are), tokens of the prompt."""


def _tied_without_one(scores: Sequence[float]) -> float:
    if len(scores) < 3:  # without one of two nothing is left that could be tied
        return float(len(scores) == 2 and scores[0] == scores[1])
    return float(np.mean([len({*scores[:left], *scores[left + 1 :]}) == 1 for left in range(len(scores))]))


def _still_tied(spreads: Sequence[float]) -> float:
    without_one = float(np.mean(spreads))
    return float(np.mean([spread == 1.0 for spread in spreads])) / without_one if without_one else 1.0


def _from_parts(parts: list[Path], size: int) -> list[Group]:
    groups: list[Group] = []
    for part in reversed(parts):
        try:
            table: Any = pq.read_table(part, columns=["completion_index", "completion_ids", "prompt_ids", "score"])
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{part} is damaged: {error}") from None
        lengths, prompts = (table[name].combine_chunks().value_lengths().to_pylist() for name in ("completion_ids", "prompt_ids"))
        starts, scores = [row for row, index in enumerate(table["completion_index"].to_pylist()) if index == 0], table["score"].to_pylist()
        whole = [start for start, end in itertools.pairwise([*starts, len(lengths)]) if end - start == size]
        groups[:0] = [(lengths[at : at + size], _tied_without_one(scores[at : at + size]), prompts[at]) for at in whole]
        if len(groups) >= MAX_GROUPS:
            break
    return groups


def _from_journal(journal: Path, size: int) -> list[Group]:
    segments = sorted(int(file.stem.rpartition("-")[2]) for file in journal.glob("segment-*.log"))
    groups: list[Group] = []
    for segment in segments:
        for fate in fates(journal, segment):
            scored = fate.rows.unpacked()
            group = scored.group
            if len(group.rollouts) == size:
                lengths = [len(rollout.completion_ids) for rollout in group.rollouts]
                scores = scored.scores.tolist()
                groups.append((lengths, _tied_without_one(scores), len(group.ticket.prompt.token_ids)))
    return groups
