"""A model by name: folders stay folders, hub ids become the folder that the hub's cache has."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from async_rlhf.errors import ConfigError
from async_rlhf.hub import model_folder, with_local_models
from tests.support.settings import load

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds owner/tiny, main and the branch `other`, on a machine without network."""
    of_model = tmp_path / "hub" / "models--owner--tiny"
    for revision, commit in (("main", COMMIT), ("other", COMMIT[::-1])):
        (of_model / "snapshots" / commit).mkdir(parents=True)
        (of_model / "snapshots" / commit / "config.json").write_text("{}")
        (of_model / "refs").mkdir(exist_ok=True)
        (of_model / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return of_model


def test_folder_is_taken_as_it_is_and_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)

    assert model_folder("model.path", "owner/tiny") == tmp_path / "owner" / "tiny"
    assert model_folder("model.path", "no such folder") == tmp_path / "no such folder"


@pytest.mark.parametrize(("path", "commit"), [("owner/tiny", COMMIT), ("owner/tiny@other", COMMIT[::-1])])
def test_hub_id_is_found_in_the_cache_at_its_revision(cache: Path, path: str, commit: str) -> None:
    assert model_folder("model.path", path) == cache / "snapshots" / commit


def test_hub_id_that_cannot_be_had_is_refused_with_the_key_and_the_way_out(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.path owner/big is no folder here.*HF_HUB_OFFLINE.*`hf download owner/big`"):
        model_folder("model.path", "owner/big")


def test_every_model_of_a_config_becomes_a_folder(cache: Path) -> None:
    named = "owner/tiny@other"
    config = load(
        *(f"{key}={named}" for key in ("model.path", "algorithm.ppo.critic.path", "reward_model.path", "evaluation.against")),
        "evaluation.winrate=reward",
        *("algorithm=ppo", "reward.parts.rm.kind=model", f"reward.parts.rm.path={named}", "reward.parts.own.function=a:b"),
    )

    local = with_local_models(config)

    folder = str(cache / "snapshots" / COMMIT[::-1])
    assert local.model.path == local.algorithm.ppo.critic.path == local.reward_model.path == local.evaluation.against == folder
    assert {name: part.path for name, part in local.reward.parts.items()} == {"rm": folder, "own": ""}
