"""The errors of requests, and their HTTP statuses.

ServiceError
├── InvalidRequest          a field of the body has an invalid value
│   ├── BadRequest          the same, for APIs that answer 400 instead of 422
│   ├── UnreadableBody      the body is not JSON
│   └── UnsupportedMedia    the body has the wrong content type
├── Unauthorized            the API key is missing or unknown
├── Forbidden               the API key does not allow this call
├── NotAcceptable           the Accept header allows none of the possible types of the response
├── NotFound                unknown model, path or job
├── ModelInUse              the model cannot be unloaded while jobs use it
├── MethodNotAllowed        the path exists, but not for this method
├── TooLarge                the body exceeds its limit
├── HeadersTooLarge         the headers exceed their limit
├── Stalled                 the rest of the body did not arrive in time
├── QueueFull               too many open requests, or too many bytes of request bodies
├── RateLimited             the API key has used up one of its limits
├── Unavailable             no worker can be started, or the worker does not respond
│   ├── Loading             no model is loaded yet
│   ├── TooManyConnections  all connections wait for responses
│   └── Draining            the service is shutting down
├── DeadlineExceeded        the request's timeout has passed
├── ClientGone              the client closed the connection
├── OutOfMemory             the job does not fit in memory, even alone
└── JobFailed               this job failed; other jobs are not affected
    ├── ModelUnreadable     the model's file is missing or damaged
    ├── LoraUnreadable      the file of one of its LoRAs is missing or damaged
    ├── AdapterUnreadable   the file of a control or reference adapter is missing or damaged
    ├── NonFinite           the model produced NaN or Inf values, also in float32
    └── WorkerLost          the worker process crashed each time that it ran this job
"""

# ruff: noqa: N818 - the names have no suffix Error, like HTTP's reason phrases
from __future__ import annotations


class ServiceError(Exception):
    """An error with an HTTP status and an error body.

    `param`: the invalid field, if the error is about one; `retry_after`: seconds until a client should retry.
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
        """This error of a request that is nested in `field` of another one: its field is renamed."""
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
    default = "an API key is required: Authorization: Bearer KEY, or X-API-Key: KEY"


class Forbidden(ServiceError):
    default = "this call needs an admin key"


class NotAcceptable(ServiceError):
    default = "the Accept header allows none of the possible types of the response"


class NotFound(ServiceError):
    default = "not found"


class ModelInUse(ServiceError):
    default = "the model is in use; try again when its jobs have ended"


class MethodNotAllowed(ServiceError):
    default = "this path does not support this method"


class TooLarge(ServiceError):
    default = "the body is too large"


class HeadersTooLarge(ServiceError):
    default = "the headers are too large"


class Stalled(ServiceError):
    default = "the rest of the body did not arrive in time"


class QueueFull(ServiceError):
    default = "the queue is full; try again later"


class RateLimited(ServiceError):
    default = "this key has used up one of its limits; try again later"


class Unavailable(ServiceError):
    default = "the service is not available"


class Loading(Unavailable):
    default = "the model is still loading; try again later"


class TooManyConnections(Unavailable):
    default = "too many connections are open"


class Draining(Unavailable):
    default = "the service is shutting down"


class DeadlineExceeded(ServiceError):
    default = "the request's timeout has passed"


class ClientGone(ServiceError):
    default = "the client closed the connection"


class OutOfMemory(ServiceError):
    default = "the request does not fit in memory"


class JobFailed(ServiceError):
    default = "the image could not be generated"


class ModelUnreadable(JobFailed):
    default = "the model's file is missing or damaged"


class LoraUnreadable(JobFailed):
    default = "the file of one of the LoRAs is missing or damaged"


class AdapterUnreadable(JobFailed):
    default = "the file of a control or reference adapter is missing or damaged"


class NonFinite(JobFailed):
    default = "the model produced NaN or Inf values"


class WorkerLost(JobFailed):
    default = "the worker process crashed each time that it ran this request"


class DeviceLost(BaseException):
    """The device fails at every later call, of any job, so the worker process must end.

    A BaseException, so that no handler for the errors of jobs catches it.
    """


class CaptureFailed(DeviceLost):
    """The capture of a CUDA graph could not be ended, after which torch's allocator cannot be used."""


# Exception -> (HTTP status, "type" of the error body, "code" of the error body).
TABLE: dict[type[ServiceError], tuple[int, str, str]] = {
    InvalidRequest: (422, "invalid_request_error", "invalid_value"),
    BadRequest: (400, "invalid_request_error", "invalid_request"),
    UnreadableBody: (400, "invalid_request_error", "unreadable_body"),
    UnsupportedMedia: (415, "invalid_request_error", "unsupported_media_type"),
    Unauthorized: (401, "authentication_error", "invalid_api_key"),
    Forbidden: (403, "permission_error", "admin_key_required"),
    NotAcceptable: (406, "invalid_request_error", "not_acceptable"),
    NotFound: (404, "not_found_error", "not_found"),
    ModelInUse: (409, "conflict_error", "model_in_use"),
    MethodNotAllowed: (405, "invalid_request_error", "method_not_allowed"),
    TooLarge: (413, "invalid_request_error", "too_large"),
    HeadersTooLarge: (431, "invalid_request_error", "headers_too_large"),
    Stalled: (408, "timeout_error", "request_timeout"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    RateLimited: (429, "rate_limit_error", "rate_limit_exceeded"),
    Loading: (503, "unavailable_error", "loading"),
    TooManyConnections: (503, "unavailable_error", "too_many_connections"),
    Draining: (503, "unavailable_error", "draining"),
    Unavailable: (503, "unavailable_error", "unavailable"),
    DeadlineExceeded: (504, "timeout_error", "deadline_exceeded"),
    ClientGone: (499, "cancelled_error", "cancelled"),
    OutOfMemory: (507, "resource_error", "out_of_memory"),
    ModelUnreadable: (500, "server_error", "model_unreadable"),
    LoraUnreadable: (500, "server_error", "lora_unreadable"),
    AdapterUnreadable: (500, "server_error", "adapter_unreadable"),
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
    """The code of an error in error bodies and in messages between processes."""
    if isinstance(error, ServiceError):
        return TABLE[type(error)][2]
    return TABLE[JobFailed][2]


def from_code(code: str) -> ServiceError:
    """The inverse of code_of(), with the default message."""
    return BY_CODE.get(code, JobFailed)()


def to_body(error: ServiceError, request_id: str) -> dict[str, dict[str, str | None]]:
    """The JSON body of an error."""
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
