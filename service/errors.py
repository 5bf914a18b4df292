"""What can go wrong with a request, and the one table to HTTP statuses.

ServiceError
├── InvalidRequest          the body says something that cannot be done
│   ├── BadRequest          ... to an API that calls that a 400
│   ├── UnreadableBody      ... is no JSON at all
│   └── UnsupportedMedia    ... is sent as something else than JSON
├── Unauthorized            the request has no API key, or none of ours
├── NotAcceptable           no answer the client accepts fits the request
├── NotFound                no such model, page or job
├── MethodNotAllowed
├── TooLarge                the body passes its limit
├── Stalled                 the rest of the body does not come
├── QueueFull               every place is taken
├── Unavailable
│   ├── Loading             no model is ready yet
│   └── Draining            the service is about to stop
├── DeadlineExceeded        the request's time is up
├── ClientGone              nobody waits for the answer
├── OutOfMemory             the job does not fit in memory, even alone
└── JobFailed               the job, and only it, could not be made
    ├── NonFinite           its picture holds numbers that are none
    └── WorkerLost          it took the worker down with it
"""

# ruff: noqa: N818 - named after what happened, as HTTP names it
from __future__ import annotations


class ServiceError(Exception):
    """Anything that has an answer in the error body of its own.

    param: the field at fault, if one is; retry_after: seconds after which trying again makes sense.
    """

    default = "the service failed"

    def __init__(
        self, message: str = "", *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message or self.default)
        self.param = param
        self.retry_after = retry_after

    @property
    def message(self) -> str:
        return str(self.args[0])

    def within(self, field: str) -> ServiceError:
        """The same of a request that came as a field of another; one that names no field stays as it is."""
        if self.param is None:
            return self
        named = f"{field}.{self.message}" if self.message.startswith(self.param) else self.message
        return type(self)(named, param=f"{field}.{self.param}", retry_after=self.retry_after)


class InvalidRequest(ServiceError):
    default = "the request is invalid"


class BadRequest(InvalidRequest):
    pass


class UnreadableBody(InvalidRequest):
    default = "the body must be a JSON object in UTF-8"


class UnsupportedMedia(InvalidRequest):
    default = "the body must be sent with content-type application/json"


class Unauthorized(ServiceError):
    default = "an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY"


class NotAcceptable(ServiceError):
    default = "the Accept header fits no answer to this request"


class NotFound(ServiceError):
    default = "there is nothing here"


class MethodNotAllowed(ServiceError):
    default = "this address does not take that method"


class TooLarge(ServiceError):
    default = "the body is too large"


class Stalled(ServiceError):
    default = "the rest of the body did not come"


class QueueFull(ServiceError):
    default = "the queue is full; try again later"


class Unavailable(ServiceError):
    default = "the service is not available"


class Loading(Unavailable):
    default = "the model is still loading; try again soon"


class Draining(Unavailable):
    default = "the service is about to stop"


class DeadlineExceeded(ServiceError):
    default = "the request's time is up"


class ClientGone(ServiceError):
    default = "the client has left"


class OutOfMemory(ServiceError):
    default = "the request does not fit in memory"


class JobFailed(ServiceError):
    default = "the picture could not be made"


class NonFinite(JobFailed):
    default = "the model made numbers that are no picture"


class WorkerLost(JobFailed):
    default = "the worker died each time that it ran this request"


class DeviceLost(BaseException):
    """The device fails at everything from now on, whichever job asks; the process must end, and no handler
    of what a job does wrong may keep it: no ServiceError, and no Exception."""


# Exception -> (HTTP status, "type" of the error body, "code" of the error body).
TABLE: dict[type[ServiceError], tuple[int, str, str]] = {
    InvalidRequest: (422, "invalid_request_error", "invalid_value"),
    BadRequest: (400, "invalid_request_error", "invalid_request"),
    UnreadableBody: (400, "invalid_request_error", "unreadable_body"),
    UnsupportedMedia: (415, "invalid_request_error", "unsupported_media_type"),
    Unauthorized: (401, "authentication_error", "invalid_api_key"),
    NotAcceptable: (406, "invalid_request_error", "not_acceptable"),
    NotFound: (404, "not_found_error", "not_found"),
    MethodNotAllowed: (405, "invalid_request_error", "method_not_allowed"),
    TooLarge: (413, "invalid_request_error", "too_large"),
    Stalled: (408, "timeout_error", "request_timeout"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    Loading: (503, "unavailable_error", "loading"),
    Draining: (503, "unavailable_error", "draining"),
    Unavailable: (503, "unavailable_error", "unavailable"),
    DeadlineExceeded: (504, "timeout_error", "deadline_exceeded"),
    ClientGone: (499, "cancelled_error", "cancelled"),
    OutOfMemory: (507, "resource_error", "out_of_memory"),
    NonFinite: (500, "server_error", "non_finite"),
    WorkerLost: (500, "server_error", "worker_lost"),
    JobFailed: (500, "server_error", "job_failed"),
    ServiceError: (500, "server_error", "internal"),
}

BY_CODE = {code: kind for kind, (_, _, code) in TABLE.items()}


def status_of(error: ServiceError) -> int:
    """HTTP status of an error."""
    return TABLE[type(error)][0]


def code_of(error: BaseException) -> str:
    """The code that stands for an error in the body and in messages between processes."""
    if isinstance(error, ServiceError):
        return TABLE[type(error)][2]
    return TABLE[JobFailed][2]


def from_code(code: str) -> ServiceError:
    """The inverse of code_of, with the fixed message of its kind."""
    return BY_CODE.get(code, JobFailed)()


def to_body(error: ServiceError, request_id: str) -> dict[str, dict[str, str | None]]:
    """The wire body of an error."""
    _, kind, code = TABLE[type(error)]
    return {
        "error": {
            "type": kind,
            "message": error.message,
            "param": error.param,
            "code": code,
            "request_id": request_id,
        }
    }
