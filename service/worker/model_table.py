"""What the API process knows about models: the catalogue, what workers offer of it, and open calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from models.spec import ModelSpec
from service.catalogue import Catalogue, Folders, Ignored
from service.engine.events import CallEnded, LoadedModel, LoadedModels
from service.errors import ModelInUse, ModelUnreadable, ServiceError, Unavailable, from_code
from service.settings import Settings
from service.worker.protocol import Offer

WORKER_ENDED = "the worker has ended; try again later"


class OpenCall(NamedTuple):
    """A call about a model that workers carry out. waiting: worker -> its answer."""

    model: str
    waiting: dict[int, asyncio.Future[None]]


class ModelTable:
    """The models that all workers serve. Workers have numbers.

    specs, ignored: what requests see; they change when all workers offer the new catalogue. known: whether a
    worker has offered one.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folders: Folders | None = None
        self._reading = asyncio.Lock()
        self.catalogue = Catalogue()
        self.known = False
        self.specs: dict[str, ModelSpec] = {}
        self.ignored: tuple[Ignored, ...] = ()
        self._offers: dict[int, Offer] = {}
        self._loaded: dict[int, Mapping[str, LoadedModel]] = {}
        self._calls: dict[str, OpenCall] = {}
        self._changed = asyncio.Event()  # replaced after each change

    async def read_once(self) -> None:
        """Read the folders of models, unless they were read. Raises ModelPathError."""
        async with self._reading:
            if self._folders is None:
                folders = await asyncio.to_thread(Folders, self._settings)
                self.catalogue = await asyncio.to_thread(folders.read)
                self._folders = folders

    async def read_again(self) -> Catalogue:
        """Read the folders of models again; the catalogue has the next number. Raises ModelPathError."""
        await self.read_once()
        async with self._reading:
            assert self._folders
            self.catalogue = await asyncio.to_thread(self._folders.read, self.catalogue.number + 1)
            return self.catalogue

    def take(self, worker: int, offer: Offer) -> None:
        """Take a worker's offer. It counts once no other worker has an older one."""
        self._offers[worker] = offer
        self.known = True
        self._update()

    def _update(self) -> None:
        if self._offers:
            oldest = min(self._offers.values(), key=lambda offer: offer.number)
            self.specs = {spec.name: spec for spec in oldest.specs}
            self.ignored = oldest.ignored
        self._changed.set()
        self._changed = asyncio.Event()

    def set_loaded(self, worker: int, report: LoadedModels) -> None:
        self._loaded[worker] = {model.name: model for model in report.models}

    def offer_of(self, worker: int) -> Offer | None:
        """The newest offer of a worker; None if it has made none."""
        return self._offers.get(worker)

    def loaded_at(self, worker: int) -> tuple[LoadedModel, ...]:
        """The models that a worker has loaded."""
        return tuple(self._loaded.get(worker, {}).values())

    def loaded(self, model: str) -> LoadedModel | None:
        """A model as a worker has loaded it; None if none has."""
        return next((loaded[model] for loaded in self._loaded.values() if model in loaded), None)

    async def wait_for(self, number: int) -> None:
        """Wait until all workers, at least one, offer the catalogue with this number or a later one."""
        while not self._offers or any(offer.number < number for offer in self._offers.values()):
            await self._changed.wait()

    def begin_call(self, call: str, model: str, workers: Iterable[int]) -> list[asyncio.Future[None]]:
        """The answers of these workers to a call."""
        loop = asyncio.get_running_loop()
        self._calls[call] = OpenCall(model, {worker: loop.create_future() for worker in workers})
        return list(self._calls[call].waiting.values())

    def end_call(self, worker: int, ended: CallEnded) -> None:
        """Answer a call for a worker that has carried it out."""
        if call := self._calls.get(ended.call):
            error = error_of(ended.code, call.model) if ended.code else None
            answer(call.waiting[worker], error)

    def forget_call(self, call: str) -> None:
        self._calls.pop(call, None)

    def lose(self, worker: int) -> None:
        """Forget what a worker offered, as it has ended; its calls fail."""
        self._offers.pop(worker, None)
        self._loaded.pop(worker, None)
        for call in self._calls.values():
            if worker in call.waiting:
                answer(call.waiting[worker], Unavailable(WORKER_ENDED, retry_after=5))
        self._update()


def answer(future: asyncio.Future[None], error: ServiceError | None) -> None:
    """End a call, unless it has ended."""
    if not future.done():
        future.set_exception(error) if error else future.set_result(None)


def error_of(code: str, *models: str) -> ServiceError:
    """The error with this code, which names the models where one of them is the cause."""
    error, named = from_code(code), " or ".join(map(repr, dict.fromkeys(models)))
    if isinstance(error, ModelUnreadable):
        return ModelUnreadable(f"the file of the model {named} is missing, damaged or has changed")
    if isinstance(error, ModelInUse):
        return ModelInUse(f"the model {named} is in use; try again when its jobs have ended")
    return error
