"""Batches by step: which rows stand in the batch of a step follows from the seed and the step alone.

So the state of the data is the step; it resumes exactly, and on any number of processes. What span corruption
cuts out of a row follows from the seed, the epoch and the row, and for evaluation from the row alone.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int32, Int64

from switchmoe.data.batch import Batch, make_batch
from switchmoe.data.packing import Rows
from switchmoe.data.spans import SpanCorruption, make_span_batch


class TrainBatches:
    """Endless batches addressed by step: batches[step], the same whenever and wherever it is asked for."""

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
        corruption: SpanCorruption | None = None,
    ):
        self._rows, self._seed, self._corruption = rows, seed, corruption
        self.batch_size = batch_size
        self._slice = _process_slice(batch_size, process_index, process_count)
        if len(rows.tokens) < batch_size:
            raise ValueError(
                f"The corpus has {len(rows.tokens)} rows to train on, fewer than a batch of {batch_size}; "
                "lower batch_size or sequence_length, or give more text."
            )
        # grain hashes a pipeline's seed. To a seed given to shuffle itself it would add the epoch's number,
        # and epoch 1 of seed 0 would be epoch 0 of seed 1.
        self._order = grain.MapDataset.range(len(rows.tokens)).seed(seed).shuffle().repeat()

    def __getitem__(self, step: int) -> Batch:
        """Give this process's rows of the batch of a step (counted from 0); IndexError for a step below 0."""
        return self.rows(step, self._slice.start, self._slice.stop)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Give the rows [start, stop) of a step's whole batch, whichever process asks; reads no others."""
        if step < 0:
            raise IndexError(f"Batches are counted from step 0; there is none at step {step}.")
        _check_range(start, stop, self.batch_size)
        first = int(step) * self.batch_size
        places = range(first + start, first + stop)
        chosen = np.array([self._order[place] for place in places], np.int64)
        epochs = [place // len(self._rows.tokens) for place in places]
        keys = [(self._seed, epoch, int(row)) for epoch, row in zip(epochs, chosen, strict=True)]
        return _take(self._rows, chosen, keys, self._corruption)

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches from step 0 on, without end."""
        step = 0
        while True:
            yield self[step]
            step += 1


class EvaluationBatches:
    """Batches in a fixed order, every one full: the last is filled up with empty rows that count nowhere."""

    def __init__(
        self,
        rows: Rows,
        chosen: Int64[np.ndarray, " N"],
        batch_size: int,
        part: slice,
        corruption: SpanCorruption | None = None,
    ):
        self._rows, self._chosen, self.batch_size, self._part = rows, chosen, batch_size, part
        self._corruption = corruption

    def __len__(self) -> int:
        return -(-len(self._chosen) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        """Give this process's rows of one batch; IndexError outside [0, len)."""
        return self.rows(index, self._part.start, self._part.stop)

    def rows(self, index: int, start: int, stop: int) -> Batch:
        """Give the rows [start, stop) of a whole batch, whichever process asks; reads no others."""
        _check_range(start, stop, self.batch_size)
        chosen = self._rows_of(index)[start:stop]
        keys = [(int(row),) for row in chosen]
        return _take(self._rows, chosen, keys, self._corruption, fill_to=stop - start)

    def domains(self, index: int) -> Int32[np.ndarray, " B"]:
        """Give the domain of every row of a whole batch, without reading the rows."""
        domain_N = self._rows.domain[self._rows_of(index)].astype(np.int32)
        return np.pad(domain_N, (0, self.batch_size - len(domain_N)))

    def _rows_of(self, index: int) -> Int64[np.ndarray, " N"]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} evaluation batches; there is none at {index}.")
        return self._chosen[index * self.batch_size : (index + 1) * self.batch_size]

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches in order."""
        return (self[index] for index in range(len(self)))


def batches(
    rows: Rows,
    batch_size: int,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    corruption: SpanCorruption | None = None,
) -> TrainBatches:
    """Shuffle the rows anew for every epoch and deal them out in batches, each row once an epoch.

    A batch of batch_size rows is split over process_count processes in order; this process gets its part.
    When batch_size does not divide the number of rows, a batch at an epoch's end runs on into the next one.
    With a corruption (`DataConfig.corruption`), spans are cut out of every row, others in every epoch.

    Raises ValueError when batch_size is below 1, not divisible by process_count or above the number of rows,
    when process_index is not below process_count, or for a seed outside [0, 2**32).
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"The data seed is {seed}; give a whole number from 0 to 2**32 - 1.")
    return TrainBatches(rows, batch_size, seed, process_index, process_count, corruption)


def evaluation_batches(
    rows: Rows,
    batch_size: int,
    *,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    corruption: SpanCorruption | None = None,
) -> EvaluationBatches:
    """Deal the rows out in a fixed order; with a limit, that many batches of rows spread evenly over them.

    The domains take turns, so that a batch is mixed as in training.
    Every domain has its share of a limited choice, and at least one row where there is room. The last batch
    is filled up with rows of padding (weight 0, mask False, domain 0). With a corruption the same spans are
    cut out of a row every time, whatever the seed, so that losses can be compared.

    Raises ValueError as batches does, and for a limit below 1.
    """
    part = _process_slice(batch_size, process_index, process_count)
    if limit is not None and limit < 1:
        raise ValueError(f"The limit of evaluation batches is {limit}; give at least 1, or None for all.")
    count = len(rows.tokens)
    wanted = count if limit is None else min(limit * batch_size, count)
    return EvaluationBatches(rows, _spread(rows.domain, wanted), batch_size, part, corruption)


def _spread(domain_N: np.ndarray, wanted: int) -> Int64[np.ndarray, " M"]:
    """Choose wanted rows: each domain by its size, evenly spaced inside the domain, and the domains in turn.

    Rows in their own order would make a batch, and a group of tokens that are routed together, of one domain
    alone: a load no router balances, and none that training shows it.
    """
    numbers, sizes = np.unique(domain_N, return_counts=True)
    if wanted < len(numbers):
        return np.linspace(0, len(domain_N) - 1, wanted).round().astype(np.int64)
    share = wanted * sizes / sizes.sum()
    quota = np.maximum(1, np.floor(share)).astype(np.int64)
    while quota.sum() != wanted:  # at most one turn a domain
        if quota.sum() < wanted:
            quota[np.argmax(share - quota)] += 1
        else:
            quota[np.argmax(np.where(quota > 1, quota - share, -np.inf))] -= 1
    chosen, depth = [], []
    for number, size, take in zip(numbers, sizes, quota, strict=True):
        middles = ((np.arange(take) + 0.5) * size / take).astype(np.int64)
        chosen.append(np.flatnonzero(domain_N == number)[middles])
        depth.append((np.arange(take) + 0.5) / take)
    return np.concatenate(chosen)[np.argsort(np.concatenate(depth), kind="stable")]


def _process_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    """Give the rows of a batch that belong to this process."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1.")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index is {process_index} of process_count {process_count}; count processes from 0 to "
            "process_count - 1."
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} cannot be split over {process_count} processes; make it a multiple."
        )
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _check_range(start: int, stop: int, batch_size: int) -> None:
    if not 0 <= start < stop <= batch_size:
        raise IndexError(f"A batch has the rows [0, {batch_size}); there are no rows [{start}, {stop}).")


def _take(
    rows: Rows,
    chosen: Int64[np.ndarray, " N"],
    keys: Sequence[Sequence[int]],
    corruption: SpanCorruption | None,
    fill_to: int = 0,
) -> Batch:
    """Copy the chosen rows out of the memory map, add empty rows up to fill_to, and make a batch of them."""
    missing = max(0, fill_to - len(chosen))
    tokens_BR = np.pad(rows.tokens[chosen], ((0, missing), (0, 0)))
    domain_B = np.pad(rows.domain[chosen], (0, missing))
    if corruption is None:
        return make_batch(tokens_BR, domain_B, rows.special)
    return make_span_batch(tokens_BR, domain_B, corruption, [*keys, *[()] * missing], rows.special)
