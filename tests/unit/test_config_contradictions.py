"""Settings that contradict are refused with what was got and a remedy; their neighbours are accepted, some with a warning."""

from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from async_rlhf.config import Config
from async_rlhf.config.algorithms import AlgorithmConfig
from async_rlhf.config.checks import check_config, warnings_of
from async_rlhf.config.load import CONF_FOLDER
from async_rlhf.errors import ConfigError
from tests.support.settings import load, refusal, with_value


def choices(section: Any, key: str) -> tuple[str, ...]:
    """What a setting may be."""
    return get_args(get_type_hints(section)[key])


ALGORITHMS = choices(AlgorithmConfig, "name")
CORRECTIONS = choices(AlgorithmConfig, "correction")
CORRECTED = ("ppo", "rloo", "grpo")
UNCORRECTED = tuple(name for name in ALGORITHMS if name not in CORRECTED)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["completions_per_prompt=1"], ["completions_per_prompt must be >= 2, got 1", "set completions_per_prompt=2"]),
        (["generator.max_inflight=3", "completions_per_prompt=4"], ["generator.max_inflight (3)", "completions_per_prompt (4)"]),
        (
            ["batch_groups=10", "learner.num_ranks=4"],
            ["batch_groups (10) must be divisible by learner.num_ranks (4)", "nearest: batch_groups=8"],
        ),
        (["batch_groups=1", "learner.num_ranks=4"], ["nearest: batch_groups=4"]),
        (["batch_groups=6", "learner.num_ranks=2", "algorithm.minibatches_per_batch=2"], ["(2 x 2)", "nearest: batch_groups=8"]),
        (["learner.precision=bfloat16"], ["learner.zero_stage 1, 2 or 3", "set zero_stage=1"]),
        (["weights.transport=nccl"], ["needs whole GPUs on both sides", "got generator.num_gpus 0", "weights.transport=object_store"]),
        (["weights.transport=nccl", "generator.num_gpus=0.5", "learner.num_gpus=1"], ["cannot share one, got generator.num_gpus 0.5"]),
        (["weights.transport=gloo", "learner.num_gpus=1"], ["gloo is for machines without GPUs", "set weights.transport=nccl"]),
        (["weights.transport=gloo", "generator.engine=transformers"], ["got generator.engine transformers; set it to vllm"]),
        (["weights.transport=gloo", "weights.on_update=drain"], ["got weights.on_update drain; set weights.on_update=keep"]),
        (
            ["weights.transport=gloo", "learner.lora.rank=4", "learner.lora.publish=adapter"],
            ["got learner.lora.publish adapter", "set learner.lora.publish=merged"],
        ),
        (["deterministic=true"], ["needs max_staleness 0 and queue.order ticket", "got max_staleness 1 and queue.order ready"]),
        (["deterministic=true", "max_staleness=0"], ["queue.order ready"]),
        (["run.name=../up"], ["letters, digits", "'../up'"]),
        (["run.name="], ["run.name must be", "''"]),
        (["generator.max_new_tokens=512"], ["max_new_tokens (512)", "max_model_len (512)", "raise max_model_len"]),
        (["queue.lease_s=600"], ["queue.lease_s (600)", "timeouts.generate_s (600)", "raise queue.lease_s"]),
        (["generator.tensor_parallel_size=4", "generator.num_gpus=1"], ["got generator.num_gpus 1", "set generator.num_gpus=4"]),
        (["generator.num_gpus=2"], ["generator.num_gpus (2)", "set both to 2"]),
        (["generator.tensor_parallel_size=2", "generator.engine=transformers"], ["generator.engine vllm, got transformers"]),
        (
            ["weights.on_update=keep_cache", "generator.engine=transformers"],
            ["got generator.engine transformers", "set weights.on_update=keep"],
        ),
        (["model.num_heads=5"], ["model.hidden_size (128) must be a multiple of model.num_heads (5)"]),
    ],
)
def test_settings_that_contradict_are_refused_with_both_values_and_a_remedy(overrides: list[str], words: list[str]) -> None:
    message = refusal(*overrides)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["deterministic=true", "max_staleness=0", "queue.order=ticket"],
        ["learner.precision=bfloat16", "learner.zero_stage=1"],
        ["batch_groups=8", "learner.num_ranks=2", "algorithm.minibatches_per_batch=4"],
        ["updates=1"],
        ["generator.tensor_parallel_size=2", "generator.num_gpus=2"],
        ["generator.tensor_parallel_size=2"],
        ["weights.transport=gloo"],
        ["weights.transport=nccl", "generator.num_gpus=1", "learner.num_gpus=1"],
        ["weights.transport=nccl", "generator.num_gpus=4", "generator.tensor_parallel_size=4", "learner.num_gpus=1"],
        ["generator.num_gpus=0.5"],
        ["weights.on_update=keep_cache"],
        ["model.num_heads=5", "model.path=/some/model"],
        ["algorithm.name=rloo", "algorithm.dpo.loss=ipo"],
        ["algorithm.dpo.loss=sigmoid", "algorithm.dpo.label_smoothing=0.1"],
    ],
)
def test_neighbours_of_a_contradiction_are_accepted(overrides: list[str]) -> None:
    check_config(load(*overrides))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(size=st.integers(1, 300), ranks=st.integers(1, 16), parts=st.integers(1, 8))
def test_nearest_batch_size_that_is_offered_is_accepted(size: int, ranks: int, parts: int) -> None:
    assume(size % (ranks * parts))
    config = with_value(with_value(Config(), "learner.num_ranks", ranks), "algorithm.minibatches_per_batch", parts)
    for _ in range(2):  # first the ranks, then ranks x minibatches
        try:
            check_config(with_value(config, "batch_groups", size))
        except ConfigError as error:
            size = int(str(error).rpartition("nearest: batch_groups=")[2])
    check_config(with_value(config, "batch_groups", size))


# Algorithms.


def test_every_algorithm_either_corrects_or_does_not_and_only_ppo_does_not_compare() -> None:
    assert sorted(ALGORITHMS) == sorted(CORRECTED + UNCORRECTED)
    for name in ALGORITHMS:
        algorithm = load(f"algorithm={name}").algorithm
        assert algorithm.corrects is (name in CORRECTED)
        assert algorithm.compares is (name != "ppo")


def test_every_algorithm_has_a_file_and_every_file_an_algorithm() -> None:
    assert sorted(path.stem for path in (CONF_FOLDER / "algorithm").glob("*.yaml")) == sorted(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_file_of_an_algorithm_chooses_it_with_several_completions_and_no_setting_of_another(name: str) -> None:
    config = load(f"algorithm={name}")
    assert config.algorithm == AlgorithmConfig(name=name)  # type: ignore[arg-type]
    assert config.completions_per_prompt >= 2
    assert with_value(with_value(config, "algorithm", AlgorithmConfig()), "completions_per_prompt", 2) == Config()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dpo", "DPO takes the best and the worst completion of a prompt"),
        ("rloo", "RLOO measures each completion against the mean of its siblings"),
        ("grpo", "GRPO measures each completion against its group's mean and spread"),
        ("bok", "BoK takes the best of the completions of a prompt"),
        ("listwise", "listwise takes the ranking of the completions of a prompt"),
    ],
)
def test_one_completion_per_prompt_is_refused_where_completions_are_compared(name: str, why: str) -> None:
    message = refusal(f"algorithm={name}", "completions_per_prompt=1")
    assert message == f"{why}: completions_per_prompt must be >= 2, got 1; set completions_per_prompt=2"
    check_config(load(f"algorithm={name}", "completions_per_prompt=2"))


def test_ppo_takes_one_completion_per_prompt() -> None:
    config = load("algorithm=ppo", "completions_per_prompt=1")
    assert (config.algorithm.name, config.completions_per_prompt) == ("ppo", 1)


@pytest.mark.parametrize("loss", ["ipo", "hinge"])
def test_label_smoothing_is_refused_where_it_has_no_meaning(loss: str) -> None:
    message = refusal(f"algorithm.dpo.loss={loss}", "algorithm.dpo.label_smoothing=0.1")
    assert message == "algorithm.dpo.label_smoothing belongs to algorithm.dpo.loss sigmoid; set it to 0 or choose sigmoid"
    assert load(f"algorithm.dpo.loss={loss}", "algorithm.dpo.label_smoothing=0").algorithm.dpo.loss == loss


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "ppo"])
@pytest.mark.parametrize("setting", ["path=/some/model", "learning_rate=0.5"])
def test_settings_of_the_critic_are_refused_without_ppo(name: str, setting: str) -> None:
    message = refusal(f"algorithm={name}", f"algorithm.ppo.critic.{setting}")
    for words in (
        "algorithm.ppo.critic belongs to PPO",
        f"algorithm.name is {name}",
        "set algorithm=ppo, or leave the critic's settings out",
    ):
        assert words in message
    check_config(load("algorithm=ppo", f"algorithm.ppo.critic.{setting}"))


# Corrections.


@pytest.mark.parametrize("name", UNCORRECTED)
@pytest.mark.parametrize("setting", [*(f"correction={choice}" for choice in CORRECTIONS if choice != "auto"), "correction_cap=3.0"])
def test_a_correction_is_refused_where_the_loss_has_no_ratios(name: str, setting: str) -> None:
    message = refusal(f"algorithm={name}", f"algorithm.{setting}")
    key, _, value = setting.partition("=")
    for words in (
        f"algorithm.{key} weights the ratios of PPO, RLOO and GRPO",
        f"but {name} has none, got {value}",
        "leave it out, or bound the age of the data by max_staleness",
    ):
        assert words in message


@pytest.mark.parametrize("name", CORRECTED)
@pytest.mark.parametrize("correction", ["none", "behavior", "decoupled"])
def test_a_cap_is_refused_where_nothing_is_capped(name: str, correction: str) -> None:
    message = refusal(f"algorithm={name}", f"algorithm.correction={correction}", "algorithm.correction_cap=3")
    assert message == (f"algorithm.correction_cap belongs to the corrections truncated and masked, got 3 with {correction}; leave it out")


@pytest.mark.parametrize("name", CORRECTED)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_every_correction_is_accepted_where_there_are_ratios_and_a_cap_where_it_caps(name: str, correction: str) -> None:
    cap = ["algorithm.correction_cap=3"] if correction in ("auto", "truncated", "masked") else []
    algorithm = load(f"algorithm={name}", f"algorithm.correction={correction}", *cap).algorithm
    assert (algorithm.correction, algorithm.correction_cap) == (correction, 3.0 if cap else 2.0)


@pytest.mark.parametrize("name", UNCORRECTED)
def test_the_defaults_said_out_loud_are_no_contradiction(name: str) -> None:
    check_config(load(f"algorithm={name}", "algorithm.correction=auto", "algorithm.correction_cap=2"))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_correction_used_is_the_one_chosen_and_by_default_truncated(correction: str) -> None:
    used = load("algorithm=rloo", f"algorithm.correction={correction}").algorithm.correction_used
    assert used == ("truncated" if correction == "auto" else correction)


@pytest.mark.parametrize("name", CORRECTED)
def test_stale_data_without_correction_is_allowed_with_a_warning(name: str) -> None:
    (warning,) = warnings_of(load(f"algorithm={name}", "algorithm.correction=none", "max_staleness=1"))
    for words in ("algorithm.correction none", "stale data", "an ablation", "truncated is the default"):
        assert words in warning


@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_else_is_warned_of(name: str) -> None:
    assert warnings_of(load(f"algorithm={name}", "max_staleness=4")) == []
    if name in CORRECTED:
        assert warnings_of(load(f"algorithm={name}", "algorithm.correction=none", "max_staleness=0")) == []
        for correction in ("behavior", "truncated", "masked", "decoupled"):
            assert warnings_of(load(f"algorithm={name}", f"algorithm.correction={correction}", "max_staleness=4")) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm=dpo", "reward.normalize=true"], "reward.normalize changes nothing for dpo"),
        (["algorithm=bok", "reward.normalize=true"], "reward.normalize changes nothing for bok"),
        (["queue.ties=keep", "queue.max_replacements_per_batch=5"], "queue.max_replacements_per_batch changes nothing"),
        (["algorithm=ppo", "queue.max_replacements_per_batch=5"], "set queue.ties=replace"),
    ],
)
def test_a_setting_without_effect_is_warned_of(overrides: list[str], words: str) -> None:
    (warning,) = warnings_of(load(*overrides))
    assert words in warning


# Scores and ties.


def test_two_scores_for_a_cut_completion_are_refused_with_both() -> None:
    message = refusal("reward.missing_eos_penalty=-1.5", "reward.missing_eos_percentile=10")
    assert message == (
        "reward.missing_eos_penalty (-1.5) and reward.missing_eos_percentile (10) both say what a cut completion scores; "
        "set one of them to null"
    )


def test_a_penalty_of_zero_and_a_percentile_of_zero_are_two_scores_as_well() -> None:
    message = refusal("reward.missing_eos_penalty=0", "reward.missing_eos_percentile=0")
    assert "reward.missing_eos_penalty (0) and reward.missing_eos_percentile (0)" in message


@pytest.mark.parametrize("setting", ["missing_eos_penalty=-1.5", "missing_eos_penalty=0", "missing_eos_percentile=0"])
def test_one_score_for_a_cut_completion_is_accepted_normalised_or_not(setting: str) -> None:
    for normalize in ("true", "false"):
        check_config(load(f"reward.{setting}", f"reward.normalize={normalize}"))


def test_one_of_two_scores_set_to_null_is_accepted() -> None:
    reward = load("reward.missing_eos_penalty=-1", "reward.missing_eos_percentile=10", "reward.missing_eos_penalty=null").reward
    assert (reward.missing_eos_penalty, reward.missing_eos_percentile) == (None, 10.0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ties_are_replaced_by_default_but_kept_by_ppo_which_learns_from_them(name: str) -> None:
    config = load(f"algorithm={name}", "batch_groups=8")
    assert config.queue.ties == "auto"
    assert config.max_replacements_per_batch == (0 if name == "ppo" else 8)
    assert load(f"algorithm={name}", "queue.max_replacements_per_batch=3").max_replacements_per_batch == (0 if name == "ppo" else 3)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_choice_of_what_happens_to_ties_overrules_the_default(name: str) -> None:
    assert load(f"algorithm={name}", "batch_groups=8", "queue.ties=replace").max_replacements_per_batch == 8
    assert load(f"algorithm={name}", "batch_groups=8", "queue.ties=keep").max_replacements_per_batch == 0
    several = "queue.max_replacements_per_batch=3"
    assert load(f"algorithm={name}", "queue.ties=replace", several).max_replacements_per_batch == 3
    assert load(f"algorithm={name}", "queue.ties=keep", several).max_replacements_per_batch == 0


def test_settings_of_adapters_without_a_rank_are_warned_of() -> None:
    (warning,) = warnings_of(load("learner.lora.alpha=32"))
    assert "learner.lora changes nothing while learner.lora.rank is 0" in warning
    assert warnings_of(load("learner.lora.alpha=32", "learner.lora.rank=8")) == []


def test_adapters_published_alone_have_a_largest_rank() -> None:
    assert "takes ranks up to 512" in refusal("learner.lora.rank=513", "learner.lora.publish=adapter")
    assert load("learner.lora.rank=513").learner.lora.rank == 513
