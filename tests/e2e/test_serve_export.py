"""An exported folder, unchanged, in vLLM's server: what other people's tools make of it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_rlhf.commands.export import run_export
from tests.support.cluster import make_model_folder
from tests.support.run_folders import make_checkpoint, make_run, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""What `vllm serve` runs; the command itself asks for a package `vllm`, which the CPU build is not called."""

PROMPTS = ("12+34=", "7*8=", "(1+2)-3=")


@contextmanager
def served(folder: Path, log: Path) -> Iterator[httpx.Client]:
    """A server on a free loopback port, ended with all its processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings = ("--served-model-name", "policy", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--block-size", "32")
    settings = (*settings, "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20))
    own = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS")
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*SERVE, "--model", str(folder), "--host", "127.0.0.1", "--port", str(port), *settings],
            env={**os.environ, **dict.fromkeys(own, "1"), "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            wait_until_healthy(client, process, log)
            yield client
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)] if process.poll() is None else []
        process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=15)
        for each in alive:
            each.kill()
        process.wait(timeout=15)


def wait_until_healthy(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + 400
    while True:
        assert process.poll() is None and time.monotonic() < ends, log.read_text()[-4000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)


def complete(client: httpx.Client, prompt: str, **settings: object) -> dict[str, Any]:
    answer = client.post(
        "/v1/completions", json={"model": "policy", "prompt": prompt, "max_tokens": 8, **settings, "return_token_ids": True}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_an_exported_folder_is_served_as_it_is_and_answers_as_transformers_does(tmp_path: Path) -> None:
    start = make_model_folder(tmp_path / "start", family="qwen3", tied=True)
    config = make_run(tmp_path / "run", start, "learner.lora.rank=3")
    make_checkpoint(tmp_path / "run", trained(start, config, 2), config, 2)
    run_export(tmp_path / "run", tmp_path / "out", None, False, Console(quiet=True))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")

    with served(tmp_path / "out", tmp_path / "serve.log") as client:
        greedy = {prompt: complete(client, prompt, temperature=0) for prompt in PROMPTS}
        as_trained = [complete(client, PROMPTS[0], seed=seed)["token_ids"] for seed in range(4)]
        by_name = [complete(client, PROMPTS[0], seed=seed, temperature=0.6, top_k=0, top_p=1.0)["token_ids"] for seed in range(4)]
        hotter = [complete(client, PROMPTS[0], seed=seed, temperature=1.5)["token_ids"] for seed in range(4)]

    for prompt, choice in greedy.items():
        ids = torch.tensor([tokenizer.encode(prompt)])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, top_k=None, max_new_tokens=8)
        assert choice["prompt_token_ids"] == ids[0].tolist()
        assert choice["token_ids"] == expected[0, ids.shape[1] :].tolist()
        assert choice["text"] == tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
    assert as_trained == by_name != hotter, "who names no temperature gets that of the training"
