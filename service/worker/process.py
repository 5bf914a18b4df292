"""The worker: a process of its own around an engine. Started by the supervisor with a socket's number."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from models.errors import CheckpointError
from models.stopwatch import Stopwatch
from service import logs
from service.engine.engine import Engine
from service.engine.runner import Runner
from service.errors import DeviceLost
from service.model_paths import locate_all
from service.settings import Settings, read_settings
from service.worker import protocol
from service.worker.faults import FaultyRunner, read_faults
from service.worker.protocol import (
    Cancel,
    Command,
    Fatal,
    Heartbeat,
    Interrupt,
    Ready,
    Rejected,
    Report,
    Submit,
    UnreadableMessageError,
)

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

    def send(self, report: Report) -> None:
        """Send one message; a closed socket ends the process, since nobody is left to work for."""
        data = protocol.encode(report)
        try:
            with self._lock:
                self._connection.sendall(data)
        except OSError:
            os._exit(0)


class HeartbeatThread(threading.Thread):
    """Tells the supervisor every BEAT_SECONDS how often the loop has turned, so that it notices a stall."""

    def __init__(self, link: Link) -> None:
        super().__init__(daemon=True)
        self.link = link
        self.ticks = 0
        self.busy = True
        self.loading: Callable[[], bool] = lambda: True  # a model, for which a stall has more time
        self.memory: Callable[[], int] = lambda: 0  # bytes of the device that are in use

    def run(self) -> None:
        pause = threading.Event()
        while not pause.wait(BEAT_SECONDS):
            self.link.send(Heartbeat(self.ticks, self.busy, self.loading(), self.memory()))


def listen(link: Link, inbox: queue.SimpleQueue[Command]) -> None:
    """Put every command in the inbox; end the process with the socket."""
    try:
        while (frame := protocol.read_frame(link.stream)) is not None:
            try:
                inbox.put(protocol.decode_command(frame))
            except UnreadableMessageError as error:
                log.error("%s", error)
                link.send(Rejected(error.job, str(error)))
    except ConnectionError:
        log.debug("the API process is gone", exc_info=True)
    finally:
        os._exit(0)  # not sys.exit: the engine's thread may be inside a long call


def drain(inbox: queue.SimpleQueue[Command], engine: Engine) -> None:
    """Carry out every command in the inbox; wait for one while there is nothing else to do."""
    while not inbox.empty() or not engine.busy:
        match inbox.get():
            case Submit(job):
                engine.submit(job)
            case Cancel(job_id):
                engine.cancel(job_id)
            case Interrupt(job_id):
                engine.interrupt(job_id)


def load(settings: Settings, link: Link, beat: HeartbeatThread) -> Engine:
    """The engine with as many models loaded as fit, after saying what all are.

    Raises CheckpointError or ValueError for a checkpoint, device or setting that another try does not change.
    """
    watch = Stopwatch()
    from service.device.loading import build  # torch: seconds, during which the beat goes on

    watch.lap("imports")
    runner = build(settings, locate_all(settings.model, settings.allow_pickle), watch)
    runner.note = link.send
    registry, memory = runner.registry, runner.memory
    beat.loading, beat.memory = (lambda: registry.loading), memory.used
    engine_runner: Runner = runner
    if faults := read_faults(settings.faults):
        log.warning("this worker fails on request: %s", settings.faults)
        engine_runner = FaultyRunner(runner, faults)
    link.send(Ready(tuple(registry.specs.values()), memory.total(), tuple(watch.parts.items())))
    return Engine(engine_runner, link.send, settings.max_rows, settings.decode_chunk, time.monotonic)


def serve(inbox: queue.SimpleQueue[Command], engine: Engine, beat: HeartbeatThread) -> None:
    """Turn until the socket closes."""
    while True:
        beat.busy = engine.busy
        drain(inbox, engine)
        beat.busy = True
        engine.tick()
        beat.ticks += 1


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
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    beat = HeartbeatThread(link)
    beat.start()
    threading.Thread(target=listen, args=(link, inbox), daemon=True).start()
    try:
        engine = load(settings, link, beat)
    except (CheckpointError, ValueError) as error:
        link.send(Fatal(str(error)))
        sys.exit(FATAL_EXIT)
    try:
        serve(inbox, engine, beat)
    except DeviceLost:
        log.critical("the device is lost; another worker must run the jobs", exc_info=True)
        os._exit(DEVICE_EXIT)  # not sys.exit: what is torn down would wait for the device


if __name__ == "__main__":
    main()
