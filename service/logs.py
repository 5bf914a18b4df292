"""Logs: one JSON object a line, or plain text for a terminal; every line of a request has its id.

What a client wrote (prompts, paths, headers) is in no line above the debug level.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar

from service.settings import Settings

# Of the request that is being answered; what it starts (tasks, threads) inherits it.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

FIELDS = ("method", "route", "status", "seconds", "code", "job", "rows", "parts")  # of records that have them
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message, request_id, what FIELDS the record has, and its traceback."""

    converter = time.gmtime
    default_msec_format = "%s.%03dZ"
    default_time_format = "%Y-%m-%dT%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in ("request_id", *FIELDS) if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """For people: the request's id comes last."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        first, newline, rest = text.partition("\n")
        return f"{first} [{record.request_id}]{newline}{rest}" if hasattr(record, "request_id") else text


def identify(record: logging.LogRecord) -> bool:
    """A filter that adds the id of the request, where there is one."""
    if request_id.get():
        record.request_id = request_id.get()
    return True


def set_up(settings: Settings) -> None:
    """Send all logs of this process to stderr, as the settings say."""
    handler = logging.StreamHandler()
    handler.addFilter(identify)
    as_text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter(TEXT) if as_text else JsonFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # Libraries that tell addresses and paths of every request at the debug level.
    for name in ("httpx", "httpcore", "multipart", "PIL", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))
