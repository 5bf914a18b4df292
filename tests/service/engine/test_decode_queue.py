"""The order in which images are decoded, and how much time decoding gets."""

from __future__ import annotations

from service.engine.decode_queue import DecodeQueue
from service.engine.job import ImageKey


def queue_of(*jobs: tuple[str, int]) -> DecodeQueue:
    """All images of jobs of these sizes."""
    queue = DecodeQueue()
    for job, size in jobs:
        for image in range(size):
            queue.add(ImageKey(job, image), size)
    return queue


def turn(queue: DecodeQueue, step_seconds: float | None, seconds: float) -> int:
    """The number of images decoded in one turn, if each takes `seconds`."""
    count = 0
    queue.begin_turn(step_seconds)
    while queue.may_decode(count, step_seconds):
        queue.pop()
        queue.charge(seconds)
        count += 1
    queue.end_turn(step_seconds)
    return count


def test_the_smallest_job_and_the_one_that_waited_longest_take_turns():
    queue = queue_of(("large", 3), ("small", 1))
    assert [queue.pop().job for _ in range(4)] == ["small", "large", "large", "large"]


def test_clients_take_turns_by_weight():
    queue = DecodeQueue()
    for number in range(6):
        queue.add(ImageKey(f"a{number}", 0), 1, "A")
    assert [queue.pop().job for _ in range(2)] == ["a0", "a1"]
    for number in range(4):
        queue.add(ImageKey(f"b{number}", 0), 1, "B", weight=2.0)
    order = "".join(queue.pop().job[0] for _ in range(8))
    assert order == "abbabbaa", "twice as many of B as of A, and none for the past"


def test_a_discarded_job_is_not_decoded():
    queue = queue_of(("a", 2), ("b", 1))
    queue.discard("a")
    assert queue.images_of("b") == {0}
    assert (queue.pop(), len(queue)) == (ImageKey("b", 0), 0)


def test_decoding_gets_as_much_time_as_the_unet():
    queue = queue_of(("a", 100))
    counts = [turn(queue, step_seconds=1.0, seconds=2.5) for _ in range(10)]
    assert max(counts) == 1
    assert sum(counts) == 4, "10 s of UNet calls allow 10 s of decoding"


def test_without_a_unet_call_one_image_is_decoded():
    queue = queue_of(("a", 3))
    assert [turn(queue, step_seconds=None, seconds=1.0) for _ in range(4)] == [1, 1, 1, 0]
