"""The worker: a process of its own around an engine. Started by the supervisor with a socket's number."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from models.formats.diffusers_read import CheckpointError
from models.stopwatch import Stopwatch
from service import logs
from service.device.registry import locate_all
from service.engine.engine import Engine
from service.engine.job import Done, Event, Job, Previewed
from service.errors import DeviceLost
from service.settings import Settings, read_settings
from service.worker import protocol
from service.worker.faults import FaultyRunner

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
DEVICE_EXIT = 4  # the device fails at everything; another process may find it well
FATAL_EXIT = 3  # loading failed for a reason that another try does not change


class Link:
    """The worker's end of the socket; send() may be called from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self.stream = connection.makefile("rb")

    def send(self, header: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> None:
        """Send one message; a closed socket ends the process, since nobody is left to work for."""
        try:
            with self._lock:
                self._connection.sendall(protocol.pack(header, blobs))
        except OSError:
            os._exit(0)

    def emit(self, event: Event) -> None:
        """Send an engine's event."""
        header = {"kind": type(event).__name__} | asdict(event)
        self.send(header, blobs_of(event, header))


def blobs_of(event: Event, header: dict[str, Any]) -> tuple[bytes, ...]:
    """What goes beside the header, taken out of it."""
    if isinstance(event, Done):
        return header.pop("pictures")
    return (header.pop("pixels"),) if isinstance(event, Previewed) else ()


class Beat(threading.Thread):
    """Tells the supervisor every BEAT_SECONDS how often the loop has turned, so that it notices a stall."""

    def __init__(self, link: Link) -> None:
        super().__init__(daemon=True)
        self.link = link
        self.turns = 0
        self.busy = True
        self.loading: Callable[[], bool] = lambda: True  # a model, for which a stall has more time
        self.memory: Callable[[], int] = lambda: 0  # bytes of the device that are in use

    def run(self) -> None:
        pause = threading.Event()
        while not pause.wait(BEAT_SECONDS):
            beat = {"turns": self.turns, "busy": self.busy, "loading": self.loading()}
            beat["memory"] = self.memory()
            self.link.send({"kind": "Beat"} | beat)


def listen(link: Link, inbox: queue.SimpleQueue) -> None:
    """Put every message in the inbox; exit with the socket."""
    try:
        while (message := protocol.read(link.stream)) is not None:
            inbox.put(message)
    except ConnectionError:
        log.debug("the other end is gone")  # in the middle of what we sent it
    except Exception:  # nobody is heard from here on, so another worker must start
        log.exception("the messages cannot be read")
    finally:
        os._exit(0)  # not sys.exit: the engine's thread may be inside a long call


def drain(inbox: queue.SimpleQueue, engine: Engine) -> None:
    """Take everything from the inbox; wait for something while there is nothing else to do."""
    while not inbox.empty() or not engine.busy:
        header, blobs = inbox.get()
        if header["kind"] == "Submit":
            engine.submit(Job.from_message(header["job"], blobs))
        elif header["kind"] == "Cancel":
            engine.cancel(header["job"])


def load(settings: Settings, link: Link, beat: Beat) -> Engine:
    """The engine with as many models loaded as fit, after saying what all are.

    Raises CheckpointError or ValueError for a checkpoint, device or setting that another try does not change.
    """
    watch = Stopwatch()
    from service.device.runner import build  # torch: seconds, during which the beat goes on

    watch.lap("imports")
    runner = build(settings, locate_all(settings.model, settings.allow_pickle), watch)
    runner.note = link.emit
    registry, memory = runner.registry, runner.memory
    beat.loading, beat.memory = (lambda: registry.loading), memory.used
    if settings.faults:
        log.warning("this worker breaks on request: %s", ",".join(map(str, settings.faults)))
        runner = FaultyRunner(runner, settings.faults)
    link.send(
        {
            "kind": "Ready",
            "specs": [spec.to_dict() for spec in runner.specs.values()],
            "memory": memory.total(),
            "parts": watch.parts,
        }
    )
    return Engine(runner, link.emit, settings.max_rows, settings.decode_chunk)


def serve(inbox: queue.SimpleQueue, engine: Engine, beat: Beat) -> None:
    """Turn until the socket closes."""
    while True:
        beat.busy = engine.busy
        drain(inbox, engine)
        beat.busy = True
        engine.tick()
        beat.turns += 1


def main() -> None:
    """The process: argv is the number of the inherited socket."""
    for wish in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a terminal and some init systems send them to every process
        signal.signal(wish, signal.SIG_IGN)  # the API process drains, and its end is ours
    settings = read_settings()
    logs.set_up(settings)
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    beat = Beat(link)
    beat.start()
    threading.Thread(target=listen, args=(link, inbox), daemon=True).start()
    try:
        engine = load(settings, link, beat)
    except (CheckpointError, ValueError) as error:
        link.send({"kind": "Fatal", "message": str(error)})
        sys.exit(FATAL_EXIT)
    try:
        serve(inbox, engine, beat)
    except DeviceLost:
        log.critical("the device is lost; another worker must run the jobs", exc_info=True)
        os._exit(DEVICE_EXIT)  # not sys.exit: what is torn down would wait for the device


if __name__ == "__main__":
    main()
