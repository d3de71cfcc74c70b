"""`async-rlhf dashboard`: a live page about runs, for a browser on this machine."""

import socket
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from async_rlhf.commands.say import say
from async_rlhf.dashboard.catalogue import Catalogue
from async_rlhf.dashboard.folder import is_run
from async_rlhf.errors import ConfigError

ROOT = Path("runs")
"""Where runs are looked for when none is named: `train` puts them there."""
HOST = "127.0.0.1"


def run_dashboard(folders: Sequence[Path], port: int, console: Console, *, open_browser: bool) -> None:
    """Serve until Ctrl-C.

    Args:
        folders: of runs; none: those under ./runs, and the newest living one is followed.
        port: 0: any free one.
    Raises:
        ConfigError: a folder holds no run, or the port is taken.
    """
    for folder in folders:
        if not is_run(folder):
            raise ConfigError(f"{folder} is no run folder: it has no config.yaml of a run; give the folder that `train` printed")
    with _listen(port) as listening:
        import uvicorn

        from async_rlhf.dashboard.server import make_app

        address = f"http://{HOST}:{listening.getsockname()[1]}/"
        what = ", ".join(folder.resolve().name for folder in folders) or f"the runs in {ROOT.resolve()}"
        say(console, f"{what}: {address} (Ctrl-C ends it)")
        settings = uvicorn.Config(
            make_app(Catalogue(folders, ROOT)), log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
        )
        if open_browser:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listening])


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {HOST} port {port}: {error}; choose another --port, or leave it out for a free one") from error
