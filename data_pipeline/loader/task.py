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

# Skipping goes on in the worker until a batch is full; without a bound, a source of nothing but
# bad samples would be a silent hang.
MAX_BAD_IN_A_ROW = 1000


@edataclass
class RawSample(Sample):
    """The undecoded members of one sample. This is what the shuffle buffer holds."""

    source: str
    shard: str
    parts: dict[str, bytes]
    unreadable: str  # why the shard did not give the parts; empty: it did


@stateless
def cook(crude: dict[str, Any]) -> RawSample:
    """Wraps a shard's sample. It reads nothing of it: energon gives up where cooking fails."""
    return RawSample(
        **basic_sample_keys(crude),
        source=crude["__subflavors__"]["source"],
        shard=crude["__shard__"],
        parts={name: data for name, data in crude.items() if not name.startswith("__")},
        unreadable=crude.get(UNREADABLE, ""),
    )


class ShardTask(TaskEncoder[RawSample, EncodedSample, MicroBatch, MicroBatch]):
    """One copy lives in every worker; the counts are those since its previous batch."""

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
        except Exception as error:  # whatever a decoder thinks of: one sample ends no training
            self._count(key, sample.shard, f"unexpected_{type(error).__name__}", str(error))
        else:
            self._bad_in_a_row = 0
            return encoded
        raise SkipSample

    def _draws(self, key: str) -> random.Random:
        """The augmentation's random numbers, for this sample at this place of this stream.

        From the run's seed, the key, and how many samples the stream has encoded before, which its
        state holds: other numbers in each epoch, and the same ones after a resume, whatever number
        of ranks and workers the streams are dealt to.
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
        """Collates and hands over the counts of what was skipped on the way to this batch."""
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
