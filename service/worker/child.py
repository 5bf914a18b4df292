"""A worker process from the API process's side: its start, its signs of life and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from service.settings import Settings, to_environment
from service.worker import protocol
from service.worker.oom_kills import count_oom_kills
from service.worker.protocol import Command, Heartbeat
from service.worker.quarantine import Cause

EXIT_SECONDS = 2.0  # between cutting a worker's connection and killing a worker that has not exited by then
# A worker may go without progress for this many stall limits while it loads a model, and without a message
# while it starts: imports from a slow disk let no other thread run.
LOADING_FACTOR = 10
# Signals that a process's own failure raises; any other signal was sent by somebody else.
CRASH_SIGNALS = (
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
)


class WorkerProcess:
    """One worker, from its start to its end.

    It counts as loading a model until become_ready(). clock: seconds, from any origin.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.process = process
        self.reader = reader
        self.writer = writer
        self.clock = clock
        self.started_at = self.last_message = self.last_progress = clock()
        self.ready_at: float | None = None
        self.stepped = False  # it has finished a UNet call
        self.had_jobs = False
        self._loading = True
        self._ticks = -1
        self._ended_by_us = False
        self._oom_kills = count_oom_kills()

    @property
    def is_ready(self) -> bool:
        return self.ready_at is not None

    @property
    def age(self) -> float:
        """Seconds since it became ready; 0 before."""
        return 0.0 if self.ready_at is None else self.clock() - self.ready_at

    @property
    def silence(self) -> float:
        """Seconds since its last message."""
        return self.clock() - self.last_message

    def send(self, command: Command) -> None:
        if not self.writer.is_closing():
            self.writer.write(protocol.encode(command))

    def become_ready(self) -> float:
        """Record that the worker takes jobs now; returns the seconds that its start took."""
        self.ready_at = self.last_progress = self.clock()
        self._loading = False
        return self.ready_at - self.started_at

    def beat(self, beat: Heartbeat) -> None:
        """Record a heartbeat. Progress: the engine has ticked, is idle, or has begun or ended loading."""
        if beat.ticks != self._ticks or not beat.busy or beat.loading != self._loading:
            self.last_progress = self.clock()
        self._ticks, self._loading = beat.ticks, beat.loading
        self._oom_kills = count_oom_kills()

    def is_stalled(self, limit: float) -> bool:
        """Whether the worker sent no message, or was busy without progress, for longer than the limit."""
        patience = limit * (LOADING_FACTOR if self._loading else 1)
        return self.is_silent(limit) or self.clock() - self.last_progress > patience

    def is_silent(self, limit: float) -> bool:
        """Whether it sent no message for longer than the limit."""
        return self.silence > limit * (1 if self.is_ready else LOADING_FACTOR)

    def kill(self) -> None:
        """Kill the worker and cut the connection at once, also if the process takes time to end."""
        self._ended_by_us = True
        self.process.kill()
        self.writer.transport.abort()

    def cause_of_end(self) -> Cause:
        """Why the worker has ended: see quarantine.py. Only for a worker that has."""
        code = self.process.returncode
        ended_itself = code is None or code >= 0 or -code in CRASH_SIGNALS
        oom_killed = (count_oom_kills() or 0) > (self._oom_kills or 0)
        return "crash" if self._ended_by_us or ended_itself or oom_killed else "kill"

    async def end(self) -> None:
        """Cut the connection, at which the worker exits, and kill it if it does not exit soon.

        If the process survives even that, nothing more is done.
        """
        self.writer.transport.abort()  # close() would wait until a hanging worker has read everything
        try:
            if not await self._exits():
                self.kill()
                await self._exits()
        except asyncio.CancelledError:
            self.process.kill()
            raise

    async def _exits(self) -> bool:
        """Whether the process exits within EXIT_SECONDS."""
        try:
            await asyncio.to_thread(self.process.wait, EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True


async def spawn(settings: Settings, replica: int) -> WorkerProcess:
    """Start a replica's worker at the other end of a new socket pair. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "service.worker.process", str(theirs.fileno()), str(replica)],
            pass_fds=[theirs.fileno()],
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # signals of a terminal go to the API process only
        )
    return WorkerProcess(process, *await asyncio.open_unix_connection(sock=ours))


def environment(settings: Settings) -> dict[str, str]:
    """The worker's environment: these settings, and the path of this package if it is not installed.

    Python runs with -P, so nothing is imported from the current directory.
    """
    home = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "")
    installed = map(os.path.realpath, (*site.getsitepackages(), site.getusersitepackages()))
    if home not in installed:
        path = home + (os.pathsep + path if path else "")
    return to_environment(settings, os.environ) | {"PYTHONPATH": path}
