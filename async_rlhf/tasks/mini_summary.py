"""Summaries of listed facts, graded by a program; a proxy that learned from pairs stands between the grade and the policy.

A prompt lists facts and rumours (see `summaries`); its author, whose summaries the supervised stage learns, states a fact the likelier
the more salient it is, and makes mistakes.
"""

import random
import string
import zlib
from collections.abc import Iterator, Sequence

from async_rlhf.config.tasks import TaskConfig
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.tasks.base import Preference, Problem, Vocabulary
from async_rlhf.tasks.summaries import Fact, gold, read_prompt, vocabulary, write_prompt
from async_rlhf.types import JsonValue

HELD_OUT_SHARE = 8
"""Every eighth text, by its checksum, is kept for the held-out set: no text is in both."""
NUM_DRAFTS = 4
"""From which a pair is taken: more make it clearer, and a proxy learns more from it."""
MAX_DRAWS = 1000
"""Texts drawn for one problem before it is clear that all of them belong to the other set: (7/8)^1000 = 1e-58."""


class MiniSummaryTask:
    """Prompts that list `min_facts` to `max_facts` facts among `num_rumours` rumours."""

    reward = "async_rlhf.tasks.mini_summary:score"

    def __init__(self, config: TaskConfig) -> None:
        """
        Raises:
            ConfigError: the settings contradict.
        """
        self._config, self._of = config, config.mini_summary
        if self._of.min_facts > self._of.max_facts:
            raise ConfigError(
                f"task.mini_summary.min_facts must be at most max_facts ({self._of.max_facts}), got {self._of.min_facts}; raise max_facts"
            )
        if self._of.max_facts + self._of.num_rumours > self._of.num_keys:
            raise ConfigError(
                f"task.mini_summary.num_keys must name every fact and rumour of a prompt ({self._of.max_facts} + {self._of.num_rumours}), "
                f"got {self._of.num_keys}; raise num_keys, at most to 26, or lower max_facts or num_rumours"
            )

    @property
    def num_problems(self) -> int:
        """task.num_train."""
        return self._config.num_train

    @property
    def vocabulary(self) -> Vocabulary:
        """A token for each statement that a prompt or a summary may make."""
        return vocabulary(self._of.num_keys, self._of.num_values)

    @property
    def max_answer_tokens(self) -> int:
        """Statements of the longest summary that the author can write: every fact and every rumour."""
        return self._of.max_facts + self._of.num_rumours

    def problem(self, index: int) -> Problem:
        """Training problem `index`, 0 <= index < num_problems."""
        if not 0 <= index < self.num_problems:
            raise IndexError(f"problem index must be in 0..{self.num_problems - 1}, got {index}; num_problems says how many there are")
        return self._make("train", index)

    def held_out(self) -> Sequence[Problem]:
        """The evaluation problems, always in the same order."""
        return [self._make("held-out", index) for index in range(self._config.held_out)]

    def preferences(self, count: int) -> Iterator[Preference]:
        """The best and the worst of four drafts of the author on one training problem; drafts of equal gold are passed over."""
        for index in range(count):
            rng = random.Random(f"mini_summary {self._config.seed} preference {index}")
            while True:
                problem = self.problem(rng.randrange(self.num_problems))
                facts = read_prompt(problem.text)
                drafts = [self._draft(facts, rng) for _ in range(NUM_DRAFTS)]
                golds = [gold(facts, draft, max_statements=self._of.max_statements) for draft in drafts]
                best, worst = max(golds), min(golds)
                if best > worst:
                    break
            chosen, rejected = drafts[golds.index(best)], drafts[golds.index(worst)]
            yield Preference(problem=problem, chosen=chosen, rejected=rejected, margin=best - worst)

    def _make(self, part: str, index: int) -> Problem:
        rng = random.Random(f"mini_summary {self._config.seed} {part} {index}")
        for _ in range(MAX_DRAWS):
            facts = self._draw_facts(rng)
            text = write_prompt(facts)
            if (zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0) == (part == "held-out"):
                columns: dict[str, JsonValue] = {"answer": self._draft(facts, rng), "max_statements": self._of.max_statements}
                return Problem(prompt_id=f"{part}-{index}", text=text, columns=columns)
        raise ConfigError(
            f"task.mini_summary must allow more different prompts, got none for the {part} set in {MAX_DRAWS} draws; "
            "raise max_facts, num_keys or num_values"
        )

    def _draw_facts(self, rng: random.Random) -> list[Fact]:
        num_facts = rng.randint(self._of.min_facts, self._of.max_facts)
        letters = rng.sample(string.ascii_lowercase[: self._of.num_keys], num_facts + self._of.num_rumours)
        facts = [
            Fact(
                salience=rng.randint(1, self._of.max_salience) if place < num_facts else 0,
                statement=letter + str(rng.randrange(self._of.num_values)),
            )
            for place, letter in enumerate(letters)
        ]
        rng.shuffle(facts)
        return facts

    def _draft(self, facts: Sequence[Fact], rng: random.Random) -> str:
        """What the author makes of them, in the prompt's order; at least the most salient fact."""
        statements: list[str] = []
        for fact in facts:
            share = fact.salience / (self._of.max_salience + 1) if fact.salience else self._of.rumour_share
            if rng.random() < share:
                wrong = rng.random() < self._of.copy_error
                statements.append(_misread(fact.statement, self._of.num_values, rng) if wrong else fact.statement)
        return " ".join(statements) or max(facts, key=lambda fact: fact.salience).statement


def score(prompts: Sequence[str], completions: Sequence[str], *, max_statements: Sequence[int], **columns: Sequence[object]) -> list[float]:
    """The gold reward: see `summaries.gold`.

    Args:
        prompts: one text per completion.
        completions: decoded completions, special tokens removed.
        max_statements: how many statements each may make.
        columns: further columns of the problems; not needed.
    Returns:
        One reward per completion, at most 1.
    Raises:
        RewardError: the three lists differ in length, or a prompt lists no fact.
    """
    del columns
    if not len(prompts) == len(completions) == len(max_statements):
        raise RewardError(
            f"prompts, completions and max_statements must have one length, got {len(prompts)}, {len(completions)} and "
            f"{len(max_statements)}; repeat prompt and max_statements for every completion of a group"
        )
    facts = [read_prompt(prompt) for prompt in prompts]
    for prompt, listed in zip(prompts, facts, strict=True):
        if not any(fact.salience for fact in listed):
            raise RewardError(f"a prompt of mini_summary lists at least one fact, got {prompt!r}; score this task's own prompts with it")
    return [
        gold(listed, completion, max_statements=limit) for listed, completion, limit in zip(facts, completions, max_statements, strict=True)
    ]


def _misread(statement: str, num_values: int, rng: random.Random) -> str:
    """The same letter with another digit."""
    shift = rng.randrange(1, num_values)
    return statement[0] + str((int(statement[1]) + shift) % num_values)
