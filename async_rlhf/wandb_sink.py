"""Rows and incidents for Weights & Biases: handed to a writer process, never waited for but at the end, and there not for long."""

import importlib.util
import json
import logging
import netrc
import os
import queue
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from async_rlhf.config import Config, to_yaml
from async_rlhf.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_QUEUED = 10_000
"""Lines that wait for a writer that is stuck; later ones are dropped, and counted."""
TOLD = ("event", "name", "time")
"""Of an incident."""


def check_wandb(config: Config) -> None:
    """Raise ConfigError where Weights & Biases is asked for and cannot be had."""
    mode = config.run.wandb.mode
    if mode == "off":
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"run.wandb.mode is {mode}, but the package wandb is missing: pip install 'async-rlhf[wandb]', or set it to off")
    if mode == "online" and not _has_login():
        raise ConfigError("run.wandb.mode is online, but there is no login: run `wandb login`, set WANDB_API_KEY, or use offline")


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    return False


class WandbSink:
    """See recorder.Sink. The same run folder is the same W&B run, whoever resumes it."""

    def __init__(self, folder: Path, config: Config) -> None:
        """
        Args:
            config: without secrets.
        """
        settings, self._folder = config.run.wandb, folder / "wandb"
        self._folder.mkdir(exist_ok=True)
        run_id = self._run_id()
        self._close_s = settings.close_s
        self._num_dropped = 0
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_QUEUED)
        with (self._folder / "writer.log").open("a") as log:
            # In a session of its own: Ctrl-C in a terminal is the run's.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "async_rlhf.wandb_writer"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[:1], os.environ.get("PYTHONPATH", "")])},
                text=True,
            )
        self._thread = threading.Thread(target=self._write, name="wandb", daemon=True)
        self._thread.start()
        self._put(
            {
                "id": run_id,
                "name": folder.name,
                "project": settings.project,
                "entity": settings.entity,
                "mode": settings.mode,
                "folder": str(folder),
                "config": yaml.safe_load(to_yaml(config)),
            }
        )

    def update(self, row: Mapping[str, Any]) -> None:
        """An update's row."""
        self._put({"row": dict(row)})

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Its numbers."""
        self._put({"row": {key: value for key, value in row.items() if "/" in key or key == "version"}})

    def incident(self, entry: Mapping[str, Any]) -> None:
        """The newest one, and their number, in the run's summary. Causes stay here: they may name machines and paths, or quote a reward."""
        self._put({"incident": {key: entry[key] for key in TOLD if key in entry}})

    def cut_after(self, version: int) -> None:
        """What is there cannot be taken back: the versions come once more, and a chart by version shows both."""

    def close(self) -> None:
        """Give the writer its time, and end it."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        try:
            code = self._process.wait(self._close_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code or self._num_dropped:
            logger.warning(
                "Weights & Biases did not take everything (exit code %s, %s rows dropped): see %s; `wandb sync` sends what is there",
                code,
                self._num_dropped,
                self._folder,
            )

    def _put(self, entry: Mapping[str, Any]) -> None:
        try:
            self._lines.put_nowait(json.dumps(entry))
        except queue.Full:
            self._num_dropped += 1

    def _write(self) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stream:
                while (line := self._lines.get()) is not None:
                    stream.write(line + "\n")
                    stream.flush()
        except OSError:  # the writer is gone; close() says so
            return

    def _run_id(self) -> str:
        file = self._folder / "run-id"
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()
