"""The codec between the API process and the worker."""

from __future__ import annotations

import asyncio
import io
import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.spec import ModelSpec
from service.engine.events import Done, Incident
from service.worker import protocol
from service.worker.protocol import (
    MAGIC,
    PREFIX,
    Cancel,
    Command,
    Fatal,
    Frame,
    LostSyncError,
    Report,
    Submit,
    UnreadableMessageError,
    decode_command,
    decode_report,
    encode,
    read_frame,
    receive_frame,
)
from tests.checkpoints.tiny import tiny_spec
from tests.helpers.fake_runner import make_job

pytestmark = pytest.mark.slow

st.register_type_strategy(float, st.floats(allow_nan=False))
st.register_type_strategy(ModelSpec, st.builds(ModelSpec))


def frame_of(data: bytes) -> Frame:
    frame = read_frame(io.BytesIO(data))
    assert frame is not None
    return frame


def framed(text: bytes, body: bytes = b"") -> bytes:
    return PREFIX.pack(MAGIC, len(text), len(body)) + text + body


@pytest.mark.parametrize("kind", get_args(Report))
@given(data=st.data())
def test_every_report_is_read_as_it_was_written(kind, data):
    message = data.draw(st.from_type(kind))
    assert decode_report(frame_of(encode(message))) == message


@pytest.mark.parametrize("kind", get_args(Command))
@given(data=st.data())
def test_every_command_is_read_as_it_was_written(kind, data):
    message = data.draw(st.from_type(kind))
    assert decode_command(frame_of(encode(message))) == message


def test_the_specs_of_real_models_are_read_as_they_were_written():
    offer = protocol.Offer(1, (tiny_spec(),), ())
    assert decode_report(frame_of(encode(offer))) == offer


def test_a_field_named_kind_does_not_change_the_kind_of_the_message():
    assert isinstance(decode_report(frame_of(encode(Incident("non_finite", "step")))), Incident)


def test_frames_follow_each_other_on_a_stream():
    messages = [Submit(make_job("a", image=b"rgb", mask=b"\xff")), Cancel("a")]
    stream = io.BytesIO(b"".join(map(encode, messages)))
    assert [decode_command(read_frame(stream)) for _ in messages] == messages
    assert read_frame(stream) is None


def test_a_frame_that_is_cut_off_is_the_end_of_the_stream():
    assert read_frame(io.BytesIO(encode(Cancel("a"))[:-1])) is None


def test_a_stream_of_something_else_has_lost_its_sync():
    with pytest.raises(LostSyncError):
        read_frame(io.BytesIO(b"OpenBLAS warning: precompiled NUM_THREADS exceeded"))


TEXT, DONE = encode(Fatal("no")), encode(Done("a", (b"1", b"22"), (), 0.5, 1.5, 2.5))
VALUES = json.loads(frame_of(DONE).text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"{}",
        b"[" * 100_000,
        json.dumps(["Unheard", "a", [], []]).encode(),
        json.dumps([["Done"], "a", [], []]).encode(),
        json.dumps([*VALUES[:2], VALUES[2][:-1], VALUES[3]]).encode(),
        json.dumps([*VALUES[:2], [7, *VALUES[2][1:]], VALUES[3]]).encode(),
        json.dumps([*VALUES[:3], [1]]).encode(),
        json.dumps([*VALUES[:3], "12"]).encode(),
        json.dumps(["Cancel", "a", ["a"], []]).encode(),
    ],
)
def test_an_unreadable_frame_costs_itself_only(text):
    stream = io.BytesIO(framed(text, b"122") + TEXT)
    with pytest.raises(UnreadableMessageError):
        decode_report(read_frame(stream))
    assert decode_report(read_frame(stream)) == Fatal("no")


def test_an_unreadable_frame_names_its_job_where_that_can_be_read():
    text = json.dumps(["Done", "a", ["rubbish"], []]).encode()
    with pytest.raises(UnreadableMessageError, match="unreadable Done") as raised:
        decode_report(Frame(text, b""))
    assert (raised.value.kind, raised.value.job) == ("Done", "a")


def test_frames_are_received_from_a_stream_of_asyncio():
    async def scenario() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(encode(Fatal("no")) + DONE[:-1])
        reader.feed_eof()
        assert decode_report(await receive_frame(reader)) == Fatal("no")
        with pytest.raises(asyncio.IncompleteReadError):
            await receive_frame(reader)

    asyncio.run(scenario())
