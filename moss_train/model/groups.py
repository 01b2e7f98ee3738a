"""The process groups of this rank, as the model and its users need them (parallel/ builds them)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup


@dataclass
class Groups:
    """The groups that this rank is in.

    decoder, vision: megatron's collections for the two halves of the model.
    replica: the tensor x pipeline ranks that work on one share of the global batch.
    host: the same ranks, for what is in host memory: the next step's text, while one is computed.
        For a replica of one rank it is `replica`, which on a GPU takes no tensors of host memory.
    """

    decoder: ProcessGroupCollection
    vision: ProcessGroupCollection
    replica: ProcessGroup
    world: ProcessGroup
    host: ProcessGroup

    @property
    def data_rank(self) -> int:
        """Number of this rank's replica."""
        return self.decoder.dp.rank()

    @property
    def data_size(self) -> int:
        """Number of replicas."""
        return self.decoder.dp.size()

    @property
    def is_leader(self) -> bool:
        """True on the rank that reads its replica's data."""
        return self.replica.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the loss is computed."""
        return self.decoder.pp.rank() == self.decoder.pp.size() - 1

    @property
    def reports_loss(self) -> bool:
        """True on one of the ranks of a replica that compute the loss, whose losses are summed."""
        return self.is_last_stage and self.decoder.tp.rank() == 0
