"""Windows of tokens: shuffled for training, fixed for evaluation.

Window i reads tokens i·seq_len … (i+1)·seq_len, both included: neighbours share one token, so that each token
but the first is predicted exactly once per epoch (inputs = tokens[:, :-1], targets = tokens[:, 1:]).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lowprec.data.text import TextData
from lowprec.errors import UsageError

# One thread is enough for copies out of memory; more would fight for the interpreter's lock.
READ_THREADS = 1
PREFETCHED_BATCHES = 8
# grain shuffles with 32-bit indices.
MAX_EXAMPLES = 2**32


class Windows:
    """All windows of a row of tokens, by index: what grain calls a random-access source."""

    def __init__(self, tokens: np.ndarray, seq_len: int):
        if seq_len < 1:
            raise UsageError(f"data.seq_len is at least 1, not {seq_len}")
        # Still mapped from disk, but without the cost of np.memmap's own slices.
        self.tokens, self.seq_len = np.asarray(tokens).view(np.ndarray), seq_len

    def __len__(self) -> int:
        return max(0, self.tokens.size - 1) // self.seq_len

    def __getitem__(self, index) -> np.ndarray:
        """int32 [seq_len + 1]."""
        start = int(index) * self.seq_len
        return self.tokens[start : start + self.seq_len + 1].astype(np.int32)


class TrainBatches:
    """Iterates for ever over batches, dicts of arrays with a row an example; made by `endless`."""

    def __init__(self, iterator, identity: dict):
        self._iterator, self._identity = iterator, identity

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict:
        """Where the iteration stands, as JSON can hold it. It is the same on every process."""
        return {"iterator": self._iterator.get_state(), **self._identity}

    def set_state(self, state: dict) -> None:
        """Goes to where get_state was asked: the next batch is, bit for bit, the one that followed then.

        The number of processes may have changed since.
        Raises:
          UsageError: if the state belongs to other data, seed, batch or window size.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise UsageError(
                    f"the saved position in the data is of a run with {key}={state.get(key)!r}, this one has {value!r}"
                )
        self._iterator.set_state(state["iterator"])

    def close(self) -> None:
        """Stops reading ahead."""
        self._iterator.close()


def train_batches(
    data: TextData,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Batches of training windows, each epoch in a new order, without replacement within an epoch.

    Process p of n yields rows p·batch_size/n … of each global batch: the processes' parts, one after the
    other, are the batch that a single process would see. A batch may hold the end of one epoch and the start
    of the next.

    Args:
      seq_len: tokens that the model reads; a window has one more.
      batch_size: windows in a global batch.
      seed: of the order, 0 … 2**32-1.
      process_index, process_count: which part this process reads.
    Returns:
      an endless iterator of {"tokens": int32 [batch_size / process_count, seq_len + 1]}.
    Raises:
      UsageError: fewer windows than a batch; a batch that the processes can't share evenly; a bad seed.
    """
    windows = Windows(data.train_tokens, seq_len)
    if len(windows) < batch_size:
        raise UsageError(
            f"{data.name} has {len(windows)} training windows of {seq_len} tokens, less than one batch of "
            f"train.batch_size={batch_size}; lower one of them, or read more (data.max_bytes)"
        )
    if len(windows) > MAX_EXAMPLES:
        raise UsageError(f"{len(windows)} training windows are more than 2**32: raise data.seq_len")
    return endless(
        windows,
        lambda position, tokens: {"tokens": tokens},
        identity={"data": data.sha256, "seed": seed, "seq_len": seq_len, "batch_size": batch_size},
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )


def endless(
    source: Any,
    example: Callable[[int, Any], dict[str, Any]],
    *,
    identity: dict[str, Any],
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> TrainBatches:
    """Batches of a random-access source, shuffled anew each epoch, without replacement within one.

    Args:
      source: at least a batch of elements, by index.
      example: (position, element) -> its row of each array. Positions count on through all epochs: epoch e of a source
        of n elements has n · e … n · e + n - 1.
      identity: what the order and the rows depend on, as JSON can hold it.
    Raises:
      UsageError: a batch that the processes can't share evenly; a bad seed.
    """
    import grain

    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise UsageError(f"train.batch_size={batch_size} can't be shared evenly by {process_count} processes")
    if not 0 <= process_index < process_count:
        raise UsageError(f"process {process_index} of {process_count}: count from 0")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed is 0 … 2**32-1, not {seed}")
    # Parts of batches first, then every process_count-th of them: each process's rows are neighbours.
    rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat().map_with_index(example)
    batches = rows.batch(batch_size // process_count)
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCHED_BATCHES)
    iterator = iter(batches[process_index::process_count].to_iter_dataset(options))
    return TrainBatches(iterator, identity)


def eval_batches(data: TextData, *, seq_len: int, batch_size: int, batches: int) -> list[dict[str, np.ndarray]]:
    """The same windows at every call, spread evenly over the whole evaluation split.

    Returns:
      at most `batches` times {"tokens": int32 [batch_size, seq_len + 1], "weight": float32 [batch_size]};
      of a split with fewer windows, all of them. Rows that fill up the last batch are 0 with weight 0.
    Raises:
      UsageError: if the split is shorter than one window.
    """
    windows = Windows(data.eval_tokens, seq_len)
    if batch_size < 1 or batches < 1:
        raise UsageError(f"evaluation needs a batch: {batches} batches of {batch_size} (eval.batches)")
    if not len(windows):
        raise UsageError(
            f"the evaluation split of {data.name} has {data.eval_tokens.size} tokens, less than one window "
            f"of data.seq_len={seq_len} and the token after it"
        )
    count = min(len(windows), batches * batch_size)
    chosen = [index * len(windows) // count for index in range(count)]
    result = []
    for start in range(0, count, batch_size):
        rows = [windows[index] for index in chosen[start : start + batch_size]]
        tokens = np.zeros((batch_size, seq_len + 1), np.int32)
        tokens[: len(rows)] = rows
        weight = (np.arange(batch_size) < len(rows)).astype(np.float32)
        result.append({"tokens": tokens, "weight": weight})
    return result
