"""The tables of `async-rlhf eval`."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from async_rlhf.commands.say import say
from async_rlhf.evaluation import Evaluation, Findings
from async_rlhf.opponents import REFERENCES, Opponent

MAX_PRINTED = 300
"""Characters of one text in the table of samples."""


def print_findings(console: Console, findings: Findings, numbers: Mapping[str, float], opponent: Opponent | None, num_samples: int) -> None:
    """Numbers with their intervals, and the first greedy completions."""
    table = Table(title="held-out prompts")
    for heading in ("sampling", "score", "95 %", "tokens", "cut", "KL, nats"):
        table.add_column(heading, justify="left" if heading == "sampling" else "right")
    for name, prefix, part in (("greedy", "", findings.greedy), ("sampled", "sampled_", findings.sampled)):
        if part is not None:
            key = f"evaluate/{prefix}score"
            table.add_row(
                name if not part.temperature else f"temperature {part.temperature:g}",
                f"{numbers[key]:.3f}",
                f"{numbers[f'{key}_low']:.3f} to {numbers[f'{key}_high']:.3f}",
                f"{numbers[f'evaluate/{prefix}length_tokens']:.1f}",
                f"{numbers[f'evaluate/{prefix}cut_share']:.1%}",
                _divergence(numbers) if part.temperature else "",
            )
    console.print(table)
    if "evaluate/reward" in numbers:
        say(console, f"reward (greedy): {_with_interval(numbers, 'reward')}")
    if "evaluate/score_change" in numbers:
        say(
            console,
            f"change since the start (greedy): {_with_interval(numbers, 'score_change')}, p {numbers['evaluate/score_change_p']:.2g}",
        )
    if "evaluate/winrate" in numbers:
        ties = f"{numbers['evaluate/winrate_ties']:.0f} ties"
        won = _with_interval(numbers, "winrate")
        say(console, f"win-rate against {findings.opponent}: {won}, {ties}, p {numbers['evaluate/winrate_p']:.2g}")
    if findings.problem:
        say(console, f"no win-rate: {findings.problem}", style="bold red")
    if num_samples:
        console.print(_samples_table(findings.greedy, opponent, num_samples))


def _samples_table(greedy: Evaluation, opponent: Opponent | None, num: int) -> Table:
    table = Table(title="greedy completions", show_lines=True)
    beside = opponent is not None and opponent.name != REFERENCES
    for heading in ("prompt", "reference", "completion", "score", *(["opponent", "outcome"] if beside else [])):
        table.add_column(heading, overflow="fold")
    for index, sample in enumerate(greedy.samples[:num]):
        cells = [sample.prompt, sample.expected, sample.completion, f"{sample.score:.3g}"]
        if beside and opponent is not None:
            cells += [opponent.completions[index] or "", "" if sample.outcome is None else f"{sample.outcome:g}"]
        table.add_row(*(Text(cell if len(cell) <= MAX_PRINTED else f"{cell[:MAX_PRINTED]} ...") for cell in cells))
    return table


def _with_interval(numbers: Mapping[str, float], name: str) -> str:
    value, low, high = (numbers[f"evaluate/{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.3f} (95 % {low:.3f} to {high:.3f})"


def _divergence(numbers: Mapping[str, float]) -> str:
    if "evaluate/kl_nats" not in numbers:
        return ""
    error = numbers.get("evaluate/kl_error_nats")
    return f"{numbers['evaluate/kl_nats']:.3f}" + ("" if error is None else f" +- {error:.3f}")
