"""A run keeps its contract whatever is killed or frozen under it; the long version is benchmarks/chaos.py."""

import math
import random
from pathlib import Path

import pytest

from tests.support import chaos
from tests.support.chaos import Fault, disturb

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FAULTS = tuple(fault for fault in chaos.FAULTS if fault.kind == "kill" or fault.target in ("generator", "learner", "scorer"))
ENDLESS = 100_000
"""Updates that no machine trains before the last fault."""
NOTICED_S = {"kill": 15.0, "freeze": 30.0}
"""Far above supervision.ping_s and silence_s: the machine may be busy."""


def test_run_with_every_part_killed_and_three_frozen_loses_nothing_and_trains_nothing_twice(tmp_path: Path) -> None:
    faults: list[Fault] = list(FAULTS)
    random.Random(0).shuffle(faults)

    result = disturb(tmp_path / "run", faults, 0, f"updates={ENDLESS}", more=10)

    assert result.problems == []
    assert len(result.faults) == len(faults)
    assert (result.lost, result.duplicated, result.bound_violations) == (0, 0, 0)
    assert (result.hangs, result.orphans) == (0, 0)
    for fault in result.faults:
        assert fault.detected_s is None or fault.detected_s < NOTICED_S[fault.kind], fault
        assert (fault.detected_s is None) == (fault.target == "driver"), fault
    ((start, final),) = result.accuracies
    noise = math.sqrt(2 * start * (1 - start) / 50)  # of two measurements on 50 problems
    assert final > start - 3 * noise, "faults must not undo what was learned"
