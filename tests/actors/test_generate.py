"""`async-rlhf generate`: a policy's answers to prompts of the user's."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_rlhf.commands.generate import Questions, encoded, run_generate
from async_rlhf.config import Config
from async_rlhf.config.schema import GeneratorConfig
from async_rlhf.errors import ConfigError
from tests.support.cluster import make_model_folder

ENGINE = ["generator.engine=transformers", "generator.max_new_tokens=6", "generator.max_model_len=32"]
SMALL = Config(generator=GeneratorConfig(max_new_tokens=6, max_model_len=32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("policy"), seed=3)


def test_greedy_answers_are_those_of_the_model_itself(folder: Path, tmp_path: Path) -> None:
    out, shown = tmp_path / "answers.jsonl", io.StringIO()
    asked = ("12+34=", "7*8=")

    run_generate(folder, ENGINE, Questions(prompts=asked, temperature=0.0), out, Console(file=shown))

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == list(asked)
    assert f"written: {out} (2 completions of 2 prompts)" in shown.getvalue()
    for prompt, line in zip(asked, lines, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        logprobs = torch.log_softmax(model(torch.cat([ids, torch.tensor([line["token_ids"]])], dim=1)).logits[0], dim=-1)
        of_completion = logprobs[ids.shape[1] - 1 : -1]
        assert line["token_ids"] == of_completion.argmax(dim=-1).tolist()
        assert line["logprobs"] == pytest.approx(of_completion.max(dim=-1).values.tolist(), abs=1e-4)
        assert line["completion"] == tokenizer.decode(line["token_ids"], skip_special_tokens=True)


def test_samples_of_a_prompt_differ_and_come_again_the_same(folder: Path, tmp_path: Path) -> None:
    questions, runs = Questions(prompts=("1+1=",), num_samples=4, temperature=1.0), []
    for name in ("first", "second"):
        run_generate(folder, ENGINE, questions, tmp_path / name, Console(file=io.StringIO()))
        runs.append([tuple(json.loads(line)["token_ids"]) for line in (tmp_path / name).read_text().splitlines()])
    assert runs[0] == runs[1] and len(set(runs[0])) == 4


def test_without_a_file_prompts_and_answers_are_printed_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("2+3=\n\n4*5=\n"))
    shown = io.StringIO()

    run_generate(folder, ENGINE, Questions(prompts=("(1+1)=",), file=Path("-")), None, Console(file=shown))

    assert [line.partition("=")[0] for line in shown.getvalue().splitlines()] == ["(1+1)", "2+3", "4*5"]


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (Questions(prompts=()), "nothing is asked"),
        (Questions(prompts=(), file=Path("/nowhere/prompts.txt")), "cannot be read as lines of text"),
        (Questions(prompts=("1",), chat=True), "needs a tokenizer with a chat template"),
        (Questions(prompts=("1", "1" * 27)), "prompt 2 .* has 27 tokens, expected 1 to 26"),
    ],
    ids=["no prompt", "no file", "no template", "too long"],
)
def test_what_cannot_be_asked_is_refused_before_the_engine_starts(folder: Path, questions: Questions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoded(questions, folder, SMALL)
