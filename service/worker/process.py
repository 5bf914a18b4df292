"""The worker process: an engine and the threads around it. The supervisor starts it with a socket."""

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
from service.engine.job import ModelKey
from service.engine.runner import Runner
from service.errors import DeviceLost
from service.model_paths import locate_all
from service.settings import SettingError, Settings, read_settings
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
    Withdraw,
)

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
FATAL_EXIT = 3  # exit code: the start failed, and would fail again
DEVICE_EXIT = 4  # exit code: the device fails at every call; it may work for another process


class Link:
    """The worker's end of the socket. send() may be called from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self.stream = connection.makefile("rb")

    def send(self, report: Report) -> None:
        """Send one message; exit if the socket is closed, because then the API process is gone."""
        data = protocol.encode(report)
        try:
            with self._lock:
                self._connection.sendall(data)
        except OSError:
            os._exit(0)


class HeartbeatThread(threading.Thread):
    """Sends a heartbeat every HEARTBEAT_SECONDS; without heartbeats the supervisor replaces the worker."""

    def __init__(self, link: Link) -> None:
        super().__init__(daemon=True)
        self.link = link
        self.ticks = 0  # of the engine
        self.busy = True  # whether the engine has jobs
        self.loading: Callable[[], bool] = lambda: (
            True
        )  # whether a model is being loaded, which may take long
        self.memory: Callable[[], int] = lambda: 0  # bytes of the device in use
        self.holds: Callable[[], tuple[ModelKey, ...]] = lambda: ()  # what is loaded

    def run(self) -> None:
        pause = threading.Event()
        while not pause.wait(HEARTBEAT_SECONDS):
            self.link.send(Heartbeat(self.ticks, self.busy, self.loading(), self.memory(), self.holds()))


def listen(link: Link, inbox: queue.SimpleQueue[Command]) -> None:
    """Put every command in the inbox; exit when the socket closes."""
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
        os._exit(0)  # not sys.exit(): the engine's thread may be inside a long call


def drain(inbox: queue.SimpleQueue[Command], engine: Engine) -> None:
    """Carry out every command in the inbox; if the engine has no jobs, wait for a command."""
    while not inbox.empty() or not engine.busy:
        match inbox.get():
            case Submit(job):
                engine.submit(job)
            case Cancel(job_id):
                engine.cancel(job_id)
            case Withdraw(job_id):
                engine.withdraw(job_id)
            case Interrupt(job_id):
                engine.interrupt(job_id)


def load(settings: Settings, link: Link, heartbeat: HeartbeatThread) -> Engine:
    """An engine with as many models loaded as fit in memory. Sends Ready, with the specs of all models.

    Raises CheckpointError or ValueError for a checkpoint, device or setting that cannot be used.
    """
    faults = read_faults(settings.faults)
    watch = Stopwatch()
    from service.device.loading import build  # imports torch, which takes seconds: heartbeats are sent by now

    watch.lap("imports")
    runner = build(settings, locate_all(settings.model, settings.allow_pickle), watch)
    runner.report_incident = link.send
    registry, memory = runner.registry, runner.memory
    heartbeat.loading, heartbeat.memory = (lambda: registry.loading), memory.used
    heartbeat.holds = registry.held
    link.send(
        Ready(
            tuple(registry.specs.values()),
            registry.held(),
            str(runner.device),
            memory.total(),
            tuple(watch.parts.items()),
        )
    )
    engine_runner: Runner = runner
    if faults:
        log.warning("failures are injected into this worker: %s", settings.faults)
        engine_runner = FaultyRunner(runner, faults)
    return Engine(engine_runner, link.send, settings.max_rows, settings.decode_chunk, time.monotonic)


def serve(inbox: queue.SimpleQueue[Command], engine: Engine, heartbeat: HeartbeatThread) -> None:
    """Run the engine for as long as the process lives."""
    while True:
        heartbeat.busy = engine.busy
        drain(inbox, engine)
        heartbeat.busy = True
        engine.tick()
        heartbeat.ticks += 1


def main() -> None:
    """Run the worker. Arguments: the number of the inherited socket, and the number of the replica."""
    # Terminals and some init systems signal every process, but only the API process decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = read_settings()
    logs.set_up(settings, replica=int(sys.argv[2]))
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    heartbeat = HeartbeatThread(link)
    heartbeat.start()
    threading.Thread(target=listen, args=(link, inbox), daemon=True).start()
    try:
        engine = load(settings, link, heartbeat)
    except (CheckpointError, ValueError) as error:
        link.send(Fatal(str(error), wrong_setting=isinstance(error, SettingError)))
        sys.exit(FATAL_EXIT)
    try:
        serve(inbox, engine, heartbeat)
    except DeviceLost:
        log.critical("the device is lost; the jobs run again in another worker", exc_info=True)
        os._exit(DEVICE_EXIT)  # not sys.exit(): the clean-up would wait for the device


if __name__ == "__main__":
    main()
