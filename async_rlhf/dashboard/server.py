"""The page over HTTP, for this machine alone: it reads run folders and changes nothing.

Only requests that name this machine as their host are answered (a web page that was led here under a name of its own is not), only GET
and HEAD, and the page may load nothing from elsewhere. Runs are named by the catalogue, files of the page by the package: no address
is ever made into a path.
"""

import json
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from importlib.resources import files
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from async_rlhf.dashboard import views
from async_rlhf.dashboard.catalogue import Catalogue
from async_rlhf.dashboard.comparison import MAX_COMPARED, compare
from async_rlhf.dashboard.folder import RunFolder
from async_rlhf.rewards.client import is_loopback
from async_rlhf.rewards.server import host_name

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

KINDS = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def page_files() -> dict[str, bytes]:
    """The files of the page by name, from the package."""
    found = files("async_rlhf.dashboard").joinpath("static").iterdir()
    return {file.name: file.read_bytes() for file in found if file.name.rpartition(".")[2] in KINDS}


def make_app(catalogue: Catalogue) -> "LocalOnly":
    """The page and its JSON."""
    static = page_files()

    def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in static:
            raise HTTPException(404)
        return Response(static[name], media_type=KINDS[name.rpartition(".")[2]])

    def runs(_: Request) -> Response:
        with catalogue.listed() as found:
            listed = [{"name": name, **views.entry(run)} for name, run in found.items()]
        return _json({"follows": catalogue.follows, "runs": listed})

    def of_run(view: Callable[[RunFolder], views.View]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            with catalogue.opened(request.path_params["name"]) as run:
                if run is None:
                    raise HTTPException(404)
                return _json(view(run))

        return answer

    def compared(request: Request) -> Response:
        names = request.query_params.get("runs", "").split(",")[:MAX_COMPARED]
        with catalogue.all_opened(names) as found:
            return _json(compare(found))

    routes = [
        Route("/", page),
        Route("/static/{name}", page),
        Route("/api/runs", runs),
        Route("/api/runs/{name}", of_run(views.overview)),
        Route("/api/runs/{name}/curves", of_run(views.curves)),
        Route("/api/runs/{name}/samples", of_run(views.samples)),
        Route("/api/compare", compared),
    ]
    return LocalOnly(Starlette(routes=routes))


def _json(content: object) -> Response:
    # ASCII alone: a lone surrogate from a damaged file has no UTF-8.
    try:
        written = json.dumps(content, allow_nan=False)
    except ValueError:  # numbers of a damaged file, or a hostile one, whose sum or quotient is none
        written = json.dumps(_finite(content), allow_nan=False)
    return Response(written, media_type="application/json")


def _finite(content: object) -> object:
    """JSON has no infinity: None in its place, as where a value is absent."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in cast("Mapping[str, object]", content).items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in cast("Sequence[object]", content)]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class LocalOnly:
    """Stands before an app: answers to this machine's own names alone, and dresses each answer in HEADERS."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"host"]
        if len(hosts) != 1 or not is_loopback(host_name(hosts[0])):
            refusal = Response("this page answers to localhost and 127.0.0.1 alone\n", 403, media_type="text/plain")
            await refusal(scope, receive, dressed)
            return
        await self._app(scope, receive, dressed)
