"""The shipped configs: each loads, says how to start it, and asks for the GPUs that its first line promises."""

import re
from pathlib import Path

import pytest

from async_rlhf.config import load_config
from async_rlhf.config.load import CONF_FOLDER

RECIPES = sorted((CONF_FOLDER / "experiment").glob("*.yaml"))
EPISODES = {"tldr": 131_072, "gsm8k": 131_072, "chatbot": 99_840}
"""Completions of a published run: updates x prompts x completions (the chatbot's 100,000, in whole batches of 256)."""


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_loads_and_its_first_lines_say_what_it_needs_and_how_it_is_started(file: Path) -> None:
    config = load_config([file]).config
    about, command = file.read_text(encoding="utf-8").splitlines()[:2]

    assert command == f"#   async-rlhf train conf/experiment/{file.name}"
    promised = re.search(r"(\d+) GPUs? of", about)
    asked = (
        config.generator.count * config.generator.num_gpus
        + config.scorer.count * config.scorer.num_gpus
        + config.reward.count * config.reward.num_gpus
        + config.learner.num_ranks * config.learner.num_gpus
    )
    assert asked == (float(promised[1]) if promised else 0.0)


@pytest.mark.parametrize("file", [file for file in RECIPES if file.stem.split("_")[0] in EPISODES], ids=lambda file: file.stem)
def test_recipe_of_the_paper_trains_its_number_of_completions_one_update_off_policy(file: Path) -> None:
    config = load_config([file]).config

    assert config.updates * config.batch_groups * config.completions_per_prompt == EPISODES[file.stem.split("_")[0]]
    assert config.max_staleness == 1
    assert config.generator.temperature == 0.7
