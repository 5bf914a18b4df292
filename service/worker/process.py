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
from concurrent.futures import ThreadPoolExecutor

from models.errors import CheckpointError
from models.stopwatch import Stopwatch
from service import logs
from service.catalogue import Catalogue, Folders
from service.device.contents import Contents
from service.engine.engine import Engine
from service.engine.events import LoadedModels
from service.engine.graph_counts import GraphCounts
from service.engine.job import ModelKey
from service.engine.runner import Runner
from service.errors import CaptureFailed, DeviceLost
from service.settings import SettingError, Settings, read_settings
from service.worker import protocol
from service.worker.faults import Fault, FaultyRunner, read_faults
from service.worker.protocol import (
    CAPTURE_EXIT,
    DEVICE_EXIT,
    FATAL_EXIT,
    Cancel,
    Command,
    Fatal,
    Heartbeat,
    Interrupt,
    Offer,
    Ready,
    Rejected,
    Report,
    SetLoaded,
    Submit,
    UnreadableMessageError,
    Withdraw,
)

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5


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
        self.graphs: Callable[[], GraphCounts] = GraphCounts
        self.holds: Callable[[], tuple[ModelKey, ...]] = lambda: ()  # what is loaded

    def run(self) -> None:
        pause = threading.Event()
        while not pause.wait(HEARTBEAT_SECONDS):
            self.link.send(
                Heartbeat(self.ticks, self.busy, self.loading(), self.memory(), self.holds(), self.graphs())
            )


def listen(link: Link, inbox: queue.SimpleQueue[Command | Contents]) -> None:
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


def drain(inbox: queue.SimpleQueue[Command | Contents], engine: Engine, link: Link, reader: Reader) -> None:
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
            case SetLoaded(call, model, load):
                engine.set_loaded(call, model, load)
            case Catalogue() as catalogue:
                reader.read(catalogue)
            case Contents() as contents:
                engine.install(contents)
                link.send(offer(contents))


class Reader:
    """Reads catalogues one after the other in a thread, which puts the contents in the inbox.

    Running jobs do not wait for the files.
    """

    def __init__(
        self, read: Callable[[Catalogue], Contents], inbox: queue.SimpleQueue[Command | Contents]
    ) -> None:
        self._read = read
        self._inbox = inbox
        self._pool = ThreadPoolExecutor(1)

    def read(self, catalogue: Catalogue) -> None:
        self._pool.submit(self._read_now, catalogue)

    def _read_now(self, catalogue: Catalogue) -> None:
        try:
            self._inbox.put(self._read(catalogue))
        except Exception:
            log.exception("the folders of models could not be read")


def offer(contents: Contents) -> Offer:
    return Offer(contents.number, tuple(contents.specs.values()), contents.ignored)


def can_strike(fault: Fault, settings: Settings) -> bool:
    """Whether the fault can happen in a worker with these settings."""
    return not (fault.kind == "capture" and settings.no_graphs)


def load(
    settings: Settings, link: Link, heartbeat: HeartbeatThread, inbox: queue.SimpleQueue[Command | Contents]
) -> tuple[Engine, Reader]:
    """An engine with as many models loaded as fit in memory. Waits for the catalogue; sends Offer and Ready.

    Raises CheckpointError or ValueError for a checkpoint, device or setting that cannot be used.
    """
    faults = tuple(each for each in read_faults(settings.faults) if can_strike(each, settings))
    catalogue = inbox.get()
    assert isinstance(catalogue, Catalogue)
    watch = Stopwatch()
    from service.device.loading import build  # imports torch, which takes seconds: heartbeats are sent by now

    watch.lap("imports")
    runner = build(settings, Folders(settings).models, watch, catalogue)
    runner.workspace.report_incident = link.send
    registry, memory = runner.registry, runner.workspace.memory
    heartbeat.loading, heartbeat.memory = (lambda: registry.loading), memory.used
    heartbeat.holds, heartbeat.graphs = registry.held, lambda: runner.workspace.graphs.counts
    registry.on_change = lambda: link.send(LoadedModels(runner.loaded_models()))
    registry.on_change()
    link.send(offer(registry.contents))
    link.send(Ready(registry.held(), str(runner.device), memory.total(), tuple(watch.parts.items())))
    engine_runner: Runner = runner
    if faults:
        log.warning("failures are injected into this worker: %s", settings.faults)
        engine_runner = FaultyRunner(runner, faults)
    engine = Engine(engine_runner, link.send, settings.max_rows, settings.decode_chunk, time.monotonic)
    return engine, Reader(runner.read, inbox)


def serve(
    inbox: queue.SimpleQueue[Command | Contents],
    engine: Engine,
    link: Link,
    reader: Reader,
    heartbeat: HeartbeatThread,
) -> None:
    """Run the engine for as long as the process lives."""
    while True:
        heartbeat.busy = engine.busy
        drain(inbox, engine, link, reader)
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
    inbox: queue.SimpleQueue[Command | Contents] = queue.SimpleQueue()
    heartbeat = HeartbeatThread(link)
    heartbeat.start()
    threading.Thread(target=listen, args=(link, inbox), daemon=True).start()
    try:
        engine, reader = load(settings, link, heartbeat, inbox)
    except (CheckpointError, ValueError) as error:
        link.send(Fatal(str(error), wrong_setting=isinstance(error, SettingError)))
        sys.exit(FATAL_EXIT)
    try:
        serve(inbox, engine, link, reader, heartbeat)
    except CaptureFailed:
        log.critical("a CUDA graph could not be recorded; the jobs run again without graphs", exc_info=True)
        os._exit(CAPTURE_EXIT)
    except DeviceLost:
        log.critical("the device is lost; the jobs run again in another worker", exc_info=True)
        os._exit(DEVICE_EXIT)  # not sys.exit(): the clean-up would wait for the device


if __name__ == "__main__":
    main()
