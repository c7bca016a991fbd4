"""Every row once, in as many batches on each process."""

import pytest
from torch.utils.data import SequentialSampler

from diffclip_hf.training.shared_batches import SharedBatchSampler


def shares(rows: int, batch_size: int, world_size: int, **options) -> list[list[list[int]]]:
    """Return each process's batches."""
    samplers = [
        SharedBatchSampler(SequentialSampler(range(rows)), batch_size, rank, world_size, **options)
        for rank in range(world_size)
    ]
    found = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in found] == [len(sampler) for sampler in samplers]
    return found


@pytest.mark.parametrize(
    ("rows", "batches"),
    [
        (8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # Two left over: one for each.
        (10, [[0, 1, 2, 3], [8], [4, 5, 6, 7], [9]]),
        # Three: one and two.
        (11, [[0, 1, 2, 3], [8], [4, 5, 6, 7], [9, 10]]),
        # One, which would leave a process without: it joins the batch before.
        (9, [[0, 1, 2, 3], [4, 5, 6, 7, 8]]),
        # Less than a batch.
        (3, [[0], [1, 2]]),
    ],
)
def test_two_processes_by_hand(rows, batches):
    assert [batch for process in shares(rows, 4, 2) for batch in process] == batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", range(4, 30))
def test_every_row_once_and_none_without(rows, world_size):
    found = shares(rows, 3, world_size)
    assert sorted(row for process in found for batch in process for row in batch) == list(range(rows))
    assert all(batch for process in found for batch in process)
    assert len({len(process) for process in found}) == 1


def test_what_isnt_a_whole_batch_can_be_left_out():
    assert shares(11, 2, 2, drop_last=True) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize(("rows", "drop_last", "least"), [(1, False, 2), (7, True, 8)])
def test_too_few_rows(rows, drop_last, least):
    with pytest.raises(ValueError, match=f"The dataset has {rows} rows; 2 processes need at least {least}"):
        shares(rows, 4, 2, drop_last=drop_last)
