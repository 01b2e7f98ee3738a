"""How it trains: data-parallel wrapping, AdamW, the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from moss_train import hardware
from moss_train.config import Config, ConfigError
from moss_train.model.moss_video import MossVideo
from moss_train.parallel.data_parallel import DataParallel
from moss_train.train import adam
from moss_train.train.guarded_optimizer import GuardedOptimizer
from moss_train.train.param_groups import Counts, group_overrides


@dataclass
class TrainState:
    """What trains on this rank, and how: wrapped modules, optimizer, schedule.

    chunks: decoder chunks, wrapped for data parallelism where any of the decoder trains.
    encoder: the wrapped vision encoder, None where all of it is frozen.
    last_lr: learning rate of the last update, of parameters without a multiplier.
    """

    chunks: list[nn.Module]
    encoder: DataParallel | None
    optimizer: GuardedOptimizer
    scheduler: OptimizerParamScheduler
    last_lr: float = 0.0

    @property
    def wrapped_chunks(self) -> list[DataParallel]:
        """The chunks whose gradients must be reduced."""
        return [chunk for chunk in self.chunks if isinstance(chunk, DataParallel)]

    def set_step(self, done: int) -> None:
        """Puts the schedule where it stands after `done` updates."""
        self.scheduler.num_steps = 0
        self.scheduler.step(done + 1)

    def gather_parameters(self) -> None:
        """Makes every rank's weights current, where their gathering overlaps the next step."""
        for chunk in self.wrapped_chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()

    def update(self, refuses: Callable[[Tensor], Tensor]) -> Tensor:
        """Clips and updates; where `refuses` says 1 for the gradient norm, nothing changes.

        Nobody waits for the device here: norm and answer stay on it. A caller that learns of a
        refusal calls `take_back`.

        Returns:
            The norm of all gradients before clipping, an fp64 scalar.
        """
        norm = self.optimizer.update(refuses)
        self.last_lr = self.scheduler.get_lr({})
        self.scheduler.step(1)  # to the rate of the next update
        return norm

    def take_back(self) -> None:
        """The last update was refused: Adam does not count it."""
        for part in self.optimizer.adams():
            part.take_back()

    def zero_gradients(self) -> None:
        """Clears the gradients before a step."""
        for wrapped in [*self.wrapped_chunks, *([self.encoder] if self.encoder else [])]:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()


def make_train_state(model: MossVideo, config: Config, counts: Counts) -> TrainState:
    """Wraps what trains and builds its optimizer. A collective.

    Raises:
        ConfigError: nothing trains, or a pattern of `optimizer.lr_multipliers` matches nothing.
    """
    trained = counts.trained
    if not sum(trained.values()):
        raise ConfigError([f"stage.train={config.stage.train}: nothing trains"])
    adam.install()
    groups = model.groups
    overrides = _overrides(group_overrides(model, config))
    chunks: list[nn.Module] = list(model.chunks)
    optimizers = []
    if trained["decoder"]:
        ddp = _ddp_config(config, overlap=True)
        wrapped = [
            DataParallel(
                chunk.config,
                ddp,
                chunk,
                disable_bucketing=number > 0,
                pg_collection=groups.decoder,
            )
            for number, chunk in enumerate(model.chunks)
        ]
        for chunk, whole in zip(model.chunks, wrapped, strict=True):
            _hook_schedule(chunk.config, whole, wrapped, config)
        chunks = list(wrapped)
        optimizers.append(_optimizer(config, wrapped, groups.decoder, overrides))
    encoder = None
    if trained["vision"] or trained["projector"]:
        encoder = DataParallel(
            model.encoder.config,
            _ddp_config(config, overlap=False),  # its backward runs once, after the schedule
            model.encoder,
            pg_collection=groups.vision,
        )
        optimizers.append(_optimizer(config, [encoder], groups.vision, overrides))
    chained = GuardedOptimizer([part for o in optimizers for part in o.chained_optimizers])
    return TrainState(chunks, encoder, chained, scheduler(config, chained))


def _ddp_config(config: Config, overlap: bool) -> DistributedDataParallelConfig:
    overlaps = config.parallel.overlap_grad_reduce
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        # gloo's reduce-scatter is an all-reduce; megatron's other form is an all-to-all and a sum
        # in fp32: half of what travels.
        reduce_scatter_with_fp32_accumulation=not hardware.on_accelerator() and not overlaps,
        overlap_grad_reduce=overlap and overlaps,
        overlap_param_gather=overlap and config.parallel.overlap_param_gather,
    )


def _hook_schedule(mcore, whole, wrapped, config: Config) -> None:
    """Tells megatron's schedules when gradients and parameters may travel."""
    single = len(wrapped) == 1
    if config.parallel.overlap_grad_reduce:
        mcore.no_sync_func = whole.no_sync if single else [w.no_sync for w in wrapped]
        if not single:
            mcore.grad_sync_func = [w.start_grad_sync for w in wrapped]
    if config.parallel.overlap_param_gather and not single:
        mcore.param_sync_func = [w.start_param_sync for w in wrapped]


def _overrides(
    by_parameter: dict[nn.Parameter, dict[str, float]],
) -> dict[ParamKey, dict[str, float]]:
    """The changes in megatron's form: a predicate for each set of them."""
    sets: dict[tuple[tuple[str, float], ...], set[int]] = {}
    for parameter, changes in by_parameter.items():
        if changes:
            sets.setdefault(tuple(sorted(changes.items())), set()).add(id(parameter))

    def among(members: set[int]) -> Callable[[nn.Parameter], bool]:
        return lambda parameter: id(parameter) in members

    return {
        ParamKey(predicate=ParamPredicate(name=str(changes), fn=among(members))): dict(changes)
        for changes, members in sets.items()
    }


def _optimizer(
    config: Config,
    modules: list[DataParallel],
    groups: ProcessGroupCollection,
    overrides: dict[ParamKey, dict[str, float]],
) -> ChainedOptimizer:
    options = config.optimizer
    bf16 = config.model.dtype == "bf16"
    megatron = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.lr * options.min_lr_ratio,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        clip_grad=options.clip_grad,
        bf16=bf16,
        params_dtype=hardware.DTYPES[config.model.dtype],
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(
        megatron,
        modules,
        config_overrides=overrides,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    assert isinstance(optimizer, ChainedOptimizer)
    return optimizer


def scheduler(config: Config, optimizer: ChainedOptimizer) -> OptimizerParamScheduler:
    """Warm-up from 0 to the peak, then `stage.schedule` down to min_lr_ratio of it; in steps.

    Neither end of the curve is a step's: of N steps the first has step 1 of the warm-up, not 0, and
    the fall ends at N + 1. So every step has a rate, and one step alone has the peak's.
    """
    steps, stage = config.steps, config.stage
    warmup, fall = schedule_steps(config)
    made = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr * config.optimizer.min_lr_ratio,
        lr_warmup_steps=warmup,
        lr_decay_steps=steps + 1,
        lr_decay_style="WSD" if stage.schedule == "wsd" else stage.schedule,
        wsd_decay_steps=fall + 1,
        lr_wsd_decay_style="linear",
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    made.step(1)
    return made


def schedule_steps(config: Config) -> tuple[int, int]:
    """The step that has the peak's rate, and (wsd) the number of last steps in which it falls.

    Both fit into the run: what is asked for beyond that is cut (`schedule_warnings` says so).
    """
    steps = config.steps
    peak = min(max(config.warmup_steps, 1), steps)  # without a warm-up the first step has it
    return peak, min(config.decay_steps, steps - peak)


def schedule_warnings(config: Config) -> Iterator[str]:
    """A line for what is asked of the schedule and does not fit into the run's steps."""
    steps, stage = config.steps, config.stage
    peak, fall = schedule_steps(config)
    if config.warmup_steps > steps:
        yield (
            f"the warm-up of {config.warmup_steps} steps does not fit into the {steps} of the run: "
            "the rate rises in all of them and reaches its peak in the last"
        )
    elif stage.schedule == "wsd" and config.warmup_steps + config.decay_steps > steps:
        yield (
            f"stage.decay_ratio={stage.decay_ratio}: {config.decay_steps} of {steps} steps, of "
            f"which the warm-up takes {peak}: the rate falls in the last {fall}"
        )
