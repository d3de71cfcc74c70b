"""The doctor's checks: what is fit, what is not, and what to do then."""

import io
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from async_rlhf import checkup
from async_rlhf.checkup import Check, Verdict
from async_rlhf.commands import doctor


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (checkup.check_python((3, 11)), Verdict.GOOD),
        (checkup.check_python((3, 14)), Verdict.BAD),
        (checkup.check_memory(24.0, 2), Verdict.GOOD),
        (checkup.check_memory(4.0, 2), Verdict.DOUBTFUL),
        (checkup.check_memory(24.0, 1), Verdict.DOUBTFUL),
        (checkup.check_open_files(1024), Verdict.DOUBTFUL),
        (checkup.check_open_files(65536), Verdict.GOOD),
        (checkup.check_open_files(-1), Verdict.GOOD),
        (checkup.check_shared_memory(Path("/nowhere")), Verdict.DOUBTFUL),
        (checkup.check_host("no-such-host.invalid"), Verdict.DOUBTFUL),
        (checkup.check_disk(Path("/proc/self/runs")), Verdict.BAD),
    ],
    ids=lambda value: value.found if isinstance(value, Check) else str(value),
)
def test_each_check_tells_fit_from_unfit(check: Check, verdict: Verdict) -> None:
    assert check.verdict is verdict
    assert check.found and (check.remedy or verdict is Verdict.GOOD)


def test_requirements_of_what_is_installed_are_met_and_others_named() -> None:
    numpy = version("numpy")
    assert [check.verdict for check in checkup.check_packages([f"numpy=={numpy}", "numpy>=1"])] == [Verdict.GOOD]
    assert [check.verdict for check in checkup.check_packages(["numpy>=1", "no-such-thing==1; extra == 'gpu'"])] == [Verdict.GOOD]
    assert [check.verdict for check in checkup.check_packages([])] == [Verdict.DOUBTFUL]
    wrong = list(checkup.check_packages(["numpy==0.1", "no-such-thing>=2", "ruff<0.0.1; extra == 'dev'"]))
    verdicts = {"numpy": Verdict.BAD, "no-such-thing": Verdict.BAD, "ruff": Verdict.DOUBTFUL}  # a run needs no extra
    assert {check.name: check.verdict for check in wrong} == verdicts
    assert wrong[0].found == f"{numpy}, asked: numpy==0.1" and wrong[1].found == "not installed, asked: no-such-thing>=2"


@pytest.mark.parametrize(
    ("code", "verdict", "found"),
    [
        ("print('noise'); print('1.0, two GPUs')", Verdict.GOOD, "1.0, two GPUs"),
        (
            "raise ImportError('operator torchvision::nms does not exist')",
            Verdict.BAD,
            "ImportError: operator torchvision::nms does not exist",
        ),
        ("import os; os._exit(11)", Verdict.BAD, "exit code 11"),
        ("import time; time.sleep(60)", Verdict.BAD, "took more than 1 s"),
    ],
    ids=["works", "raises", "crashes", "hangs"],
)
def test_what_breaks_or_hangs_breaks_the_check_and_not_the_doctor(
    code: str, verdict: Verdict, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checkup.WORKING, "torch", code)
    monkeypatch.setattr(checkup, "WORKING_S", 1.0 if "sleep" in code else 60.0)
    check = checkup.check_working("torch")
    assert (check.verdict, check.found) == (verdict, found)


@pytest.mark.parametrize(
    ("verdicts", "code", "last"),
    [
        ((Verdict.GOOD,), 0, "fit for a run: async-rlhf train"),
        ((Verdict.GOOD, Verdict.DOUBTFUL), 0, "fit for a run, with 1 doubt"),
        ((Verdict.BAD, Verdict.DOUBTFUL), 1, "1 of 2 checks failed"),
    ],
    ids=["fit", "doubtful", "unfit"],
)
def test_doctor_prints_remedies_and_ends_with_a_verdict(
    verdicts: tuple[Verdict, ...], code: int, last: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def checks(runs: Path) -> Iterator[Check]:
        assert runs == tmp_path
        yield from (Check(f"part {number}", verdict, "found this", "do that") for number, verdict in enumerate(verdicts))

    monkeypatch.setattr(doctor, "check_up", checks)
    shown = io.StringIO()
    assert doctor.run_doctor(tmp_path, Console(file=shown)) == code
    lines = shown.getvalue().splitlines()
    assert lines[-1].startswith(last)
    assert len(re.findall("do that", shown.getvalue())) == sum(verdict is not Verdict.GOOD for verdict in verdicts)
