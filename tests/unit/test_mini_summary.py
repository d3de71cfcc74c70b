"""The task mini_summary: its prompts, its author, its pairs and its reward function."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_rlhf.config.schema import Config, ModelConfig
from async_rlhf.config.stages import SFTConfig
from async_rlhf.config.tasks import MiniSummaryConfig, TaskConfig
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.sft import SFTProgress, start_folder, train_start
from async_rlhf.tasks import ExactTask, PreferenceTask, Problem, load_task
from async_rlhf.tasks.mini_summary import MiniSummaryTask, score
from async_rlhf.tasks.summaries import gold, judge, read_prompt

CONFIG = TaskConfig(name="mini_summary", num_train=1500, held_out=200)


def _task(config: TaskConfig = CONFIG) -> MiniSummaryTask:
    task = load_task(config)
    assert isinstance(task, MiniSummaryTask)
    return task


def _with(**settings: float) -> TaskConfig:
    return replace(CONFIG, mini_summary=replace(CONFIG.mini_summary, **settings))


def _problems(task: MiniSummaryTask) -> list[Problem]:
    return [task.problem(index) for index in range(task.num_problems)]


def test_every_prompt_lists_six_to_ten_facts_and_three_rumours_each_of_its_own_letter():
    lists = [read_prompt(problem.text) for problem in _problems(_task())]

    for facts in lists:
        assert len({fact.statement[0] for fact in facts}) == len(facts)
        assert sum(not fact.salience for fact in facts) == 3
    assert {len(facts) - 3 for facts in lists} == {6, 7, 8, 9, 10}
    assert {fact.salience for facts in lists for fact in facts} == set(range(10))
    assert {int(not facts[0].salience) for facts in lists} == {0, 1}, "rumours stand anywhere"


def test_no_text_is_both_trained_and_held_out_even_where_few_texts_exist():
    """One fact and no rumour: 2 letters x 2 digits x 9 saliences = 36 texts."""
    few = MiniSummaryConfig(min_facts=1, max_facts=1, num_rumours=0, num_keys=2, num_values=2)
    task = _task(TaskConfig(name="mini_summary", num_train=500, held_out=100, mini_summary=few))

    train, held_out = ({problem.text for problem in part} for part in (_problems(task), task.held_out()))

    assert train and held_out
    assert not train & held_out
    assert len(train | held_out) == 36


def test_settings_that_allow_too_few_prompts_are_refused_and_do_not_hang():
    """One letter, one salience: `1:a0 >` and `1:a1 >`, which belong both to the training set."""
    few = MiniSummaryConfig(min_facts=1, max_facts=1, num_rumours=0, num_keys=1, num_values=2, max_salience=1)
    task = _task(TaskConfig(name="mini_summary", mini_summary=few))

    assert {problem.text for problem in (task.problem(index) for index in range(20))} == {"1:a0 >", "1:a1 >"}
    with pytest.raises(ConfigError, match="got none for the held-out set in 1000 draws"):
        task.held_out()


def test_same_config_gives_the_same_problems_and_pairs_and_another_seed_gives_others():
    assert _problems(_task()) == _problems(_task())
    assert list(_task().held_out()) == list(_task().held_out())
    assert list(_task().preferences(20)) == list(_task().preferences(20))
    assert _task().problem(0) != _task(replace(CONFIG, seed=1)).problem(0)


def test_num_train_does_not_change_the_problems():
    assert _task(replace(CONFIG, num_train=10)).problem(9) == _task().problem(9)


@pytest.mark.parametrize("index", [-1, 1500])
def test_problem_index_outside_the_training_problems_is_refused(index: int):
    with pytest.raises(IndexError, match=rf"0\.\.1499, got {index}"):
        _task().problem(index)


def test_author_states_facts_by_salience_in_the_prompts_order_with_copy_errors_and_rumours():
    """Salience s is stated with probability s / 10: 0.9 and 0.1 at the ends; 1500 prompts give about 1300 facts of each salience."""
    stated: dict[int, list[bool]] = {salience: [] for salience in range(10)}
    wrong: list[bool] = []
    for problem in _problems(_task()):
        facts, answer = read_prompt(problem.text), str(problem.columns["answer"]).split()
        letters = [word[0] for word in answer]
        assert letters == [fact.statement[0] for fact in facts if fact.statement[0] in letters]
        for fact in facts:
            stated[fact.salience].append(fact.statement[0] in letters)
        wrong += [word not in {fact.statement for fact in facts} for word in answer]
    shares = {salience: statistics.mean(each) for salience, each in stated.items()}

    assert shares[0] == pytest.approx(0.1, abs=0.02)
    assert all(shares[salience] == pytest.approx(salience / 10, abs=0.05) for salience in range(1, 10))
    assert statistics.mean(wrong) == pytest.approx(0.05, abs=0.015)


def test_author_always_states_something():
    """Two facts of salience 5 on average: both would be left out in a quarter of the prompts."""
    task = _task(_with(min_facts=2, max_facts=2, max_salience=9, num_rumours=0))

    assert all(problem.columns["answer"] for problem in _problems(task))


def test_author_is_mediocre_and_a_careful_one_better():
    def mean_gold(config: TaskConfig) -> float:
        problems = _problems(_task(config))
        return statistics.mean(
            score([p.text for p in problems], [str(p.columns["answer"]) for p in problems], max_statements=[5] * len(problems))
        )

    assert 0.5 < mean_gold(CONFIG) < 0.65
    assert mean_gold(_with(copy_error=0.0, rumour_share=0.0)) > mean_gold(CONFIG) + 0.1


def test_the_longest_summary_states_every_fact_and_every_rumour():
    task = _task(_with(rumour_share=1.0, min_facts=10, max_salience=9))

    assert task.max_answer_tokens == 13
    assert max(len(str(problem.columns["answer"]).split()) for problem in _problems(task)) <= 13


def test_chosen_is_worth_more_than_rejected_by_the_margin():
    pairs = list(_task().preferences(300))

    for pair in pairs:
        worths = [gold(read_prompt(pair.problem.text), draft, max_statements=5) for draft in (pair.chosen, pair.rejected)]
        assert pair.margin == pytest.approx(worths[0] - worths[1])
        assert pair.margin > 0
    held_out = {problem.text for problem in _task().held_out()}
    assert not held_out & {pair.problem.text for pair in pairs}
    assert list(_task().preferences(100)) == pairs[:100]


def test_pairs_are_won_neither_by_length_nor_by_order_alone():
    """A proxy that only counts statements must be far from the gold; that of drafts with a mistake each must not be free to tell."""
    pairs = list(_task().preferences(1000))
    longer = statistics.mean(len(pair.chosen) > len(pair.rejected) for pair in pairs)
    mistaken = [
        [
            judge({f.statement: f.salience for f in read_prompt(p.problem.text) if f.salience}, d, max_statements=5).hallucinations
            for d in drafts
        ]
        for p in pairs
        for drafts in [(p.chosen, p.rejected)]
    ]

    assert 0.3 < longer < 0.7
    assert statistics.mean(chosen < rejected for chosen, rejected in mistaken) > 0.4


def test_score_reads_the_facts_from_the_prompt_and_the_limit_from_its_column():
    prompts = ["9:b2 ?:c0 5:k3 1:d1 >"] * 3

    assert score(prompts, ["b2 k3", "b2 k3", "c0"], max_statements=[2, 3, 2], answer=["", "", ""]) == pytest.approx([1.0, 14 / 15, -5 / 14])


def test_score_refuses_lists_of_different_length_and_prompts_without_a_fact():
    with pytest.raises(RewardError, match="got 1, 2 and 1"):
        score(["9:b2 >"], ["b2", ""], max_statements=[5])
    with pytest.raises(RewardError, match=r"at least one fact, got '12\+34='"):
        score(["12+34="], ["b2"], max_statements=[5])


def test_reward_path_names_the_score_function_and_every_column_reaches_it():
    problem = _task().problem(0)

    assert _task().reward == f"{score.__module__}:{score.__name__}"
    columns = {name: [value] for name, value in problem.columns.items()}
    assert score([problem.text], [str(problem.columns["answer"])], **columns)[0] <= 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_facts": 11}, r"min_facts must be at most max_facts \(10\), got 11"),
        ({"num_keys": 12}, r"num_keys must name every fact and rumour of a prompt \(10 \+ 3\), got 12"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        load_task(_with(**settings))


def test_arithmetic_is_exact_and_mini_summary_has_preferences():
    assert isinstance(load_task(TaskConfig()), ExactTask) and not isinstance(load_task(TaskConfig()), PreferenceTask)
    assert isinstance(_task(), PreferenceTask) and not isinstance(_task(), ExactTask)


@pytest.mark.slow
def test_the_supervised_start_takes_all_its_steps_whatever_its_gold(tmp_path: Path):
    """A target accuracy below any gold would stop arithmetic at the first look; and a start worth nothing is no failure here."""
    config = Config(
        task=TaskConfig(name="mini_summary", num_train=50, held_out=20),
        model=ModelConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64),
        sft=SFTConfig(target_accuracy=1e-9, max_steps=6, batch_size=8, eval_every=2),
    )
    seen: list[SFTProgress] = []

    result = train_start(config, tmp_path / "start", seen.append)

    assert result.steps == 6
    assert [progress.step for progress in seen if progress.looked] == [2, 4, 6]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "start"), AutoTokenizer.from_pretrained(tmp_path / "start")
    problems = load_task(config.task).held_out()
    golds: list[float] = []
    for problem in problems:
        asked = tokenizer(problem.text, return_tensors="pt")
        written = model.generate(**asked, do_sample=False, max_new_tokens=14)[0, asked["input_ids"].shape[1] :]
        golds.append(gold(read_prompt(problem.text), tokenizer.decode(written, skip_special_tokens=True), max_statements=5))
    assert result.accuracy == pytest.approx(statistics.mean(golds), abs=1e-5)


def test_another_task_s_settings_leave_the_cached_start_as_it_is():
    config = Config(task=CONFIG)

    assert start_folder(replace(config, task=_with(copy_error=0.5))) != start_folder(config)
    arithmetic = replace(config, task=TaskConfig())
    other = replace(arithmetic.task, mini_summary=MiniSummaryConfig(copy_error=0.5))
    assert start_folder(replace(arithmetic, task=other)) == start_folder(arithmetic)
