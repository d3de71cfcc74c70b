"""Every setting has a default, a range and a helpful refusal; sources merge from left to right and are remembered."""

import dataclasses
import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from async_rlhf.config import Config, load_config, to_yaml
from async_rlhf.config.checks import check_config
from async_rlhf.config.fields import NAME, named_section
from async_rlhf.config.load import CONF_FOLDER, known_keys, split_arguments
from async_rlhf.errors import ConfigError
from tests.support.settings import load, refusal, with_value

OPTIONAL = float | None
NUMBERS = (int, float, OPTIONAL)


def leaves(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting of the schema, by its declared type."""
    for item in dataclasses.fields(section):
        named = named_section(item.type)
        if named or dataclasses.is_dataclass(item.type):
            yield from leaves(named or item.type, f"{prefix}{item.name}.{NAME}." if named else f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


FIELDS = dict(leaves())
NUMERIC = {key: item for key, item in FIELDS.items() if item.type in NUMBERS}
SECTIONS = {key.rsplit(".", depth)[0] for key in FIELDS for depth in range(1, key.count(".") + 1)}
LIMITS = [(key, name, limit) for key, item in NUMERIC.items() for name, limit in item.metadata.items()]


def refused_range(key: str, value: float) -> bool:
    """The value is refused for its range; a contradiction with other settings does not count."""
    try:
        check_config(with_value(Config(), key, value))
    except ConfigError as error:
        return str(error).startswith(f"{key} must be ")
    return False


# Ranges


@pytest.mark.parametrize("key", NUMERIC)
def test_every_number_has_a_lower_and_an_upper_limit(key: str) -> None:
    limits = NUMERIC[key].metadata
    assert len({"ge", "gt"} & limits.keys()) == 1, f"{key} needs ge or gt in its metadata"
    assert len({"le", "lt"} & limits.keys()) == 1, f"{key} needs le or lt in its metadata"


@pytest.mark.parametrize("key", FIELDS)
def test_every_setting_is_text_a_choice_a_switch_a_number_or_an_optional_one(key: str) -> None:
    """Any other optional or union field would slip through the ranges, which go by the declared type."""
    kind = FIELDS[key].type
    assert kind in (*NUMBERS, bool, str, dict[str, str]) or getattr(kind, "__origin__", None) is not None
    assert kind == OPTIONAL or "None" not in str(kind)


def test_defaults_are_inside_their_ranges_and_do_not_contradict() -> None:
    assert load() == Config()
    for key, item in NUMERIC.items():
        limits, default = item.metadata, item.default
        if default is None:
            assert item.type == OPTIONAL, key
            continue
        assert limits.get("ge", -math.inf) <= default <= limits.get("le", math.inf), key
        assert default != limits.get("gt"), key
        assert default != limits.get("lt"), key


@pytest.mark.parametrize(("key", "name", "limit"), LIMITS)
def test_limit_itself_is_in_or_out_as_declared_and_the_next_value_is_out(key: str, name: str, limit: float) -> None:
    whole = NUMERIC[key].type is int
    toward = math.inf if name in ("le", "lt") else -math.inf

    def step(value: float, direction: float) -> float:
        return value + int(math.copysign(1, direction)) if whole else math.nextafter(value, direction)

    closed = name in ("ge", "le")
    start = int(limit) if whole else float(limit)
    last_good, first_bad = (start, step(start, toward)) if closed else (step(start, -toward), start)
    assert not refused_range(key, last_good)
    assert refused_range(key, first_bad)


@pytest.mark.parametrize("key", [key for key, item in NUMERIC.items() if item.type is not int])
def test_no_number_may_be_infinite_or_not_a_number(key: str) -> None:
    assert all(refused_range(key, value) for value in (math.nan, math.inf, -math.inf))


def test_range_is_checked_on_the_way_in_from_an_override_and_from_a_file(tmp_path: Path) -> None:
    assert refusal("learner.learning_rate=.nan").startswith("learner.learning_rate must be > 0 and <= 1, got nan")
    assert refusal(f"batch_groups={10**400}").startswith("batch_groups must be >= 1 and <= 1e+06, got 1000")
    with pytest.raises(ConfigError, match=r"learner\.num_ranks must be >= 1 and <= 4096, got 0"):
        load_config([write(tmp_path, "learner: {num_ranks: 0}")])


def test_range_message_says_what_expected_got_and_remedy() -> None:
    assert refusal("max_staleness=-1") == "max_staleness must be >= 0 and <= 1024, got -1; use 0 for synchronous training"


# Unknown keys


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("max_stalenes=1", "max_staleness"),
        ("learner.learning_rat=1", "learner.learning_rate"),
        ("lerner.learning_rate=1", "learner.learning_rate"),
        ("algorithm.dpo.beat=1", "algorithm.dpo.beta"),
        ("algorithm.dop.label_smoothing=1", "algorithm.dpo.label_smoothing"),
        ("label_smoothing=0.1", "algorithm.dpo.label_smoothing"),
        ("temprature=1", "generator.temperature"),
        ("UPDATES=1", None),
    ],
)
def test_misspelt_or_misplaced_key_is_refused_with_the_key_that_was_meant(word: str, meant: str | None) -> None:
    message = refusal(word)
    assert message.startswith(f"unknown setting {word.partition('=')[0]!r} (in {word})")
    assert "async-rlhf config" in message
    if meant:
        assert f"did you mean {meant!r}?" in message


@settings(max_examples=100, deadline=None, derandomize=True)
@given(key=st.sampled_from(known_keys()), place=st.integers(0, 40), swap=st.booleans())
def test_any_key_with_a_letter_lost_or_swapped_is_refused_and_a_near_one_is_offered(key: str, place: int, swap: bool) -> None:
    place %= len(key) - 1
    wrong = key[:place] + (key[place + 1] + key[place] + key[place + 2 :] if swap else key[place + 1 :])
    assume(wrong not in FIELDS and wrong not in SECTIONS and not wrong.startswith("env."))
    assume(wrong.split(".").count(NAME) == key.split(".").count(NAME))  # any other name is as good
    message = refusal(f"{wrong}=1")
    assert f"unknown setting {wrong!r}" in message
    offered = message.partition("did you mean '")[2].partition("'")[0]
    assert offered in FIELDS
    assert similarity(offered, wrong) >= similarity(key, wrong)


def similarity(known: str, word: str) -> float:
    return difflib.SequenceMatcher(a=known, b=word).ratio()


def test_unknown_key_in_a_file_is_refused_with_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "queue: {ordr: ready}")
    with pytest.raises(ConfigError, match=r"unknown setting 'queue.ordr' \(in .*a.yaml\); did you mean 'queue.order'"):
        load_config([file])


def test_every_setting_of_the_schema_is_known_once() -> None:
    assert sorted(known_keys()) == sorted(FIELDS)


# Types


def wrong_values(key: str) -> tuple[str, ...]:
    """Of the wrong type, each in YAML."""
    kind = FIELDS[key].type
    if kind == OPTIONAL:
        return ("banana", "true", "[1, 2]", "")
    return ("[1, 2]", "null") if kind is bool else ("banana", "null")


@pytest.mark.parametrize("key", [key for key, item in FIELDS.items() if item.type is not str and key != "env"])
def test_wrong_type_is_refused_with_key_and_value(key: str) -> None:
    for value in wrong_values(key):
        message = refusal(f"{key}={value}")
        assert message.startswith(f"{key}: got ")
        assert f"(in {key}={value})" in message


OPTIONAL_KEYS = [key for key, item in FIELDS.items() if item.type == OPTIONAL]


def test_penalties_for_cut_completions_are_the_optional_numbers() -> None:
    assert OPTIONAL_KEYS == ["reward.missing_eos_penalty", "reward.missing_eos_percentile"]


@pytest.mark.parametrize("key", OPTIONAL_KEYS)
def test_optional_number_takes_null_and_any_notation_of_a_number(key: str, tmp_path: Path) -> None:
    def value_of(config: Config) -> float | None:
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    assert value_of(Config()) is None
    assert value_of(load(f"{key}=2")) == value_of(load(f"{key}=0.2e1")) == value_of(load(f"{key}=2.0")) == 2.0
    assert value_of(load(f"{key}=0")) == 0.0
    assert value_of(load(f"{key}=2", f"{key}=null")) is None
    section, name = key.split(".")
    assert value_of(load_config([write(tmp_path, f"{section}: {{{name}: 1e1}}")]).config) == 10.0
    assert value_of(load_config([write(tmp_path, f"{section}: {{{name}: null}}")], [f"{section}.normalize=true"]).config) is None


def test_wrong_type_for_an_optional_number_is_refused_as_no_number() -> None:
    assert refusal("reward.missing_eos_penalty=banana") == (
        "reward.missing_eos_penalty: got 'banana' (in reward.missing_eos_penalty=banana): "
        "Value 'banana' of type 'str' could not be converted to Float"
    )


@pytest.mark.parametrize("key", [key for key, item in NUMERIC.items() if item.type is int])
def test_whole_number_takes_no_fraction_and_no_bool(key: str) -> None:
    for value in ("1.5", "true"):
        assert refusal(f"{key}={value}").startswith(f"{key}: got ")


@pytest.mark.parametrize("key", [key for key in FIELDS if FIELDS[key].type is str])
def test_text_is_no_list_and_no_nothing(key: str) -> None:
    assert refusal(f"{key}=null").startswith(f"{key} must be text, got None")


def test_wrong_choice_is_refused_with_the_choices() -> None:
    assert "['ready', 'ticket']" in refusal("queue.order=redy")


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_value_for_a_whole_section_is_refused_with_the_keys_inside(section: str) -> None:
    message = refusal(f"{section}=3")
    assert f"{section} is a section of settings, got 3" in message
    assert next(key for key in FIELDS if key.startswith(f"{section}.")) in message


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "0.0003", "3.0e-4"])
def test_number_in_any_notation_is_a_number_in_files_and_overrides(tmp_path: Path, text: str) -> None:
    assert load(f"learner.learning_rate={text}").learner.learning_rate == 0.0003
    file = write(tmp_path, f"learner: {{learning_rate: {text}}}")
    assert load_config([file]).config.learner.learning_rate == 0.0003


@pytest.mark.parametrize("text", ["12e4567", "1e5", "007", "on", "2026-11-22", "1_000", "[1]", "{}"])
def test_text_that_looks_like_something_else_to_yaml_stays_as_typed(text: str) -> None:
    config = load(f"run.dir={text}", f"env.FLAG={text}")
    assert (config.run.dir, config.env) == (text, {"FLAG": text})


def test_text_that_yaml_turned_into_something_else_is_refused_in_a_file(tmp_path: Path) -> None:
    for content, key in (("run: {name: on}", "run.name"), ("env: {FLAG: yes}", "env.FLAG"), ("env: {X: 1.5}", "env.X")):
        with pytest.raises(ConfigError, match=rf"{key} must be text, got .*a.yaml\); put it in quotes"):
            load_config([write(tmp_path, content)])
    config = load_config([write(tmp_path, "run: {name: 1e5}\nenv: {OMP_NUM_THREADS: 1, FLAG: 'yes'}")]).config
    assert (config.run.name, config.env) == ("1e5", {"OMP_NUM_THREADS": "1", "FLAG": "yes"})


@pytest.mark.parametrize("override", ["env.A.B=x", "env={A: {B: x}}", "env=5", "env={1: x}"])
def test_environment_is_a_flat_mapping_of_texts(override: str) -> None:
    assert "env" in refusal(override)


@pytest.mark.parametrize("override", ["updates=${nowhere}", "run.name=${nowhere}", "updates=???"])
def test_placeholders_that_lead_nowhere_are_refused(override: str) -> None:
    assert override.partition("=")[0] in refusal(override)


# Sources


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="ascii")
    return file


@pytest.mark.parametrize("file", sorted(CONF_FOLDER.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF_FOLDER)))
def test_every_shipped_file_loads_and_sets_what_it_says(file: Path) -> None:
    group = file.parent.relative_to(CONF_FOLDER).as_posix()
    loaded = load_config([file])
    if group in SECTIONS | {"cluster"}:
        assert load(f"{group}={file.stem}") == loaded.config
    assert loaded.origins


def test_every_group_folder_can_be_named() -> None:
    folders = {folder.name for folder in CONF_FOLDER.iterdir() if folder.is_dir()} - {"experiment"}
    assert folders <= SECTIONS | {"cluster"}


def test_later_sources_win_over_earlier_ones_key_by_key(tmp_path: Path) -> None:
    first = write(tmp_path, "updates: 10\nseed: 1\nlearner: {num_ranks: 2, warmup_steps: 1}", "first.yaml")
    second = write(tmp_path, "updates: 20\nlearner: {num_ranks: 4}", "second.yaml")
    loaded = load_config([first, second], ["updates=30", "updates=40"])
    config = loaded.config
    assert (config.updates, config.seed, config.learner.num_ranks, config.learner.warmup_steps) == (40, 1, 4, 1)
    assert load_config([second, first]).config.updates == 10
    assert loaded.origins == {
        "updates": "updates=40",
        "seed": str(first),
        "learner.num_ranks": str(second),
        "learner.warmup_steps": str(first),
    }


def test_group_file_is_merged_where_it_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "algorithm: rloo\ncompletions_per_prompt: 8")
    loaded = load_config([file])
    assert (loaded.config.algorithm.name, loaded.config.completions_per_prompt) == ("rloo", 8)
    assert loaded.origins["algorithm.name"] == f"{file} -> conf/algorithm/rloo.yaml"
    assert loaded.origins["completions_per_prompt"] == str(file)
    assert load_config([file], ["algorithm=dpo"]).config.completions_per_prompt == 4
    assert load_config([file], ["algorithm=dpo", "completions_per_prompt=2"]).config.completions_per_prompt == 2


KNOWN_ALGORITHMS = f"known: {', '.join(sorted(path.stem for path in (CONF_FOLDER / 'algorithm').glob('*.yaml')))}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm=roo", [KNOWN_ALGORITHMS, "did you mean 'rloo'?"]),
        ("cluster=moon", ["known: laptop, node_8gpu, one_gpu, several_nodes"]),
        ("algorithm=../task/arithmetic", [KNOWN_ALGORITHMS]),
    ],
)
def test_unknown_group_file_is_refused_with_the_known_ones(override: str, words: list[str]) -> None:
    message = refusal(override)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [", "is not valid YAML"), ("- 1", "must hold a mapping"), ("1: 2", "must hold a mapping"), ("just words", "must hold a mapping")],
)
def test_file_that_is_no_mapping_of_settings_is_refused_by_name(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config([write(tmp_path, text)])
    assert "a.yaml" in str(caught.value)


def test_missing_file_is_refused_with_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"config file not found: nowhere.yaml; shipped ones: .*conf/quickstart.yaml"):
        load_config(["nowhere.yaml"])


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config([write(tmp_path, "# nothing\n")]).config == Config()


@pytest.mark.parametrize("word", ["updates", "=5", " =5"])
def test_override_without_key_or_value_is_refused(word: str) -> None:
    assert "must look like key=value" in refusal(word)


def test_words_of_the_command_line_are_files_or_overrides() -> None:
    assert split_arguments(["a.yaml", "updates=3", "b.yaml", "env.X=a=b"]) == (["a.yaml", "b.yaml"], ["updates=3", "env.X=a=b"])
    assert load("env.X=a=b").env == {"X": "a=b"}


# The result


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1),
    rate=st.floats(1e-300, 1.0),
    text=st.sampled_from(["1e5", "007", "on", "null", "a", "2026-11-22"]),
    value=st.text(st.characters(codec="ascii", exclude_characters="$"), max_size=12),
    eager=st.booleans(),
    penalty=st.none() | st.floats(-1e30, 1e30),
)
def test_config_written_as_yaml_loads_as_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rate: float, text: str, value: str, eager: bool, penalty: float | None
) -> None:
    learner = dataclasses.replace(Config().learner, learning_rate=rate)
    generator = dataclasses.replace(Config().generator, enforce_eager=eager)
    run = dataclasses.replace(Config().run, name=text)
    reward = dataclasses.replace(Config().reward, missing_eos_penalty=penalty)
    config = dataclasses.replace(
        Config(), seed=seed, learner=learner, generator=generator, run=run, reward=reward, env={"X": value, "Y": text}
    )
    file = tmp_path_factory.mktemp("config") / "resolved.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config([file]).config == config


def test_resolved_yaml_holds_every_setting() -> None:
    def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]

    named = {key.partition(f".{NAME}.")[0] for key in FIELDS if NAME in key}
    assert set(flatten(yaml.safe_load(to_yaml(Config())))) == {key for key in FIELDS if NAME not in key} | named


def test_loaded_config_cannot_be_changed() -> None:
    config = load()
    for section, key in ((config, "updates"), (config.learner, "learning_rate"), (config.algorithm.dpo, "beta")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, key, 1)


def test_sizes_that_follow_from_others_are_derived() -> None:
    config = load("updates=10", "algorithm.epochs_per_batch=2", "algorithm.minibatches_per_batch=4", "batch_groups=8")
    assert config.optimizer_steps == 10 * 2 * 4
    assert config.max_replacements_per_batch == 8
    assert load("queue.max_replacements_per_batch=3").max_replacements_per_batch == 3
    assert load("queue.ties=keep", "queue.max_replacements_per_batch=3").max_replacements_per_batch == 0
