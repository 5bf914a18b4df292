"""Logs: one JSON object on each line, or text on a terminal. Lines about a request contain its id.

Text from clients (prompts, paths, headers) is logged at the debug level only.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from functools import partial

from service.settings import Settings

# The id of the current request; tasks and threads that it starts inherit it.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)  # if the request has one

# Attributes of a log record that become fields of its line.
FIELDS = ("method", "route", "status", "seconds", "code", "job", "replica", "rows", "parts")
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """A JSON object: time (UTC), level, logger, message, request_id, trace_id, any of FIELDS, traceback."""

    converter = staticmethod(time.gmtime)
    default_msec_format = "%s.%03dZ"
    default_time_format = "%Y-%m-%dT%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {
            name: getattr(record, name)
            for name in ("request_id", "trace_id", *FIELDS)
            if hasattr(record, name)
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Text for a terminal, with the numbers of the replica and the request at the end of the first line."""

    def format(self, record: logging.LogRecord) -> str:
        first, newline, rest = super().format(record).partition("\n")
        if hasattr(record, "replica"):
            first += f" [replica {record.replica}]"
        if hasattr(record, "request_id"):
            first += f" [{record.request_id}]"
        return first + newline + rest


def identify(record: logging.LogRecord) -> bool:
    """A logging filter that adds the ids of the current request and its trace, if any."""
    if request_id.get():
        record.request_id = request_id.get()
    if trace_id.get():
        record.trace_id = trace_id.get()
    return True


def name_replica(replica: int, record: logging.LogRecord) -> bool:
    """A logging filter that adds the number of this worker's replica."""
    record.replica = replica
    return True


def set_up(settings: Settings, replica: int | None = None) -> None:
    """Send all logs of this process to stderr, with the format and the lowest level of the settings.

    replica: number of the replica whose worker this process is, for every line.
    """
    handler = logging.StreamHandler()
    handler.addFilter(identify)
    if replica is not None:
        handler.addFilter(partial(name_replica, replica))
    as_text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter(TEXT) if as_text else JsonFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # These libraries log the address and path of every request at the debug level.
    for name in ("httpx", "httpcore", "multipart", "PIL", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))
