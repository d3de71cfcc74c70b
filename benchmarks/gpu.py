"""On a GPU: tokens per second and model FLOPs utilisation of the learner, tokens per second of the generator's engine.

    python benchmarks/gpu.py [--tiny] [--quick] [--peak-tflops N] [--json FILE]

Qwen2 shapes of 0.5 and 1.5 billion parameters with random weights (nothing is downloaded), bfloat16 with an fp32 master copy. The
learner's train_step (RLOO, packed, activations computed again) is measured under each attention kernel that torch has on the device, in
turn; the fastest counts. The engine samples as in a run: per-request seeds, log-probabilities, prompts of token ids. Each part is a process
of its own; what is missing, or does not fit, is said and left out. --tiny runs the same code on the CPU, with a model that says nothing
about speed. MFU is against the device's peak as learners/flops.py knows it, or --peak-tflops.
"""

import importlib.util
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare_loop import make_batch
from harness import Spread, command_line, console, finish, in_turn, show
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # public, says its documentation
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Qwen2Config

from async_rlhf.config import Config, load_config
from async_rlhf.policy import empty_policy, load_policy
from async_rlhf.protocols import SampleRequest
from async_rlhf.snapshot import make_buckets
from async_rlhf.types import Batch, WeightsManifest, WeightsVersion
from learners.flops import device_name, peak_flops, size_of, training_flops

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is trained and sampled."""

    models: Mapping[str, Qwen2Config]
    num_groups: int
    median_tokens: int
    max_tokens: int
    prompt_tokens: int
    microbatch_tokens: int
    num_prompts: int
    kv_cache_mib: int

    @property
    def batch(self) -> Batch:
        """One update's."""
        limits = {"max_tokens": self.max_tokens, "prompt_tokens": self.prompt_tokens}
        return make_batch(self.num_groups, median=self.median_tokens, sigma=0.7, **limits)

    def config(self, peak_tflops: float, *, on_gpu: bool) -> Config:
        """Of learner and engine."""
        learner = ("precision=bfloat16", "zero_stage=1", "activation_checkpointing=true", f"peak_tflops={peak_tflops}")
        generator = (f"max_new_tokens={self.max_tokens}", f"max_model_len={4 * self.prompt_tokens + self.max_tokens}", "dtype=bfloat16")
        sizes = (f"kv_cache_mib={self.kv_cache_mib}", f"max_inflight={self.num_prompts}")
        engine = (f"num_gpus={int(on_gpu)}", f"enforce_eager={not on_gpu}", *sizes)
        settings = [f"learner.{each}" for each in (*learner, f"max_tokens_per_microbatch={self.microbatch_tokens}")]
        return load_config([], ["algorithm=rloo", *settings, *(f"generator.{each}" for each in (*generator, *engine))]).config


def qwen2(hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int, vocab_size: int = 151936) -> Qwen2Config:
    """Two key/value heads, embeddings tied, as the small models of that family are."""
    return Qwen2Config(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=2,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )


LARGE = Load(
    models={"0.5B": qwen2(896, 24, 14, 4864), "1.5B": qwen2(1536, 28, 12, 8960)},
    num_groups=64,
    median_tokens=256,
    max_tokens=1024,
    prompt_tokens=128,
    microbatch_tokens=32768,
    num_prompts=256,
    kv_cache_mib=16384,
)
TINY = Load(
    models={"tiny": qwen2(64, 2, 2, 128, vocab_size=2048)},
    num_groups=2,
    median_tokens=8,
    max_tokens=16,
    prompt_tokens=4,
    microbatch_tokens=256,
    num_prompts=4,
    kv_cache_mib=16,
)


def train(load: Load, folder: Path, config: Config, rounds: int, answer: Connection) -> None:
    """Send, per attention kernel, the seconds per update of each round; and the peak of the memory, bytes."""
    from learners.engine import join_process_group
    from learners.learner import Learner

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    join_process_group(rank=0, world_size=1, address="127.0.0.1", port=store.port, timeout_s=600)
    learner, batch = Learner(config, folder), load.batch
    measures: dict[str, Callable[[], float]] = {}
    for name, kernel in KERNELS.items():

        def step(kernel: SDPBackend = kernel) -> float:
            with sdpa_kernel(kernel):
                return learner.train_step(0, [batch.groups]).train_s

        try:
            step()
            measures[name] = step
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            console(f"attention kernel {name}: not for this device or these shapes ({str(error).splitlines()[0]})")
    answer.send((in_turn(measures, rounds), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0))


def sample(load: Load, folder: Path, config: Config, rounds: int, answer: Connection) -> None:
    """Send the engine's completion tokens per second, round by round; a first one warms it up."""
    from actors.engine_vllm import VLLMEngine

    engine = VLLMEngine(folder, config, eos_token_id=1)
    nothing = WeightsManifest(version=0, tensors=(), canary_ids=(), canary_logprobs=())
    buckets = make_buckets(load_policy(folder, torch.bfloat16).named_parameters(), nothing, "bfloat16")
    engine.load(WeightsVersion.of(list(buckets)))
    rng, speeds = np.random.default_rng(0), list[float]()
    for number in range(rounds + 1):
        started, num_tokens = time.perf_counter(), 0
        for index in range(load.num_prompts // 4):
            ids = rng.integers(3, 1000, load.prompt_tokens, dtype=np.int32)
            engine.add(SampleRequest(request_id=f"{number}-{index}", prompt_ids=ids, num_samples=4, seed=index, temperature=1.0))
        while engine.num_running:
            num_tokens += sum(len(rollout.completion_ids) for _, rollouts in engine.step() for rollout in rollouts)
        speeds.append(num_tokens / (time.perf_counter() - started))
    engine.close()
    answer.send(speeds[1:])


def in_process(part: Callable[..., None], load: Load, folder: Path, config: Config, rounds: int) -> Any:
    """What the part sends from a process of its own; None: it failed, and has said why."""
    context = mp.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=part, args=(load, folder, config, rounds, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        console(f"{part.__name__}: failed, see above; left out")
        return None
    finally:
        process.join(30)
        process.kill()


def learner_row(name: str, load: Load, folder: Path, config: Config, rounds: int) -> tuple[tuple[object, ...], dict[str, float]]:
    """The fastest kernel's line, and its numbers."""
    answer = in_process(train, load, folder, config, rounds)
    if not (answer and answer[0]):
        return (name, "-", "-", "-", "-"), {}
    seconds = {kernel: Spread.of(times) for kernel, times in answer[0].items()}
    kernel = min(seconds, key=lambda each: seconds[each].median)
    num_tokens = sum(scored.group.num_sequence_tokens for scored in load.batch.groups)
    speed = Spread.of([num_tokens / each for each in answer[0][kernel]])
    peak = peak_flops(device_name(), config.learner.peak_tflops)
    metrics = {f"learner_tokens_per_s_{name}": speed.median}
    if peak is not None:
        flops = training_flops(size_of(empty_policy(folder)), num_tokens, 4 * load.num_groups)
        metrics[f"mfu_{name}"] = flops / seconds[kernel].median / peak
    mfu = f"{metrics[f'mfu_{name}']:.1%}" if peak is not None else "peak not known: --peak-tflops"
    return (name, str(speed), mfu, kernel, f"{answer[1] / 2**30:.1f}"), metrics


def main() -> None:
    """Each model in turn; what is missing is said."""
    parser = command_line(__doc__, "two rounds, the smaller model alone")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with a tiny model: does it run?")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device in bfloat16, dense; default: by its name")
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        console("there is no GPU on this machine: nothing to measure (--tiny runs the same code on the CPU)")
        finish(arguments, {})
        return
    if arguments.tiny:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    load, rounds = TINY if arguments.tiny else LARGE, 2 if arguments.quick or arguments.tiny else 5
    config = load.config(arguments.peak_tflops, on_gpu=not arguments.tiny)
    has_vllm = importlib.util.find_spec("vllm") is not None
    if not has_vllm:
        console("vLLM is not installed: no generator tokens/s")
    metrics: dict[str, float] = {}
    rows: list[tuple[object, ...]] = []
    for name in list(load.models)[: 1 if arguments.quick else None]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            AutoModelForCausalLM.from_config(load.models[name], dtype=torch.bfloat16).save_pretrained(folder)
            row, found = learner_row(name, load, folder, config, rounds)
            speeds = in_process(sample, load, folder, config, rounds) if has_vllm else None
        if speeds:
            found[f"generator_tokens_per_s_{name}"] = Spread.of(speeds).median
        rows.append((*row, str(Spread.of(speeds)) if speeds else "-"))
        metrics |= found
    title = torch.cuda.get_device_name() if not arguments.tiny else "on the CPU: these figures say that it runs, and nothing else"
    show(title, ("model", "learner tokens/s", "MFU", "attention", "GiB", "generator tokens/s"), rows)
    finish(arguments, metrics)


if __name__ == "__main__":
    main()
