"""Addition, character by character: `12+34=` is to be answered by `46`.

A problem is a number: its digits in base max_operand + 1 are the operands. Two numbers never share a text, so a split of
the numbers is a split of the texts. `12+34=` and `34+12=` are two problems.
"""

import random
from collections.abc import Sequence

from async_rlhf.config.tasks import TaskConfig
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.tasks.base import Problem, Vocabulary

CHARACTERS = "0123456789+-*/=()., "
VOCABULARY = Vocabulary(tokens=tuple(CHARACTERS))
SLIPS = (-10, -1, 1, 10)
"""How far a careless answer is off."""


class ArithmeticTask:
    """Sums of `num_operands` numbers from 0 to `max_operand`."""

    reward = "async_rlhf.tasks.arithmetic:score"
    vocabulary = VOCABULARY

    def __init__(self, config: TaskConfig) -> None:
        """Draw the split: first the held-out problems, so that `num_train` does not change them.

        Raises:
            ConfigError: the held-out set takes all problems that exist.
        """
        space = (config.max_operand + 1) ** config.num_operands
        if config.held_out >= space:
            raise ConfigError(
                f"task.held_out must leave at least one problem to train on, got {config.held_out} of the {space} problems with "
                f"{config.num_operands} operands up to {config.max_operand}; lower task.held_out below {space} or raise task.max_operand"
            )
        self._config = config
        num_train = min(config.num_train, space - config.held_out)
        drawn = _draw_distinct(space, config.held_out + num_train, seed=config.seed)
        self._held_out = tuple(self._make(f"held-out-{i}", number) for i, number in enumerate(drawn[: config.held_out]))
        self._train = drawn[config.held_out :]

    @property
    def num_problems(self) -> int:
        """Number of training problems: task.num_train, or all that are not held out if those are fewer."""
        return len(self._train)

    @property
    def max_answer_tokens(self) -> int:
        """Digits of the largest possible sum: a token each."""
        return len(str(self._config.num_operands * self._config.max_operand))

    def problem(self, index: int) -> Problem:
        """Training problem `index`, 0 <= index < num_problems."""
        if not 0 <= index < len(self._train):
            raise IndexError(f"problem index must be in 0..{len(self._train) - 1}, got {index}; num_problems says how many there are")
        return self._make(f"train-{index}", self._train[index])

    def held_out(self) -> Sequence[Problem]:
        """The evaluation problems, always in the same order."""
        return self._held_out

    def careless_answer(self, problem: Problem, rng: random.Random) -> str:
        """The sum, one or ten off: slips of counting and of carrying, spread so that the right answer stays the likeliest one."""
        total = int(str(problem.columns["answer"]))
        return str(rng.choice([total + slip for slip in SLIPS if total + slip >= 0]))

    def _make(self, prompt_id: str, number: int) -> Problem:
        """The problem whose operands are the digits of `number`, most significant first."""
        operands: list[int] = []
        for _ in range(self._config.num_operands):
            number, digit = divmod(number, self._config.max_operand + 1)
            operands.append(digit)
        text = "+".join(str(operand) for operand in reversed(operands)) + "="
        return Problem(prompt_id=prompt_id, text=text, columns={"answer": str(sum(operands))})


def score(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **columns: Sequence[str]) -> list[float]:
    """1.0 for a completion that is the answer, character for character, else 0.0.

    Args:
        prompts: one text per completion; not needed for the judgement.
        completions: decoded completions, special tokens removed.
        answer: the right answer of each completion.
        columns: further columns of the problems; not needed.
    Returns:
        One reward per completion.
    Raises:
        RewardError: the three lists differ in length.
    """
    del columns
    if not len(prompts) == len(completions) == len(answer):
        raise RewardError(
            f"prompts, completions and answer must have one length, got {len(prompts)}, {len(completions)} and {len(answer)}; "
            "repeat prompt and answer for every completion of a group"
        )
    return [1.0 if completion == right else 0.0 for completion, right in zip(completions, answer, strict=True)]


def _draw_distinct(space: int, count: int, *, seed: int) -> list[int]:
    """The first `count` numbers of a random order of range(space).

    A Fisher-Yates shuffle that stores only what it moved: O(count) for a space of any size, and a longer draw starts
    with the shorter one. (random.sample refuses ranges longer than a machine word.)
    """
    rng = random.Random(seed)
    moved: dict[int, int] = {}
    drawn: list[int] = []
    for position in range(count):
        chosen = rng.randrange(position, space)
        drawn.append(moved.get(chosen, chosen))
        moved[chosen] = moved.get(position, position)
    return drawn
