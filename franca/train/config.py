"""The whole configuration of a run: its sections put together, its derived values filled in, everything checked.

The checks are the same for `franca plan` and `franca train`: what the planner lets through starts. Floors below see sections
only; this room and those above it see the whole.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import franca.models.hybrid
import franca.train.muon  # noqa: F401 (joins the choice of optimizers)
from franca.checkpoint.sharded import CheckpointConfig
from franca.checkpoint.store import find
from franca.core.config import Count, Precision, config, load, problems_error
from franca.core.duration import Duration, Length, RepeatableCadence
from franca.core.errors import ConfigError
from franca.core.schedule import BatchRamp, Stage, Timeline, batch_stages, joined, listed_stages
from franca.data.loader import DataConfig, Plan, open_plan
from franca.models.base import ModelConfig, count_parameters
from franca.observe.metrics import MetricsConfig
from franca.parallel import float8, mesh
from franca.parallel.float8 import Float8Config
from franca.parallel.mesh import ParallelConfig
from franca.train import optim
from franca.train.adamw import AdamWConfig
from franca.train.optim import OptimConfig
from franca.train.scale import LossScaleConfig
from franca.train.validation import ValidationConfig


@config
class TrainConfig:
    """How long, in what portions, in what precision."""

    length: Length  # 1 chinchilla: 20 tokens per parameter, embeddings counted; 0 steps: the initial weights, for `init_from`
    batch_samples: Count  # rows per step, over all ranks
    batch_ramp: BatchRamp | None = None  # up to batch_samples, or
    batch_stages: tuple[tuple[Length, Count], ...] = ()  # [start, batch_samples] one after the other; the last is batch_samples
    micro_samples: Count | None = None  # rows per rank and forward pass; None: the rank's whole share
    precision: Precision = "bf16"  # of the matrix products; parameters (see optim), gradients and their sums are fp32
    loss_scale: LossScaleConfig | None = None  # of fp16; None: its defaults
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
    optim: OptimConfig = AdamWConfig()
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

    @property
    def total_steps(self) -> int:
        """The length of the run, or of the data if that ends before."""
        steps, end = self.timeline.steps(self.config.train.length), self.plan.order.end
        return steps if end is None else min(steps, self.timeline.steps_for(end))

    @property
    def stop_samples(self) -> int:
        """Where the data ends for this run: epochs end with their last row, in the middle of a batch if need be."""
        length, end = self.config.train.length, self.plan.order.end
        samples = self.timeline.samples(length) if length.unit == "epochs" else self.timeline.samples_before(self.total_steps)
        return samples if end is None else min(samples, end)

    def continued(self, meta: Mapping[str, Any]) -> "Resolved":
        """The run from a checkpoint on, by its meta.json: what was taken stays taken, and the batch plan goes on from there."""
        past = [Stage(*stage) for stage in meta["batch_stages"]]
        planned = _stages(self.config.train, self.timeline, meta["step"], meta["samples"])
        return dataclasses.replace(self, timeline=dataclasses.replace(self.timeline, stages=joined(past, planned)))


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
    if model.problems():  # without a model there are no FLOPs, and so no lengths
        raise problems_error("the run", problems)
    with torch.device("meta"):
        built = model.build()
    sizes = built.flops_per_token(settings.data.seq_len), count_parameters(built)["total"]
    timeline = Timeline((), settings.data.seq_len, plan.order.epoch_samples, *sizes)
    try:
        timeline = dataclasses.replace(timeline, stages=_stages(settings.train, timeline))
    except ValueError as error:
        raise problems_error("the run", [*problems, f"train.{error}"]) from None
    resolved = Resolved(dataclasses.replace(settings, model=model), plan, timeline)
    with suppress(ConfigError, KeyError):  # a run that has not begun; or its checkpoint is no good, as the resume will say
        resolved = resolved.continued(find(Path(settings.run).expanduser()).meta)
    if settings.train.length.value:
        if resolved.total_steps < 1:
            least = f"one step of {settings.train.batch_samples} samples"
            problems.append(f"train.length: '{settings.train.length}' is less than {least}")
        problems += optim.problems(settings.optim, resolved.timeline, settings.train.length)
    problems += _precision_problems(settings)
    if settings.optim.groups:
        problems += optim.group_problems(built, settings.optim)
    problems += plan.order.shortages(resolved.stop_samples)
    if problems:
        raise problems_error("the run", problems)
    return resolved


def _precision_problems(settings: RunConfig) -> list[str]:
    found, precision = [], settings.train.precision
    if settings.train.loss_scale is not None and precision != "fp16":
        found.append(f"train.loss_scale: has no effect on train.precision {precision}; leave it out, or train in fp16")
    if settings.optim.bf16_params is not None and precision != "bf16":
        found.append(f"optim.bf16_params: parameters in bf16 are for train.precision bf16, not {precision}; leave it out")
    return found


def _stages(train: TrainConfig, scale: Timeline, step: int = 0, samples: int = 0) -> tuple[Stage, ...]:
    """The batch plan from (step, samples) on. Raises ValueError, of which the key is the first word."""
    if not train.batch_stages:
        return batch_stages(train.batch_samples, train.batch_ramp, step, samples)
    if train.batch_ramp is not None:
        raise ValueError("batch_stages: is given beside batch_ramp; give one of them")
    if (last := train.batch_stages[-1][1]) != train.batch_samples:
        raise ValueError(f"batch_stages: ends with {last} samples, but batch_samples is {train.batch_samples}; make them equal")
    return listed_stages(train.batch_stages, scale, step, samples)
