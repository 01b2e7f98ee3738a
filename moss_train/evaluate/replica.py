"""A model as the ranks of a replica hold it, in any layout: what it is asked, all of them compute.

Every rank of the replica calls the same methods with the same arguments, and gets the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn

from data_pipeline.batch import IGNORED_LABEL, EncodedSample
from data_pipeline.encode import SampleEncoder
from data_pipeline.tokens import load_tokenizer
from moss_train import hardware
from moss_train.config import Config
from moss_train.evaluate.controls import ModelInput
from moss_train.model.groups import Groups
from moss_train.model.loss import LossOptions
from moss_train.parallel.distribute import StepBatch, TextBatch, even_shares
from moss_train.parallel.exchange import FrameExchange
from moss_train.parallel.schedule import DecoderInput, plan_inputs, run_logits
from moss_train.train.data import encode_config
from moss_train.transfer import HostCopy, concatenated, move, to_device

Reduced = Callable[[DecoderInput, Tensor], Tensor]
SCORED_AT_ONCE = 1024  # tokens whose logits are in fp32 together: of 128256 words half a gigabyte


class ReplicaModel:
    """A `Model` (controls.py) of one rank or of several."""

    def __init__(
        self, config: Config, chunks: Sequence[nn.Module], exchange: FrameExchange, groups: Groups
    ):
        """chunks: this rank's, of the decoder."""
        self.config, self.chunks, self.exchange, self.groups = config, chunks, exchange, groups

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.config.data.tokenizer)

    @cached_property
    def encoder(self) -> SampleEncoder:
        return SampleEncoder(encode_config(self.config), self.tokenizer)

    @torch.no_grad()
    def encode(self, samples: Sequence[EncodedSample]) -> list[Tensor]:
        """`Model.encode`: each rank encodes its share of the frames, and gets all states."""
        sizes = [len(sample.frames) for sample in samples]
        if not sum(sizes):
            none = torch.zeros(
                0, 1, self.config.model.text.hidden_size, device=hardware.device(), dtype=self.dtype
            )
            return [none for _ in samples]
        replica, shares = self.groups.replica, self.exchange.shares
        counts = even_shares(sum(sizes), shares)
        share = replica.rank() * shares // replica.size()
        first = sum(counts[:share])
        own = slice(first, first + counts[share])
        frames = concatenated([sample.frames for sample in samples])[own]
        ratios = torch.cat([sample.aspect_ratio_ids for sample in samples])[own]
        (ids,) = to_device([ratios])
        pixels = frames.to(hardware.device(), non_blocking=True)
        return list(self.exchange.states(StepBatch([], pixels, ids, counts)).split(sizes))

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the frames' states."""
        return self.exchange.encoder.projector.linear.weight.dtype

    @torch.no_grad()
    def next_tokens(self, inputs: Sequence[ModelInput]) -> list[int]:
        """`Model.next_tokens`."""
        batches = self._batches(inputs)
        planned = self.plan(batches, inputs)
        for item, batch in zip(planned, batches, strict=True):
            item.targets.positions = torch.tensor(batch.lengths).cumsum(0) - 1
        move(*planned)
        sizes = [len(batch.lengths) for batch in batches]
        found = self._everywhere(
            run_logits(self.chunks, planned, likeliest, selected=True), sum(sizes)
        )
        return [int(token) for token in found[: len(inputs)]]

    @torch.no_grad()
    def predict(self, inputs: Sequence[ModelInput]) -> list[tuple[Tensor, Tensor]]:
        """`Model.predict`."""
        batches = self._batches(inputs)
        planned = self.plan(batches, inputs)
        move(*planned)
        sizes = [len(batch.tokens) for batch in batches]
        found = torch.tensor(
            self._everywhere(run_logits(self.chunks, planned, scored), 2 * sum(sizes)),
            dtype=torch.float64,
        )
        out: list[tuple[Tensor, Tensor]] = []
        parts = found.split([2 * size for size in sizes])
        for batch, part in zip(batches, parts, strict=True):
            whole = sum(batch.lengths)
            likely, chances = (row[:whole].split(batch.lengths) for row in part.chunk(2))
            out += [sequence_scores(*pair) for pair in zip(likely, chances, strict=True)]
        return out[: len(inputs)]

    def plan(
        self, batches: Sequence[TextBatch], inputs: Sequence[ModelInput]
    ) -> list[DecoderInput]:
        """The decoder's inputs with their frames, still on the host but for these."""
        model, tiles = self.config.model, self.config.data.max_tiles
        planned = plan_inputs([*batches], model, tiles, LossOptions(-1))
        first, last = 0, len(inputs) - 1
        for item, batch in zip(planned, batches, strict=True):
            chosen = [inputs[min(first + n, last)] for n in range(len(batch.lengths))]
            first += len(chosen)
            states = [one.states[: len(one.positions)] for one in chosen if one.positions]
            item.frames.states = torch.cat(states) if states else inputs[0].states[:0]
        return planned

    def _batches(self, inputs: Sequence[ModelInput]) -> list[TextBatch]:
        """The sequences in order as microbatches, within `config.microbatch_tokens` where one holds
        more than one sequence. Pipelines get at least a microbatch a stage, where there are so
        many sequences, equally long ones; interleaved ones a multiple of the stages, the last
        sequence being repeated for that."""
        parallel = self.config.parallel
        lengths = [len(one.tokens) for one in inputs]
        parts = contiguous(lengths, self.config.microbatch_tokens, parallel.pipeline)
        if parallel.virtual > 1:
            parts += [[len(inputs) - 1]] * (-len(parts) % parallel.pipeline)
        multiple = parallel.tensor if parallel.sequence else 1
        sizes = [sum(lengths[n] for n in part) for part in parts]
        if parallel.pipeline > 1:
            sizes = [max(sizes)] * len(sizes)
        return [
            text_batch([inputs[n] for n in part], -(-size // multiple) * multiple)
            for part, size in zip(parts, sizes, strict=True)
        ]

    def _everywhere(self, reduced: list[Tensor], size: int) -> list[float]:
        """What the last stage has of all microbatches, on the host of every rank."""
        replica = self.groups.replica
        numbers = (
            torch.cat([part.flatten() for part in reduced])
            if reduced
            else torch.empty(size, dtype=torch.float64, device=hardware.device())
        )
        if replica.size() > 1:  # the last rank is of the last stage
            last = dist.get_global_rank(replica, replica.size() - 1)
            dist.broadcast(numbers, last, group=replica)
        return HostCopy(numbers).wait()


def contiguous(lengths: Sequence[int], most: int, least: int) -> list[list[int]]:
    """Numbers of sequences in order, in parts of at most `most` tokens, or of one sequence; in at
    least `least` parts, where there are so many sequences."""
    parts: list[list[int]] = []
    room, each = 0, max(1, len(lengths) // least)
    for number, length in enumerate(lengths):
        full = least > 1 and parts and len(parts[-1]) >= each
        if not parts or length > room or full:
            parts.append([])
            room = most
        parts[-1].append(number)
        room -= length
    return parts


def text_batch(inputs: Sequence[ModelInput], size: int) -> TextBatch:
    """Sequences as a microbatch of `size` tokens without labels."""
    counts = [len(one.positions) for one in inputs]
    tokens = torch.zeros(size, dtype=torch.int64)
    flat = torch.tensor(list(chain.from_iterable(one.tokens for one in inputs)))
    tokens[: len(flat)] = flat
    return TextBatch(
        tokens=tokens,
        labels=torch.full((size,), IGNORED_LABEL),
        lengths=[len(one.tokens) for one in inputs],
        frame_sequences=torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
        frame_positions=torch.tensor(
            list(chain.from_iterable(one.positions for one in inputs)), dtype=torch.int64
        ),
        ratio_ids=torch.cat([one.ratios[: len(one.positions)] for one in inputs]),
    )


def likeliest(_item: DecoderInput, logits: Tensor) -> Tensor:
    """The most likely token of each row of `[n, V]`, as fp64, which holds every token exactly."""
    return logits.argmax(-1).double()


def scored(item: DecoderInput, logits: Tensor) -> Tensor:
    """The most likely token after each of T tokens, and the log probability of each of them after
    the one before it, fp64 `[2, T]`; the first column of a sequence's probabilities means nothing.
    """
    return likely_and_chances(item.text.tokens, logits)


def likely_and_chances(tokens: Tensor, logits: Tensor) -> Tensor:
    """`scored` of one or several packed sequences of tokens `[T]`."""
    following = tokens.roll(-1).clamp(max=logits.shape[1] - 1)  # `<|image|>` has no logit
    parts = zip(logits.split(SCORED_AT_ONCE), following.split(SCORED_AT_ONCE), strict=True)
    chances = [
        part.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0] for part, tokens in parts
    ]
    return torch.stack((logits.argmax(-1).double(), torch.cat(chances).roll(1).double()))


def sequence_scores(likely: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """`Model.predict` of a sequence, of its columns of `scored`."""
    chances = chances.float()
    chances[:1] = 0.0
    return likely.long(), chances
