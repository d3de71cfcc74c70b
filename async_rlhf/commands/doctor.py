"""`async-rlhf doctor`: whether this machine, and the cluster that it is told of, can hold a run."""

from pathlib import Path

from rich.console import Console

from async_rlhf.checkup import Verdict, check_up
from async_rlhf.commands.say import say

MARKS = {Verdict.GOOD: "ok  ", Verdict.DOUBTFUL: "??  ", Verdict.BAD: "BAD "}
STYLES = {Verdict.GOOD: None, Verdict.DOUBTFUL: "yellow", Verdict.BAD: "bold red"}


def run_doctor(runs: Path, console: Console) -> int:
    """Print one line per check as it is done, with a remedy below what is wrong.

    Args:
        runs: where run folders will be.
    Returns:
        The process's exit code: 1 where no run would start.
    """
    verdicts: list[Verdict] = []
    for check in check_up(runs):
        say(console, f"{MARKS[check.verdict]}{check.name:<16}{check.found}", style=STYLES[check.verdict])
        if check.verdict is not Verdict.GOOD:
            say(console, f"{'':<20}{check.remedy}")
        verdicts.append(check.verdict)
    bad, doubtful = verdicts.count(Verdict.BAD), verdicts.count(Verdict.DOUBTFUL)
    if bad:
        say(console, f"{bad} of {len(verdicts)} checks failed: no run will start", style=STYLES[Verdict.BAD])
    elif doubtful:
        say(console, f"fit for a run, with {doubtful} doubts")
    else:
        say(console, "fit for a run: async-rlhf train conf/quickstart.yaml")
    return 1 if bad else 0
