"""benchmarks/peers.py: what is a case, a rate and a time to an accuracy, and what the other side's output says. No TRL."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from async_rlhf.tasks.arithmetic import score as arithmetic_score
from benchmarks.peers_trl import exact, score

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def peers() -> Iterator[ModuleType]:
    """The script as it is run: the benchmarks' folder comes first in the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("peers")


def rows(*times_s: float) -> list[dict[str, float]]:
    return [{"time_s": time_s} for time_s in times_s]


def test_a_rate_counts_whole_updates_between_the_first_and_the_last_ones(peers: ModuleType) -> None:
    # Kept: the ends of updates 2, 3 and 4, so two updates of 10 completions in 4 s.
    assert peers.rate(rows(9.0, 10.0, 11.0, 14.0, 14.1), 10, first=2, last=1) == pytest.approx(5.0)
    with pytest.raises(ValueError, match="two updates after the first 2"):
        peers.rate(rows(9.0, 10.0, 11.0, 14.0), 10, first=2, last=1)


def test_the_time_to_an_accuracy_is_that_of_the_first_look_that_has_it(peers: ModuleType) -> None:
    times_s, looks = {0: 0.0, 10: 7.0, 20: 13.0, 30: 20.0}, [(0, 0.4), (10, 0.7), (20, 0.75), (30, 0.9)]
    assert peers.time_to(0.75, times_s, looks) == 13.0
    with pytest.raises(ValueError, match="highest of 4 looks"):
        peers.time_to(0.95, times_s, looks)


def test_the_goals_are_the_long_tailed_cases_at_ten_million(peers: ModuleType) -> None:
    metrics = {peers.Case.of(f"{name}:10m:long").metric for name in peers.ALGORITHMS}
    assert metrics == {goal.metric for goal in peers.GOALS}
    assert peers.Case.of("dpo:1m:fixed").metric == "speedup_online_dpo_1m_fixed"
    assert peers.Case.of("rloo:accuracy").metric == "time_to_accuracy_speedup_rloo"


@pytest.mark.parametrize("text", ["ppo:10m:long", "rloo:3m:long", "rloo:10m", "dpo:accuracy", ""])
def test_an_unknown_case_is_refused_with_what_is_known(peers: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="rloo, grpo, dpo; 1m, 10m, 50m; long, fixed"):
        peers.Case.of(text)


def test_only_lines_that_are_json_are_read_from_the_other_side(peers: ModuleType) -> None:
    output = "Loading weights: 100%\n{\"update\": 1, \"time_s\": 0.5}\n{'train_runtime': '0.5'}\n"
    assert importlib.import_module("peers_runs").json_lines(output) == [{"update": 1, "time_s": 0.5}]


def test_every_setting_tried_for_trl_makes_whole_passes_of_whole_groups(peers: ModuleType) -> None:
    for changed in peers.TUNED.values():
        setting = {**peers.BEST, **changed}
        passes, rest = divmod(peers.COMPLETIONS // setting["processes"], setting["microbatch"])
        assert rest == 0 and passes % setting["steps_per_generation"] == 0
        assert setting["microbatch"] * setting["steps_per_generation"] % 4 == 0


def test_the_models_head_ends_any_text_with_the_wanted_probability(peers: ModuleType, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(peers.make_model(tmp_path, "1m", "long"))
    texts = torch.randint(3, model.config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        probabilities = model(input_ids=texts).logits.softmax(-1)[..., model.config.eos_token_id]
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 1 / 32), rtol=0.02, atol=0.0)


def test_rewards_of_the_two_sides_are_one_function() -> None:
    assert score(["p"], ["w1 w2"]) == score(["q"], ["w1 w2"]) != score(["p"], ["w2 w1"])
    asked, said, answers = ["1+1=", "1+2=", "1+3="], ["2", "2", "4 "], ["2", "3", "4"]
    assert exact(asked, said, answer=answers) == arithmetic_score(asked, said, answer=answers)
