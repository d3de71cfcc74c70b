"""Where a process's random number generators stand: python's, numpy's, torch's, and that of its GPU."""

import base64
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def random_state() -> Mapping[str, Any]:
    """Where this process's random number generators stand, as JSON can say it."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, next_gauss = random.getstate()
    return {
        "python": [version, list(words), next_gauss],
        "numpy": [name, cast(np.ndarray, keys).tolist(), position, has_gauss, gauss],
        "torch": _to_text(torch.get_rng_state()),
        "cuda": _to_text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on where `random_state` was called; a GPU's generator only where there was one, and is one."""
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_from_text(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
