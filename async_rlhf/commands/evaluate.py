"""`async-rlhf eval`: greedy and sampled accuracy of a finished model on held-out problems."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from async_rlhf.config import Config, load_config
from async_rlhf.config.load import split_arguments
from async_rlhf.config.lora import LoraConfig
from async_rlhf.errors import ConfigError
from async_rlhf.evaluation import Evaluation, Sample
from async_rlhf.model_folders import check_model_folder
from async_rlhf.prompts import held_out_prompts
from async_rlhf.rewards import open_metric
from async_rlhf.run_plan import reward_and_metric
from async_rlhf.types import InstallReport, WeightsVersion

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Libraries that talk about themselves.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "DS_LOG_LEVEL": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def run_evaluate(model: Path, words: list[str], console: Console) -> None:
    """Sample one completion per held-out problem, greedily and at the training temperature, and print the accuracies.

    Args:
        model: a Hugging Face folder, or a run folder: then its final policy, under its own config.
        words: config files and overrides, as for `train`.
    Raises:
        ConfigError: no model there, or a wrong setting.
    """
    folder, config = _resolve(model, words)
    config = replace(config, learner=replace(config.learner, lora=LoraConfig()))  # the folder has all weights
    check_model_folder(folder)
    # Before the engine is imported: it reads them then.
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    console.print(f"model: {folder} ({config.generator.engine})", markup=False, highlight=False, soft_wrap=True)
    table = Table(title=f"held-out accuracy, task {config.task.name}")
    for heading in ("sampling", "accuracy", "problems", "tokens / completion"):
        table.add_column(heading, justify="left" if heading == "sampling" else "right")
    for name, evaluation, length in _evaluate(folder, config):
        table.add_row(name, f"{evaluation.accuracy:.3f}", str(len(evaluation.samples)), f"{length:.1f}")
    console.print(table)


def _resolve(model: Path, words: list[str]) -> tuple[Path, Config]:
    files, overrides = split_arguments(words)
    if (model / "summary.json").is_file() or (model / "metrics.jsonl").is_file():
        if not (model / "model").is_dir():
            raise ConfigError(f"{model} is the folder of a run that exported no policy (it did not end well); give a model folder")
        return (model / "model").resolve(), load_config([model / "config.yaml", *files], overrides).config
    return model.resolve(), load_config(files, overrides).config


def _evaluate(folder: Path, config: Config) -> list[tuple[str, Evaluation, float]]:
    """(name, evaluation, mean completion length in tokens) for greedy and for sampled completions."""
    from transformers import AutoTokenizer

    from actors.generator import Generator
    from async_rlhf.snapshot import snapshot_of_folder

    prompts = held_out_prompts(config, folder)
    tokenizer, metric = AutoTokenizer.from_pretrained(folder), open_metric(config.reward, *reward_and_metric(config))
    # Before the engine: vLLM changes transformers' own classes for some architectures.
    weights: WeightsVersion = snapshot_of_folder(folder, config.generator.dtype)
    generator = Generator(config, str(folder), "eval")
    results: list[tuple[str, Evaluation, float]] = []
    try:
        report: InstallReport = generator.install(weights)
        for name, temperature in (("greedy", 0.0), (f"temperature {config.generator.temperature:g}", config.generator.temperature)):
            rollouts = generator.evaluate(prompts, temperature)
            texts = tokenizer.batch_decode([r.completion_ids.tolist() for r in rollouts], skip_special_tokens=True)
            scores = metric.rate(prompts, texts).scores
            samples = tuple(
                Sample(prompt=p.text, completion=text, expected=str(p.columns.get("answer", "")), score=float(score))
                for p, text, score in zip(prompts, texts, scores, strict=True)
            )
            evaluation = Evaluation(version=report.version, temperature=temperature, samples=samples)
            results.append((name, evaluation, sum(len(r.completion_ids) for r in rollouts) / len(rollouts)))
    finally:
        generator.close()
        metric.close()
    return results
