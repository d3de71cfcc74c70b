"""A stand-in policy whose completions are as long as one wants, and prompts for it.

Its layers do their work and change nothing; its head turns the last token into the next one's distribution, by hand: a completion says
how long it is so far, and ends after FIXED_TOKENS tokens, or as a log-normal would. Completions of one group differ in length, and a
seed gives the same ones on any engine.
"""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np

from async_rlhf.config.schema import ModelConfig
from async_rlhf.tasks.base import Vocabulary
from async_rlhf.tasks.start import build_policy, build_tokenizer

HIDDEN, LAYERS, TOKENS = 128, 4, 512
"""The demo's size, with a larger vocabulary."""
FIXED_TOKENS = 8
MEDIAN_TOKENS, SIGMA, MAX_TOKENS = 32.0, 1.0, 256
"""Of the log-normal, and where generators cut it."""
PROMPT_TOKENS = 16
IMPOSSIBLE = -20.0
"""Log-probability, about, of what never comes."""
FIXED, LONG_TAILED = "fixed", "long-tailed"
EOS, FIRST = 1, 3
"""Token ids: the end of sequence, and the first one behind the special ones, which asks for FIXED_TOKENS tokens."""
FIRST_TAILED = FIRST + FIXED_TOKENS
"""Asks for a log-normal's."""


def next_token() -> dict[int, dict[int, float]]:
    """Token -> what may follow it, with its probability."""
    follows: dict[int, dict[int, float]] = {}
    for so_far in range(FIXED_TOKENS):
        last = so_far == FIXED_TOKENS - 1
        follows[FIRST + so_far] = {EOS: 1.0} if last else {FIRST + so_far + 1: 1.0}
    # A token stands for a range of lengths, one more token wide with each; within it, as memory is short, the length is geometric.
    edges = np.unique(np.geomspace(1, 4 * MAX_TOKENS, HIDDEN - FIXED_TOKENS - 8).round().astype(int))
    alive = [0.5 * math.erfc((math.log(edge / MEDIAN_TOKENS)) / (SIGMA * math.sqrt(2))) for edge in edges]
    for index in range(len(edges) - 1):
        width, token = int(edges[index + 1] - edges[index]), FIRST_TAILED + index
        ends = 1 - (alive[index + 1] / alive[index]) ** (1 / width)
        moves = (1 - ends) / width if index < len(edges) - 2 else 0.0
        follows[token] = {EOS: ends, token: 1 - ends - moves} | ({token + 1: moves} if moves else {})
    return follows


def write_policy(folder: Path) -> None:
    """The stand-in, as a Hugging Face folder."""
    import torch

    tokenizer = build_tokenizer(Vocabulary(tokens=tuple(f"<{index}>" for index in range(TOKENS - FIRST)), separator=" "))
    model = build_policy(ModelConfig(hidden_size=HIDDEN, num_layers=LAYERS), tokenizer, seed=0)
    states = {token: state for state, token in enumerate(next_token(), start=1)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        embedding, head = (cast(Any, layer).weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
        embedding.zero_()
        head.fill_(IMPOSSIBLE / math.sqrt(HIDDEN))  # the last norm makes sqrt(HIDDEN) of a one
        embedding[:, 0] = 1.0
        for token, follows in next_token().items():
            embedding[token, 0], embedding[token, states[token]] = 0.0, 1.0
            for following, probability in follows.items():
                if probability > 0:
                    head[following, states[token]] = math.log(probability) / math.sqrt(HIDDEN)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def make_prompts(kind: str, num: int) -> list[list[int]]:
    """Token ids; the last one says how long the answer is to be."""
    rng = np.random.default_rng(0)
    filler = rng.integers(FIRST, TOKENS, size=(num, PROMPT_TOKENS - 1)).tolist()
    return [[*ids, FIRST if kind == FIXED else FIRST_TAILED] for ids in filler]
