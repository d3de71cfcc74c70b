"""A local Ray for one test module, and model folders small enough to start anything in seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.launch import Cluster, connect
from actors.session import make_session_folder
from async_rlhf.config import Config, load_config
from async_rlhf.config.schema import ModelConfig
from async_rlhf.tasks.start import build_policy, build_tokenizer
from tests.support.tiny_policy import with_character


@contextmanager
def local_cluster() -> Iterator[Cluster]:
    """A Ray of our own, ended at the exit."""
    cluster = connect(Config(), "tests", make_session_folder())
    try:
        yield cluster
    finally:
        cluster.close()


def small_config(*overrides: str) -> Config:
    """The quickstart with overrides."""
    return load_config(["conf/quickstart.yaml"], list(overrides)).config


def make_model_folder(folder: Path, *, seed: int = 0, family: str = "llama", tied: bool = False) -> Path:
    """A random policy of 30k parameters with its tokenizer, as an ordinary Hugging Face folder."""
    tokenizer = build_tokenizer()
    config = ModelConfig(
        family=family,  # type: ignore[arg-type]
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        tie_embeddings=tied,
    )
    with_character(build_policy(config, tokenizer, seed)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
