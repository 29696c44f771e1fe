"""The whole configuration of a run: its sections put together, its derived values filled in, everything checked.

The checks are the same for `franca plan` and `franca train`: what the planner lets through starts. Floors below see sections
only; this room and those above it see the whole.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

import franca.models.hybrid  # noqa: F401 (with all families: they join the choice of models)
from franca.checkpoint.sharded import CheckpointConfig
from franca.checkpoint.store import find
from franca.core.config import Count, Precision, config, load, problems_error
from franca.core.duration import Duration, Length, RepeatableCadence
from franca.core.errors import ConfigError
from franca.core.schedule import BatchRamp, Timeline, batch_stages
from franca.data.loader import DataConfig, Plan, open_plan
from franca.models.base import ModelConfig
from franca.observe.metrics import MetricsConfig
from franca.parallel import float8, mesh
from franca.parallel.float8 import Float8Config
from franca.parallel.mesh import ParallelConfig
from franca.train import optim
from franca.train.optim import OptimConfig
from franca.train.validation import ValidationConfig


@config
class TrainConfig:
    """How long, in what portions, in what precision."""

    length: Length  # 0 steps: the checkpoint of the initial weights, for `init_from` on any mesh
    batch_samples: Count  # rows per step, over all ranks
    batch_ramp: BatchRamp | None = None
    micro_samples: Count | None = None  # rows per rank and forward pass; None: the rank's whole share
    precision: Precision = "bf16"  # of the matrix products; parameters, gradients and moments are fp32
    float8: Float8Config | None = None  # products of the blocks in 8 bits; here, since it changes what is computed
    log_every: RepeatableCadence = Duration(10, "steps")
    deterministic: bool = False  # the same bits every time on the same ranks and devices; slower on GPUs


@config
class RunConfig:
    """A run file. `run` is the folder that everything goes to."""

    run: str
    seed: int = 0  # of the initial weights
    imports: tuple[str, ...] = ()  # modules of yours that define models
    init_from: str | None = None  # a run or checkpoint whose weights are the start
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    metrics: MetricsConfig = MetricsConfig()


@dataclass(frozen=True)
class Resolved:
    """A config whose derived values are filled in, with what they were derived from."""

    config: RunConfig
    plan: Plan
    timeline: Timeline
    total_steps: int

    @property
    def stop_samples(self) -> int:
        """Where the data ends for this run: epochs end with their last row, in the middle of a batch if need be."""
        length, end = self.config.train.length, self.plan.order.end
        samples = self.timeline.samples(length) if length.unit == "epochs" else self.timeline.samples_before(self.total_steps)
        return samples if end is None else min(samples, end)


def read_config(path: Path, words: list[str]) -> RunConfig:
    """A run file, or the configuration of an existing run folder, with `words` laid over it."""
    if path.is_dir():  # it may have been moved since
        return dataclasses.replace(load(RunConfig, path / "config.yaml", words), run=str(path))
    return load(RunConfig, path, words)


def resolve(settings: RunConfig, num_ranks: int) -> Resolved:
    """Fill in what follows from the data, and check all that can be checked without processes: one ConfigError says it all."""
    plan = open_plan(settings.data)
    model, vocab_size, problems = settings.model, plan.tokenizer["vocab_size"], []
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=vocab_size)  # type: ignore[type-var]
    elif model.vocab_size < vocab_size:
        problems.append(f"model.vocab_size: is {model.vocab_size}, but the tokenizer has {vocab_size} ids")
    if model.max_seq_len < settings.data.seq_len:
        problems.append(f"data.seq_len: is {settings.data.seq_len}, longer than model.max_seq_len {model.max_seq_len}")
    problems += [*model.problems(), *mesh.problems(settings.parallel, num_ranks, model, settings.data.seq_len)]
    if settings.train.float8 is not None and not problems:
        with torch.device("meta"):
            built = model.build()
        problems += float8.problems(settings.train.float8, settings.train.precision, settings.data.seq_len, built)
    if settings.init_from is not None:
        try:
            find(Path(settings.init_from).expanduser())
        except ConfigError as error:
            problems.append(f"init_from: {error}")
    try:
        stages = batch_stages(settings.train.batch_samples, settings.train.batch_ramp)
    except ValueError as error:
        raise problems_error("the run", [*problems, f"train.{error}"]) from None
    timeline = Timeline(stages, settings.data.seq_len, plan.order.epoch_samples)
    total_steps = timeline.steps(settings.train.length)
    if plan.order.end is not None:
        total_steps = min(total_steps, timeline.steps_for(plan.order.end))
    resolved = Resolved(dataclasses.replace(settings, model=model), plan, timeline, total_steps)
    if resolved.total_steps < 1 and settings.train.length.value:
        least = f"one step of {settings.train.batch_samples} samples"
        problems.append(f"train.length: '{settings.train.length}' is less than {least}")
    if settings.train.length.value:
        problems += optim.problems(settings.optim, timeline, settings.train.length)
    problems += plan.order.shortages(resolved.stop_samples)
    if problems:
        raise problems_error("the run", problems)
    return resolved
