"""``tinygpt serve`` and ``tinygpt dashboard``: what a browser, or a program, can ask for."""

from __future__ import annotations

import contextlib
import html
import os
import secrets
import shlex
import tempfile
import threading
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from tinygpt.cli.console import command, say
from tinygpt.cli.flags import Switch
from tinygpt.cli.loading import LoadingFlags, beginnings, load_model
from tinygpt.cli.newest import RUNS, run_or_newest
from tinygpt.cli.options import flags
from tinygpt.cli.signals import Words, run_signals
from tinygpt.errors import UsageError, extras
from tinygpt.files.strict_json import to_json
from tinygpt.runs.display.text import printable
from tinygpt.runs.folder import choose_checkpoint, last_change
from tinygpt.server.http.limits import Limits

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence

    from tinygpt.api import GPT
    from tinygpt.runs.run import TrainingRun
    from tinygpt.server.dashboard.board import Board
    from tinygpt.server.openai.service import Service
    from tinygpt.text.tokenizers import Tokenizer

    LimitFlags = dict[str, Any]
else:
    LimitFlags = flags(Limits, "Limits")

Names = Annotated[list[str], Parameter(negative=())]

API_KEY = "TINYGPT_API_KEY"
"""The environment variable that holds the key; unlike --api-key it is in no list of processes."""
SHORTEST_KEY = 12
MOST_PLACES = 256
WATCHING = Words("closing the dashboard", "what trains goes on")
WORDS = Words("finishing the answers that are being written", "their answers are cut short")


def serve(
    run: Path | None = None,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_host: Names | None = None,
    cors_origin: Names | None = None,
    no_token: Switch = False,
    model_name: str | None = None,
    strict_api: Switch = False,
    access_log: Switch = False,
    places: int = 16,
    limits: Annotated[LimitFlags | None, Parameter(name="*")] = None,
    loading: Annotated[LoadingFlags | None, Parameter(name="*")] = None,
    open: Switch = False,
) -> int:
    """Serve a model: a page to play with, and an API like OpenAI's.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint. [default: the newest
        run in runs/]
    host
        Where to listen. Any place but this machine itself needs a key.
    port
        Port to listen on; 0 takes a free one.
    api_key
        Key that clients must send. Better: set TINYGPT_API_KEY, which nobody else can see.
    allow_host
        Another name by which the server is called, such as that of a proxy; may be repeated.
    cors_origin
        Origin of pages that may use the server, such as http://localhost:3000; may be repeated.
    no_token
        Show how the model was trained, with samples, to everybody on this machine.
    model_name
        What clients call the model. [default: the name of the folder]
    strict_api
        Refuse fields of requests that are not known, instead of naming them in a header.
    access_log
        Print a line for each answer.
    places
        Texts that are written at once; others wait.
    limits
        Bounds on requests and connections, checked before anything is spent on them.
    open
        Open the page in a browser.
    """
    require_extra()
    run = run_or_newest(run)
    from tinygpt.server.http.listening import Server, listen, url

    key = _key(api_key, host, no_token, "serve", run)
    check_names(allow_host, cors_origin)
    if not 1 <= places <= MOST_PLACES:
        raise UsageError(f"--places {places} is out of range: it must be from 1 to {MOST_PLACES}.")
    bounds = Limits.from_dict(dict(limits or {}))
    if model_name is not None and not (model_name.strip() and printable(model_name) == model_name):
        raise UsageError("--model-name is what clients call the model: give it at least a letter.")
    with listen(host, port) as listener:
        model, own = load_model(run, **(loading or {}))
        service = _service(run, model, own, places, bounds)
        service.name, service.strict = model_name or service.name, strict_api
        from tinygpt.server.app import make_app

        board = None  # a checkpoint alone has none
        if last_change(run) is not None:
            board = _board([run], key, playground=True, is_open=no_token)
        app = make_app(
            service,
            board=board,
            log=say if access_log else None,
            api_key=key,
            hosts=allow_host or [],
            bound=host,
            cors=cors_origin or [],
        )
        server, address = Server(app, service.limits), url(listener, host)
        with run_signals(server.stop, None, say, WORDS) as received, service.engine:
            service.engine.warm_up()
            _introduce(service, address, key, board)
            with browser(address, board.key if board else key) if open else nullcontext():
                server.run([listener])
    return 128 + received[0] if received else 0


def dashboard(
    *runs: Path,
    host: str = "127.0.0.1",
    port: int = 8001,
    api_key: str | None = None,
    allow_host: Names | None = None,
    no_token: Switch = False,
    open: Switch = False,
) -> int:
    """Watch runs in the browser while they train.

    Only files are read: no model is loaded, and whatever trains is not slowed.

    Parameters
    ----------
    runs
        Run folders, or folders that hold some. [default: runs]
    host
        Where to listen. Any place but this machine itself needs a key that you set.
    port
        Port to listen on; if it is taken, one of the next.
    api_key
        Key that the page needs. Better: set TINYGPT_API_KEY. [default: another one every time]
    allow_host
        Another name by which the server is called, such as that of a proxy; may be repeated.
    no_token
        Show the runs, with samples, to everybody on this machine; saving and stopping need the key.
    open
        Open the page in a browser.
    """
    require_extra()
    from tinygpt.server.dashboard.board import make_app
    from tinygpt.server.http.listening import Server, url
    from tinygpt.server.http.thread import listen_nearby

    if not runs and not RUNS.is_dir():
        raise UsageError(f"There is no folder {RUNS} here. Say which runs to watch: their folders.")
    key = _key(api_key, host, no_token, "dashboard", *runs)
    check_names(allow_host)
    board = _board(runs or [RUNS], key, is_open=no_token)
    board.watch.refresh()
    with listen_nearby(host, port) as listener:
        app = make_app(board, hosts=allow_host or [], bound=host)
        server, address = Server(app, Limits(shutdown_seconds=1)), url(listener, host)
        with run_signals(server.stop, None, say, WATCHING) as received:
            _tell_address(listener, address, port, board, shown=key is None)
            say("Ctrl-C ends it; what trains goes on.")
            with browser(address, board.key) if open else nullcontext():
                server.run([listener])
    return 128 + received[0] if received else 0


def dashboard_listener(port: int) -> socket.socket:
    """A place for a dashboard, on this port or one of the next."""
    require_extra()
    from tinygpt.server.http.thread import listen_nearby

    return listen_nearby("127.0.0.1", port, "--dashboard-port")


@contextlib.contextmanager
def dashboard_beside(
    run: TrainingRun, listener: socket.socket, port: int, is_open: bool = False
) -> Iterator[Callable[[], bool]]:
    """The dashboard of a run that this process trains; yields what tells if it was stopped there.

    Runs in the usual folder are shown together, for comparison. ``port`` is the one asked for.
    """
    from tinygpt.server.dashboard.board import make_app
    from tinygpt.server.dashboard.steering import Here
    from tinygpt.server.http.listening import url
    from tinygpt.server.http.thread import ServerThread

    assert run.folder is not None
    others = [RUNS] if run.folder.absolute().parent == RUNS.absolute() else []
    here = Here(run.save_soon, run.stop)
    key = _key(None, "127.0.0.1", is_open, "train")
    board = _board([run.folder, *others], key, steering={run.folder: here}, is_open=is_open)
    with ServerThread(make_app(board), listener):
        address = url(listener, "127.0.0.1")
        _tell_address(listener, address, port, board, shown=key is None)
        yield lambda: here.stopped


def _tell_address(
    listener: socket.socket, address: str, port: int, board: Board, *, shown: bool
) -> None:
    """Where the dashboard is; a key that was made for it comes along, one that was given does not.

    What stands behind the # of an address stays in the browser.
    """
    if port not in (0, listener.getsockname()[1]):
        say(f"port {port} is taken")
    say(f"dashboard: {address}/" + (f"#key={board.key}" if shown else ""))
    use = "for saving and stopping" if board.is_open else "that the page needs"
    say(f"  key {use}: {board.key if shown else f'that of {API_KEY} or --api-key'}")


def require_extra() -> None:
    """Refuse to go on without the packages that a server needs."""
    extras.need("serve", "A server", "starlette", "uvicorn")


def _key(given: str | None, host: str, no_token: bool, *words: object) -> str | None:
    """The key that clients must send, which only a server for this machine can do without.

    ``no_token``: runs are shown without it. ``words`` are the command that an error repeats.
    """
    from tinygpt.server.http.security import is_loopback

    if no_token and not is_loopback(host):
        raise UsageError(
            f"--no-token is for this machine alone, and --host {host} can be reached from others."
        )
    key = given if given is not None else os.environ.get(API_KEY) or None
    if key is None:
        if is_loopback(host):
            return None
        raise UsageError(
            f"--host {host} can be reached from other machines, so it needs a key. For example:\n"
            f"  {API_KEY}={secrets.token_urlsafe(24)} {command(*words, '--host', host)}"
        )
    if len(key) < SHORTEST_KEY or not (key.isascii() and key.isprintable() and " " not in key):
        raise UsageError(
            f"The API key must have at least {SHORTEST_KEY} characters, all of them visible ASCII. "
            f"A good one: {secrets.token_urlsafe(24)}"
        )
    return key


def check_names(hosts: list[str] | None, origins: list[str] | None = None) -> None:
    """Refuse what is no host or origin before anything is loaded."""
    from tinygpt.server.http.security import allowed_host, allowed_origin

    for host in hosts or []:
        allowed_host(host)
    for origin in origins or []:
        allowed_origin(origin)


def _service(run: Path, model: GPT, own: Tokenizer, places: int, limits: Limits) -> Service:
    from tinygpt.server.engine.scheduler import Engine
    from tinygpt.server.openai.service import Service

    created = int(choose_checkpoint(run).stat().st_mtime)
    engine = Engine(model, own, places, limits.queue)
    service = Service(engine, model, own, _name(run), run, created, limits)
    service.beginnings = cache(partial(beginnings, run, model, own))
    return service


def _board(runs: Sequence[Path], key: str | None, **options: Any) -> Board:
    """The dashboard of runs."""
    from tinygpt.server.dashboard.board import Board
    from tinygpt.server.dashboard.watch import Watch

    return Board(Watch(runs), key, **options)


def _name(run: Path) -> str:
    """What clients call the model: the folder's name, and the checkpoint's if it was chosen."""
    path = run.resolve()
    name = path.name if path.is_dir() else f"{path.parent.name}-{path.stem}"
    return printable(name).replace("\n", " ") or "model"


def _introduce(service: Service, address: str, key: str | None, board: Board | None) -> None:
    """What there is, and a line to try it with."""
    body = to_json({"prompt": "The ", "max_tokens": 50})
    words = ["curl", f"{address}/v1/completions", "-H", "Content-Type: application/json"]
    line = f"{shlex.join(words)} -d {shlex.quote(body)}"
    if key is not None:
        line += f' -H "Authorization: Bearer ${API_KEY}"'
    say(f"serving {service.name} at {address}")
    say(f"  {line}")
    if board is not None:
        shown = f"#key={board.key}" if key is None else ""
        say(f"  how it was trained: {address}/dashboard{shown}")
    say("Ctrl-C ends it.")


@contextlib.contextmanager
def browser(address: str, key: str | None) -> Iterator[None]:
    """Open a page, with a key if it needs one, and clean up at the end.

    The key must not stand on the browser's command line, which everybody on the machine can read.
    So the browser is sent to a private file, which sends it on, as Jupyter does.
    """
    with contextlib.ExitStack() as stack:
        target = address
        if key is not None:
            with contextlib.suppress(OSError):  # a page without its key asks for it
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tinygpt-"))
                target = redirect_file(Path(folder), f"{address}/#key={key}").as_uri()
        _open_browser(target)
        yield


def redirect_file(folder: Path, target: str) -> Path:
    """A page in the folder, for the eyes of its owner alone, that leads to another one."""
    path = folder / "open.html"
    link = html.escape(target)
    page = (
        f'<!DOCTYPE html><meta charset="utf-8"><meta name="referrer" content="no-referrer">'
        f'<meta http-equiv="refresh" content="0; url={link}"><a href="{link}">Go on</a>\n'
    )
    owner_only = partial(os.open, mode=0o600)
    with open(path, "x", encoding="utf-8", opener=owner_only) as file:
        file.write(page)
    return path


def _open_browser(address: str) -> None:
    """A browser in the terminal, which would wait, does not keep the server."""
    import webbrowser

    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
