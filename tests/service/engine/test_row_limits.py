"""How many rows of a group a call may have."""

from __future__ import annotations

from service.engine.row_limits import RECOVERY_CALLS, MemoryUse, RowLimits

SIZES = (2, 4, 8, 16)


def test_a_group_starts_with_the_smallest_size():
    limits = RowLimits(SIZES)
    assert limits.rows("unheard of") == 16
    limits.start_small("g")
    assert limits.rows("g") == 2


def test_a_measured_call_shows_how_many_rows_fit():
    limits = RowLimits(SIZES)
    limits.start_small("g")
    limits.record_success("g", MemoryUse(rows=2, peak=200, room=1000))  # 9 rows in 90% of the room
    assert limits.rows("g") == 8
    limits.record_success("g")
    assert limits.rows("g") == 8
    limits.record_success("g", MemoryUse(rows=8, peak=400, room=1000))  # a larger call, most of it paid once
    assert limits.rows("g") == 16
    limits.record_success("g", MemoryUse(rows=16, peak=1600, room=100))
    assert limits.rows("g") == 1, "one image a call"


def test_without_measurements_nothing_is_limited():
    limits = RowLimits(SIZES)
    limits.start_small("g")
    limits.record_success("g")
    assert limits.rows("g") == 16


def test_a_size_that_failed_is_tried_again_after_many_calls():
    limits = RowLimits(SIZES)
    limits.record_failure("g", 13)
    assert limits.rows("g") == 8
    limits.record_failure("g", 8)
    assert limits.rows("g") == 4
    sizes = []
    for _ in range(2 * RECOVERY_CALLS):
        limits.record_success("g")
        sizes.append(limits.rows("g"))
    assert sizes == [4] * (RECOVERY_CALLS - 1) + [8] * RECOVERY_CALLS + [16]
