"""Images between the VAE decoder's call and their arrival on the CPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from service.device import hires
from service.device.decoding import Decoder, QueuedImage, with_kept_pixels
from service.device.finite import FiniteChecker, PendingCheck, TimePoint
from service.device.state import ImageState, JobState
from service.device.torch_errors import translate_device_lost
from service.engine.job import ImageKey
from service.engine.runner import DecodedImage

Jobs = Mapping[str, JobState]


class Decoding(NamedTuple):
    """An image between the decoder's call and its return.

    queued: its pixels on their way to the CPU; None for an image that has pixels already. begin, end: of the
    decoder's calls; images: how many these decoded. check: of the UNet call before them, for NaN and Inf;
    None if that is done.
    """

    key: ImageKey
    state: JobState
    queued: QueuedImage | None
    begin: TimePoint
    end: TimePoint
    images: int
    check: PendingCheck[JobState] | None

    @property
    def image(self) -> ImageState:
        return self.state.images[self.key.image]


class DecodeLine:
    """Decodes images, and returns them in the same order.

    On a GPU, start() queues the decoder's calls and the copies to pinned memory, and take() waits for their
    ends. By then a later UNet call is queued, so the GPU never waits for the CPU. An image is returned only
    after the UNet call that made its latent was checked for NaN and Inf.
    """

    def __init__(self, decoder: Decoder, checker: FiniteChecker[JobState]) -> None:
        self._decoder = decoder
        self._checker = checker
        self._line: deque[Decoding] = deque()

    def start(self, keys: Sequence[ImageKey], jobs: Jobs) -> None:
        """Start to decode images. After an exception none of them is being decoded."""
        checker, begin = self._checker, self._checker.now()
        states = [jobs[key.job] for key in keys]
        # An image that was interrupted before its second pass keeps the pixels of the first pass.
        missing = [place for place, key in enumerate(keys) if states[place].images[key.image].pixels is None]
        queued = self._decoder.queue(
            [states[place] for place in missing],
            [states[place].images[keys[place].image] for place in missing],
        )
        by_place = dict(zip(missing, queued, strict=True))
        end = checker.now()
        self._line += [
            Decoding(key, state, by_place.get(place), begin, end, len(keys), checker.pending)
            for place, (key, state) in enumerate(zip(keys, states, strict=True))
        ]

    def take(self, wait: bool, jobs: Jobs) -> list[DecodedImage]:
        """The images that are on the CPU; with `wait`, waits for all whose latents were checked."""
        arrived = []
        while self._line:
            first = self._line[0]
            unchecked = first.check is not None and first.check is self._checker.pending
            if unchecked or not (wait or first.end.reached()):
                break
            self._line.popleft()
            if jobs.get(first.key.job) is first.state:
                arrived.append(self._arrived(first))
        return arrived

    def _arrived(self, decoding: Decoding) -> DecodedImage:
        decoding.end.wait()
        seconds = decoding.end.seconds_since(decoding.begin) / decoding.images
        try:
            return DecodedImage(decoding.key, self._image(decoding), seconds)
        except Exception as error:
            return DecodedImage(decoding.key, error, seconds)

    @translate_device_lost()
    @torch.inference_mode()
    def _image(self, decoding: Decoding) -> bytes:
        """height x width x 3 bytes; decoded once more, in float32, if the values were not finite."""
        job, pixels = decoding.state.job, decoding.image.pixels
        if decoding.queued:
            pixels = decoding.queued.pixels.numpy()
            if not decoding.queued.finite:
                pixels = self._decoder.pixels_in_float32(decoding.state, decoding.image)
        assert pixels is not None
        if not job.scale:
            pixels = hires.resized_to(pixels, job.size)
        return with_kept_pixels(job, pixels).tobytes()
