"""The energon task: raw shard members -> EncodedSample -> MicroBatch, bad samples counted."""

from __future__ import annotations

import logging
import random
from collections import Counter
from typing import Any

from megatron.energon import (
    Cooker,
    Sample,
    SkipSample,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    stateless,
)
from megatron.energon.errors import FatalSampleError

from data_pipeline.batch import EncodedSample, MicroBatch, collate
from data_pipeline.encode import SampleEncoder
from data_pipeline.loader.reader import UNREADABLE
from data_pipeline.schema import SampleError

logger = logging.getLogger(__name__)

# A worker skips bad samples until a batch is full; without a bound, a source of bad samples alone
# would hang without a message.
MAX_BAD_IN_A_ROW = 1000


@edataclass
class RawSample(Sample):
    """The undecoded members of one sample. This is what the shuffle buffer holds."""

    source: str
    shard: str
    parts: dict[str, bytes]
    unreadable: str  # why the shard could not be read; empty: it could


@stateless
def cook(crude: dict[str, Any]) -> RawSample:
    """Wraps a shard's sample without reading it: energon stops where cooking fails."""
    return RawSample(
        **basic_sample_keys(crude),
        source=crude["__subflavors__"]["source"],
        shard=crude["__shard__"],
        parts={name: data for name, data in crude.items() if not name.startswith("__")},
        unreadable=crude.get(UNREADABLE, ""),
    )


class ShardTask(TaskEncoder[RawSample, EncodedSample, MicroBatch, MicroBatch]):
    """One copy in every worker; its counts are of the samples since the previous batch."""

    cookers = (Cooker(cook),)
    decoder = None  # members stay bytes until encode_sample

    def __init__(self, encoder: SampleEncoder, seed: int) -> None:
        self._encoder = encoder
        self._seed = seed
        self._skipped: Counter[str] = Counter()
        self._bad_in_a_row = 0
        self._logged: set[str] = set()

    @stateless
    def encode_sample(self, sample: RawSample) -> EncodedSample:
        """Encodes, or counts the sample, logs it once and skips it."""
        key = f"{sample.source}/{sample.__key__}"
        draws = self._draws(key)
        try:
            if sample.unreadable:
                raise SampleError("unreadable_shard", sample.unreadable)
            encoded = self._encoder.encode(key, sample.parts, draws)
        except SampleError as error:
            self._count(key, sample.shard, error.reason, error.detail)
        except MemoryError:
            raise
        except Exception as error:  # of any kind, from decoders: one sample must not end training
            self._count(key, sample.shard, f"unexpected_{type(error).__name__}", str(error))
        else:
            self._bad_in_a_row = 0
            return encoded
        raise SkipSample

    def _draws(self, key: str) -> random.Random:
        """The augmentation's random numbers for a sample at this place of the stream.

        They depend on the run's seed, the key, and how many samples the stream has encoded before,
        which its state holds: so they differ in each epoch, and are the same after a resume, also
        with another number of ranks and workers.
        """
        streams = max(1, self._worker_config().num_workers)
        place = self.current_sample_index // streams  # energon counts over a rank's workers
        return random.Random(f"{self._seed} {key} {place}")

    @staticmethod
    def _worker_config() -> WorkerConfig:
        config = WorkerConfig.active_worker_config
        assert config is not None  # energon sets it before it calls encode_sample
        return config

    @stateless
    def batch(self, samples: list[EncodedSample]) -> MicroBatch:
        """Collates; the batch carries the counts of the samples skipped since the previous one."""
        batch = collate(samples, self._encoder.special.pad)
        batch.skipped = dict(self._skipped)
        self._skipped.clear()
        return batch

    def _count(self, key: str, shard: str, reason: str, detail: str) -> None:
        self._skipped[reason] += 1
        self._bad_in_a_row += 1
        if key not in self._logged:
            self._logged.add(key)
            logger.warning("skipped %s of %s: %s: %s", key, shard, reason, detail)
        if self._bad_in_a_row >= MAX_BAD_IN_A_ROW:
            raise FatalSampleError(
                f"{self._bad_in_a_row} samples in a row cannot be used ({dict(self._skipped)}); "
                f"the last is {key} of {shard}: {reason}: {detail}"
            )
