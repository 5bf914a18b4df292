"""Bodies of the job routes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.requests.images import Format
from service.requests.response_schemas import ErrorDetail, GenerateResponse
from service.requests.schemas import GenerateRequest, InpaintRequest, UpscaleRequest
from service.worker.progress import Stage

Task = Literal["generate", "inpaint", "upscale"]


class JobBody(BaseModel):
    """The common fields of all jobs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    webhook: Annotated[
        str | None,
        Field(
            max_length=2048,
            description="URL to which the server sends the job when it has ended; its host must be one that "
            "the operator allows. See the callback `job_ended`",
        ),
    ] = None


class SceneJob(JobBody):
    """A job that can send previews."""

    preview_every: Annotated[
        int, Field(ge=0, le=1000, description="Steps between two previews of an image; 0: no previews")
    ] = 0
    preview_decoded: Annotated[
        bool, Field(description="true: previews at full size from the VAE decoder, which is slower")
    ] = False
    preview_format: Format = "jpeg"


class GenerateJob(SceneJob):
    task: Literal["generate"]
    request: GenerateRequest


class InpaintJob(SceneJob):
    task: Literal["inpaint"]
    request: InpaintRequest


class UpscaleJob(JobBody):
    task: Literal["upscale"]
    request: UpscaleRequest


AnyJob = GenerateJob | InpaintJob | UpscaleJob
JobRequest = Annotated[AnyJob, Field(discriminator="task")]


WebhookState = Literal["waiting", "pending", "delivered", "failed"]
WebhookError = Literal[
    "address_refused",
    "unresolved",
    "connection",
    "timeout",
    "redirect",
    "status",
    "too_many",
    "shutdown",
    "server_lost",
    "internal",
]


class WebhookStatus(BaseModel):
    """The delivery of a job's webhook."""

    state: Annotated[
        WebhookState, Field(description="waiting: for the job's end; pending: being delivered, also again")
    ]
    attempts: Annotated[int, Field(description="Attempts so far")]
    last_status: Annotated[
        int | None, Field(description="HTTP status of the last attempt, if there was a response")
    ]
    last_error: Annotated[
        WebhookError | None,
        Field(
            description="Why the last attempt failed. address_refused: the host has an address that the "
            "operator does not allow; unresolved: it has no address; redirect, status: see last_status; "
            "too_many: too many webhooks are pending; shutdown, server_lost: the server ended first"
        ),
    ]


class JobStatus(BaseModel):
    """The state of a job."""

    id: str
    task: Task
    status: Stage
    created: Annotated[int, Field(description="Seconds since 1970")]
    position: Annotated[int | None, Field(description="Position in the queue; 1 is next")]
    estimate: Annotated[
        float | None, Field(description="Estimated seconds until the end of a queued job, if known")
    ]
    step: Annotated[int, Field(description="UNet calls done, of all images together")]
    steps: Annotated[int, Field(description="UNet calls in total; 0 before the job has started")]
    result: Annotated[GenerateResponse | None, Field(description="Present once the job is done")]
    error: Annotated[ErrorDetail | None, Field(description="Present once the job has failed")]
    webhook: Annotated[WebhookStatus | None, Field(description="Present if the job has a webhook")] = None


class JobEnd(JobStatus):
    """The body of a webhook: the job as GET /jobs/{id} returns it, and when it was sent."""

    sent: Annotated[
        int, Field(description="Seconds since 1970 of this attempt. Reject old ones, which may be replayed")
    ]
    images_omitted: Annotated[
        bool, Field(description="true: the data of the images is empty, because the body would be too large")
    ]


class JobPreview(BaseModel):
    """A preview of an image of a running job."""

    index: Annotated[int, Field(description="Index of the image")]
    step: Annotated[int, Field(description="UNet calls done of that image")]
    data: Annotated[str, Field(description="The file in base64")]
    media_type: str
    width: int
    height: int
