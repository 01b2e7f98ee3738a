"""Picks to microbatches: reads, encodes, collates; what cannot be used is counted and replaced."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence

from torch.utils.data import Dataset

from data_pipeline.batch import EncodedSample, MicroBatch, collate
from data_pipeline.encode import SampleEncoder
from data_pipeline.loader.order import Pick, Turn
from data_pipeline.loader.reader import SourceReader
from data_pipeline.loader.shuffle import number
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError
from data_pipeline.stores import StoreError

logger = logging.getLogger(__name__)

# Without a bound a source of unusable samples alone would hang without a message.
MAX_BAD_IN_A_ROW = 1000


class Samples(Dataset[MicroBatch]):
    """The samples of all sources; each worker process has a copy.

    In the place of an unusable sample stands another of its source, drawn by the seed and the
    sample's number in the run: the same one in every layout, without a word between ranks.
    """

    def __init__(self, readers: Sequence[SourceReader], encoder: SampleEncoder, seed: int) -> None:
        self._readers, self._encoder, self._seed = readers, encoder, seed
        self._logged: set[str] = set()

    def __getitems__(self, turn: Turn) -> MicroBatch:
        """The microbatch of a turn, with the counts of what was unusable in it, by reason."""
        for pick in turn.ahead:
            self._readers[pick.source].ahead(pick.sample)
        skipped: Counter[str] = Counter()
        samples = [self._usable(pick, skipped) for pick in turn.picks]
        batch = collate(samples, self._encoder.special.pad)
        batch.skipped = dict(skipped)
        return batch

    def _usable(self, pick: Pick, skipped: Counter[str]) -> EncodedSample:
        reader, sample = self._readers[pick.source], pick.sample
        for attempt in range(1, MAX_BAD_IN_A_ROW + 1):
            try:
                return self._encoded(reader, sample, pick.number)
            except SampleError as error:
                bad = error
            skipped[bad.reason] += 1
            shard = reader.place(sample)[0]
            if bad.key not in self._logged:
                self._logged.add(bad.key)
                logger.warning("skipped %s of %s: %s: %s", bad.key, shard, bad.reason, bad.detail)
            sample = number(self._seed, "instead of", pick.number, attempt) % len(reader)
        raise ShardError(
            f"{MAX_BAD_IN_A_ROW} samples in a row cannot be used ({dict(skipped)}); the last is "
            f"{bad.key} of {shard}: {bad.reason}: {bad.detail}"
        )

    def _encoded(self, reader: SourceReader, sample: int, place: int) -> EncodedSample:
        """A sample at a place in the run; SampleError with its key for all that may be wrong."""
        shard, inside = reader.place(sample)
        key = f"{reader.name}/{shard}#{inside}"  # where its own cannot be read
        try:
            own, parts = reader.read(sample)
            key = f"{reader.name}/{own}"
            # Of the place, not only of the key: other numbers in each epoch.
            draws = random.Random(f"{self._seed} {key} {place}")
            return self._encoder.encode(key, parts, draws)
        except ShardError as error:
            raise SampleError("unreadable_shard", str(error), key) from None
        except (SampleError, MemoryError, StoreError):  # a store out of reach ends the job
            raise
        except Exception as error:  # of any kind, from decoders: one sample must not end training
            reason = f"unexpected_{type(error).__name__}"
            raise SampleError(reason, str(error), key) from None
