"""`async-rlhf export` on run folders made by hand: which weights, which card, and what is refused. Neither Ray nor DeepSpeed starts."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from async_rlhf.checkpoints import COMMIT, folder_of
from async_rlhf.commands.export import run_export
from async_rlhf.errors import ConfigError
from async_rlhf.model_card import hub_id
from async_rlhf.snapshot import DTYPES
from async_rlhf.state import write_atomically
from tests.support.cluster import make_model_folder
from tests.support.run_folders import SECRET, make_checkpoint, make_run, state_of, trained

LORA = ("learner.lora.rank=3", "learner.lora.alpha=6")


def export(run: Path, out: Path | None = None, version: int | None = None, adapter: bool = False) -> str:
    """What it prints."""
    text = StringIO()
    run_export(run, out, version, adapter, Console(file=text, width=400))
    return text.getvalue()


def head_of(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("start") / "base")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}=")
    return folder


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_checkpoint_becomes_an_ordinary_model_folder_whatever_ranks_wrote_it(
    tmp_path: Path, start: Path, num_ranks: int, precision: str
) -> None:
    config = make_run(tmp_path / "run", start, f"learner.precision={precision}")
    model = trained(start, config, 2)
    make_checkpoint(tmp_path / "run", model, config, 2, num_ranks)

    printed = export(tmp_path / "run", tmp_path / "out")

    assert f"exported: {tmp_path / 'out'} (checkpoint of version 2)" in printed
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, parameter), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected.to(DTYPES[precision])), name
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.6, 0, 1.0)
    assert (settings.eos_token_id, settings.pad_token_id) == (1, 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+2"}], tokenize=False) == "1+2="
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}, "nothing else is left"


@pytest.mark.parametrize("family", ["gpt_neox", "gemma", "qwen3"])
def test_a_tied_head_and_renamed_weights_come_through(tmp_path: Path, family: str) -> None:
    start = make_model_folder(tmp_path / "base", family=family, tied=family != "gpt_neox")
    config = make_run(tmp_path / "run", start)
    model = trained(start, config, 1)
    make_checkpoint(tmp_path / "run", model, config, 1)

    export(tmp_path / "run", tmp_path / "out")

    ids = torch.tensor([[4, 9, 5]])
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        torch.testing.assert_close(got, model.set_attn_implementation("sdpa") or model(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_without_a_version_the_newest_whole_checkpoint_is_taken_and_a_finished_model_before_it(tmp_path: Path, start: Path) -> None:
    run = tmp_path / "run"
    config = make_run(run, start)
    for version in (1, 2, 3):
        make_checkpoint(run, trained(start, config, version), config, version)
    (folder_of(run, 3) / COMMIT).unlink()

    assert f"exported: {run / 'export' / '00000002'} (checkpoint of version 2)" in export(run)

    shutil.copytree(start, run / "model")
    assert "(checkpoint of version 2)" in export(run, tmp_path / "second"), "resumed for more updates: its model is an earlier end's"
    write_atomically(run / "state.json", state_of(3, "finished").to_json())
    assert f"exported: {tmp_path / 'out'} (finished run, version 3)" in export(run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (start / "model.safetensors").read_bytes()
    assert "(checkpoint of version 1)" in export(run, tmp_path / "first", 1)


def test_adapters_are_exported_merged_or_alone(tmp_path: Path, start: Path) -> None:
    run, ids = tmp_path / "run", torch.tensor([[4, 9, 5]])
    config = make_run(run, start, *LORA)
    model = trained(start, config, 1)
    make_checkpoint(run, model, config, 1)

    export(run, tmp_path / "merged")
    printed = export(run, adapter=True)

    folder = run / "export" / "00000001-adapter"
    assert str(folder) in printed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), str(folder))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(adapted(input_ids=ids).logits, expected)
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    assert not (folder / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 1
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.*") if path.suffix != ".safetensors")
    assert head_of((folder / "README.md").read_text())["library_name"] == "peft"


# The card.


def test_the_card_says_what_the_run_did_up_to_that_version(tmp_path: Path, start: Path) -> None:
    run = tmp_path / "run"
    config = make_run(run, start, *LORA, "max_staleness=2")
    make_checkpoint(run, trained(start, config, 2), config, 2)

    export(run, tmp_path / "out")

    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["async-rlhf", "reinforcement-learning", "rlhf", "rloo", "lora"]
    assert card.data.base_model is None, "a folder's name means nothing to the hub"
    for fact in (
        "# first \\| try",
        "| base model | base (a folder) |",
        "| algorithm | rloo |",
        "| updates | 2 of 9 (4 optimizer steps) |",
        "| trained on | 16 prompts, 64 completions, 200 completion tokens |",
        "| staleness | at most 1 updates (bound 2) |",
        "| reward per completion | 0.100 (first update) -\\> 0.200 (last) |",
        "| KL to the base model | 0.020 nats per completion sampled (last update, k1) |",
        "| held-out score, greedy | 0.500 (base model, 2 prompts) |",
        "| adapters | LoRA, rank 3, alpha 6, all linear layers below the head |",
        f"torch {torch.__version__.partition('+')[0]}",
    ):
        assert fact in text, fact
    for private in (str(tmp_path), SECRET, "OPENAI"):
        assert private not in text


def test_the_card_of_the_final_version_has_its_evaluation(tmp_path: Path, start: Path) -> None:
    run = tmp_path / "run"
    make_run(run, start)
    write_atomically(run / "state.json", state_of(4, "finished").to_json())
    shutil.copytree(start, run / "model")

    export(run, tmp_path / "out")

    assert "| held-out score, greedy | 0.500 (base model) -\\> 1.000, 2 prompts |" in (tmp_path / "out" / "README.md").read_text()


def test_names_that_the_hub_knows_are_in_the_head(tmp_path: Path, start: Path) -> None:
    cached = tmp_path / "models--owner--a-model" / "snapshots" / "0123"
    shutil.copytree(start, cached)
    run = tmp_path / "run"
    paths = {"a": "owner/questions@v1", "b": "rows/mine.jsonl", "c": f"{tmp_path}/x.parquet"}
    sources = [f"prompts.sources.{name}.path={path}" for name, path in paths.items()]
    sources += ["task.name=dataset", "model.path=owner/a-model", "reward.function=r:score"]
    config = make_run(run, cached, *sources, *LORA)
    make_checkpoint(run, trained(cached, config, 2), config, 2)

    export(run, tmp_path / "out", adapter=True)

    head = head_of((tmp_path / "out" / "README.md").read_text())
    assert head["base_model"] == "owner/a-model" and head["base_model_relation"] == "adapter"
    assert head["datasets"] == ["owner/questions"]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/a-model"
    assert hub_id(Path("/srv/models/mine")) is None


# What is refused.


def refused(run: Path, *, match: str, out: Path | None = None, version: int | None = None, adapter: bool = False) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")}
    with pytest.raises(ConfigError, match=match):
        export(run, out, version, adapter)
    assert {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")} == before, "nothing was written"


def test_what_cannot_be_exported_is_named(tmp_path: Path, start: Path) -> None:
    run = tmp_path / "run"
    config = make_run(run, start)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", match=r"empty is no run folder: it has no config.yaml; give the folder that `train` printed")
    refused(run, match=r"run has no whole checkpoint; export when the run has made one")
    for version in (2, 3):
        make_checkpoint(run, trained(start, config, version), config, version)
    refused(run, version=7, match=r"has no checkpoint of version 7; there are: 3, 2|has no checkpoint of version 7; there are: 2, 3")
    refused(run, out=run / "checkpoints", match=r"must not exist or be empty, got .*checkpoints; delete it, or name another one by --out")
    refused(run, out=run / "config.yaml", match=r"must not exist or be empty, got .*config.yaml")
    refused(run, out=run / "config.yaml" / "deep", match=r"deep cannot be written: .*name another folder by --out")
    refused(run, adapter=True, match=r"00000003 holds a whole model, no adapters .*export it without --adapter")
    (run / "origin.json").write_text(json.dumps({"model_folder": str(tmp_path / "gone")}))
    refused(run, match=r"the run began from .*gone, which does not exist; a checkpoint needs its config and tokenizer")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another byte": (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"), r"the content of learner/policy-00000-of-00002"),
    "missing": (lambda file: file.unlink(), r"learner/policy-00000-of-00002.safetensors is missing"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_when_asked_for_and_passed_over_otherwise(tmp_path: Path, start: Path, case: str) -> None:
    run = tmp_path / "run"
    config = make_run(run, start)
    for version in (2, 3):
        make_checkpoint(run, trained(start, config, version), config, version)
    damage, message = DAMAGES[case]
    damage(folder_of(run, 3) / "learner" / "policy-00000-of-00002.safetensors")

    refused(run, version=3, match=message)

    assert "(checkpoint of version 2)" in export(run, tmp_path / "out")


def test_a_checkpoint_of_another_model_is_refused_and_leaves_nothing(tmp_path: Path, start: Path) -> None:
    run, other = tmp_path / "run", make_model_folder(tmp_path / "other", family="qwen3")
    config = make_run(run, start)
    make_checkpoint(run, trained(other, config, 1), config, 1)

    with pytest.raises(ConfigError, match=r"k_norm.weight has shape .* does not exist in the model"):
        export(run, tmp_path / "out")

    assert {path.name for path in tmp_path.iterdir()} == {"run", "other"}


@pytest.mark.slow
def test_exporting_imports_neither_ray_nor_vllm_nor_the_learner(tmp_path: Path, start: Path) -> None:
    run = tmp_path / "run"
    config = make_run(run, start, *LORA)
    make_checkpoint(run, trained(start, config, 1), config, 1)
    code = (
        "import sys; from pathlib import Path; from rich.console import Console; from async_rlhf.commands.export import run_export\n"
        f"run_export(Path({str(run)!r}), None, None, False, Console())\n"
        "print(sorted({'ray', 'vllm', 'learners.engine'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)

    assert done.stdout.splitlines()[-1] == "[]"


def test_exported_twice_the_files_are_equal(tmp_path: Path, start: Path) -> None:
    run = tmp_path / "run"
    config = make_run(run, start)
    make_checkpoint(run, trained(start, replace(config), 1), config, 1)

    export(run, tmp_path / "a")
    export(run, tmp_path / "b")

    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
