"""The training run: build -> loop -> step. Pre-training and tuning, one process and many, start and resume are all this.

Floors below see sections of the configuration; only this room and those above it see the whole.
"""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import franca
import franca.models.llama
from franca.checkpoint import convert, sharded
from franca.checkpoint.sharded import CheckpointConfig
from franca.checkpoint.store import Checkpoint, Store, find
from franca.core.config import Precision, config, differences, load, problems_error, read_yaml, to_dict, to_yaml
from franca.core.config import merge as merge_values
from franca.core.duration import Clock, Duration, crossed
from franca.core.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RESUMABLE, ConfigError
from franca.core.run import RunFolder, write_atomically
from franca.core.schedule import BatchRamp, Timeline, batch_stages
from franca.data.loader import Batch, DataConfig, Loader, Plan, open_plan, validation_sets
from franca.models.base import ModelConfig
from franca.observe.metrics import Metrics, MetricsConfig
from franca.parallel import mesh, world
from franca.parallel.apply import parallelize
from franca.parallel.mesh import ParallelConfig
from franca.parallel.world import World
from franca.train import optim, validation
from franca.train.faults import Faults
from franca.train.optim import OptimConfig
from franca.train.validation import ValidationConfig, to_device


@config
class TrainConfig:
    """How long, in what portions, in what precision."""

    length: Duration
    batch_samples: int  # rows per step, over all ranks
    batch_ramp: BatchRamp | None = None
    micro_samples: int | None = None  # rows per rank and forward pass; None: the rank's whole share
    precision: Precision = "bf16"  # of the matrix products; parameters, gradients and moments are fp32
    log_every: Duration = Duration(10, "steps")


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
        length = self.config.train.length
        whole = self.timeline.samples_before(self.total_steps)
        return self.timeline.samples(length) if length.unit == "epochs" else whole


def read_config(path: Path, words: list[str]) -> RunConfig:
    """A run file, or the configuration of an existing run folder, with `words` laid over it."""
    return load(RunConfig, path / "config.yaml" if path.is_dir() else path, words)


def resolve(settings: RunConfig, num_ranks: int) -> Resolved:
    """Fill in what follows from the data, and check everything that can be checked before a process starts.

    Raises:
        ConfigError: with every problem found.
    """
    plan = open_plan(settings.data)
    model, problems = settings.model, []
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=plan.vocab_size)  # type: ignore[type-var]
    elif model.vocab_size < plan.vocab_size:
        problems.append(f"model.vocab_size: is {model.vocab_size}, but the tokenizer has {plan.vocab_size} ids")
    if model.max_seq_len < settings.data.seq_len:
        problems.append(f"data.seq_len: is {settings.data.seq_len}, longer than model.max_seq_len {model.max_seq_len}")
    problems += model.problems()
    problems += mesh.problems(settings.parallel, num_ranks) + validation.problems(settings.validation)
    problems += _cadence_problems(settings)
    try:
        stages = batch_stages(settings.train.batch_samples, settings.train.batch_ramp)
    except ValueError as error:
        raise problems_error("the run", [*problems, f"train.{error}"]) from None
    timeline = Timeline(stages, settings.data.seq_len, plan.order.epoch_samples)
    problems += _batch_problems(settings.train, timeline, num_ranks)
    if settings.train.length.unit == "seconds":
        raise problems_error(
            "the run", [*problems, f"train.length: is '{settings.train.length}', wall time; give steps or tokens"]
        )
    resolved = Resolved(dataclasses.replace(settings, model=model), plan, timeline, timeline.steps(settings.train.length))
    if resolved.total_steps < 1:
        problems.append(
            f"train.length: '{settings.train.length}' is less than one step of {settings.train.batch_samples} samples"
        )
    problems += optim.problems(settings.optim, timeline, settings.train.length)
    problems += plan.order.shortages(resolved.stop_samples)
    if problems:
        raise problems_error("the run", problems)
    return resolved


def _batch_problems(train: TrainConfig, timeline: Timeline, num_ranks: int) -> list[str]:
    if train.micro_samples is not None and train.micro_samples < 1:
        return [f"train.micro_samples: is {train.micro_samples}; it must be at least 1"]
    unit = num_ranks * (train.micro_samples or 1)
    uneven = [stage.batch_samples for stage in timeline.stages if stage.batch_samples % unit]
    if not uneven:
        return []
    shown = ", ".join(map(str, uneven[:3])) + (", ..." if len(uneven) > 3 else "")
    micro = f" x micro_samples {train.micro_samples}" if train.micro_samples else ""
    return [f"train.batch_samples: {shown} does not divide by {num_ranks} rank(s){micro} = {unit}; use a multiple of {unit}"]


def _cadence_problems(settings: RunConfig) -> list[str]:
    found = []
    for name, every in (("train.log_every", settings.train.log_every), ("checkpoint.every", settings.checkpoint.every)):
        if not every.value:
            found.append(f"{name}: is '{every}'; it must be above 0")
    if settings.train.log_every.unit == "seconds":
        found.append(f"train.log_every: is '{settings.train.log_every}'; give it in steps, samples, tokens or epochs")
    if settings.checkpoint.keep is not None and settings.checkpoint.keep < 1:
        found.append(f"checkpoint.keep: is {settings.checkpoint.keep}; keep at least 1, or null for all")
    return found


def main(path: Path, words: list[str]) -> int:
    """`franca train`: run until the end or until told to stop. Returns the exit code."""
    here = world.start()
    try:
        with Faults() as faults:
            settings = _agreed_config(path, words, here)
            return run(settings, here, faults, base=merge_values(read_yaml(path), {}) if path.is_file() else None)
    finally:
        world.stop()


def _agreed_config(path: Path, words: list[str], here: World) -> RunConfig:
    """Let rank 0 look for problems first, so that a wrong config is reported once and not by every rank."""
    message = None
    if here.is_main:
        try:
            resolve(read_config(path, words), here.size)
        except ConfigError as error:
            message = str(error)
    message = here.from_main(message)
    if message is not None:
        if here.is_main:
            raise ConfigError(message)
        sys.exit(EXIT_CONFIG)
    return read_config(path, words)


@dataclass
class Run:
    """Everything that a run needs, built; `step` is what changes."""

    resolved: Resolved
    world: World
    faults: Faults
    folder: RunFolder
    store: Store
    attempt: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    metrics: Metrics
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    saved_step: int | None = None
    pending: list["Noted"] = field(default_factory=list)
    logged: float = field(default_factory=time.monotonic)

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def clock(self) -> Clock:
        return self.resolved.timeline.clock(self.step, time.monotonic() - self.began)


@dataclass(frozen=True)
class Noted:
    """The numbers of one step, on the device until a log step fetches them."""

    step: int
    sums: dict[str, Tensor]
    grad_norm: Tensor
    num_valid: float
    lr: float


def run(settings: RunConfig, here: World, faults: Faults, base: dict[str, Any] | None = None) -> int:
    """One attempt at a run, from nothing or from its newest good checkpoint. Returns the exit code."""
    resolved = resolve(settings, here.size)
    folder = RunFolder(settings.run)
    attempt = _open_folder(folder, resolved, here, base)
    metrics_config = settings.metrics if here.is_main else MetricsConfig(sinks=())
    with Metrics(metrics_config, folder, attempt, resolved.total_steps) as metrics:
        built = build(resolved, here, faults, folder, attempt, metrics)
        code = loop(built)
        if here.is_main:
            reason = f"stopped by {faults.received or 'another rank'}" if code == EXIT_RESUMABLE else "done"
            folder.event("exit", attempt, step=built.step, code=code, reason=reason)
            again = "; run the same command again to go on" if code == EXIT_RESUMABLE else ""
            metrics.say(f"{reason} at step {built.step} of {resolved.total_steps}, saved in {settings.run}{again}")
    return code


def _open_folder(folder: RunFolder, resolved: Resolved, here: World, base: dict[str, Any] | None) -> int:
    """Write down what is about to run, on rank 0; returns the number of this attempt."""
    attempt = 0
    if here.is_main:
        folder.create()
        attempt = folder.next_attempt()
        code = folder.snapshot_code(Path(franca.__file__).parent)
        folder.write_environment(world.environment(here))
        if base is not None and not folder.base_config.exists():
            write_atomically(folder.base_config, json.dumps(base, indent=2))
        write_atomically(folder.config, to_yaml(resolved.config))
        folder.event("start", attempt, world_size=here.size, code=code, plan=resolved.plan.fingerprint)
        Store(folder.checkpoints).tidy()
    return int(here.from_main(attempt))


def build(resolved: Resolved, here: World, faults: Faults, folder: RunFolder, attempt: int, metrics: Metrics) -> Run:
    """Model, optimizer and loader, at the state of the newest good checkpoint if there is one."""
    settings = resolved.config
    with torch.device("meta"):
        model = settings.model.build()
    devices = mesh.make(here.size, here.device)
    parallelize(model, devices, settings.parallel, settings.train.precision, here.device, settings.seed)
    optimizer = optim.build(model, settings.optim)
    plan, timeline = resolved.plan, resolved.timeline
    loader = Loader(plan.order, plan.shards, timeline, resolved.stop_samples, settings.data.attention)
    store = Store(folder.checkpoints)
    built = Run(resolved, here, faults, folder, store, attempt, model, optimizer, loader, metrics)
    resume(built)
    return built


def resume(built: Run) -> None:
    """Go to the newest good checkpoint; without one, to the weights of `init_from`, or stay at the initial ones."""

    def on_damage(checkpoint: Checkpoint, damage: list[str]) -> None:
        if built.world.is_main:
            built.folder.event("damaged_checkpoint", built.attempt, step=checkpoint.step, damage=damage)
            built.metrics.say(f"checkpoint {checkpoint.step} is damaged ({'; '.join(damage)}): trying the one before it")

    checkpoint = sharded.newest_good(built.store, built.world, on_damage)
    if checkpoint is not None:
        _refuse_other_data(built, checkpoint)
        sharded.load(checkpoint, state(built), built.world.size)
        built.step = built.saved_step = checkpoint.step
    elif built.config.init_from is not None:
        weights = {name: tensor for name, tensor in state(built).items() if name.startswith("model.")}
        sharded.load(find(Path(built.config.init_from)), weights, built.world.size)
    if built.world.is_main:
        built.metrics.roll_back(built.step)
        if checkpoint is not None:
            changes = differences(checkpoint.meta["config"], to_dict(built.config))
            built.folder.event("resume", built.attempt, step=checkpoint.step, changes=changes)
            shown = "".join(f"\n  {path}: {old!r} -> {new!r}" for path, old, new in changes)
            built.metrics.say(f"resumed at step {built.step}" + (f", with changes:{shown}" if shown else ""))


def _refuse_other_data(built: Run, checkpoint: Checkpoint) -> None:
    """What may not change in the middle of a run: the model's shape (checked by the load), the tokenizer, the data plan."""
    meta, plan = checkpoint.meta, built.resolved.plan
    if meta["tokenizer"] != plan.tokenizer_fingerprint:
        raise ConfigError(f"{checkpoint.path}: was trained with another tokenizer. Start a new run folder (run=...).")
    if meta["plan"] != plan.fingerprint:
        changed = differences(meta["config"]["data"], to_dict(built.config.data))
        shown = "; ".join(f"data.{path}: {old!r} -> {new!r}" for path, old, new in changed) or "the files of a dataset changed"
        raise ConfigError(
            f"{checkpoint.path}: its data plan is another one ({shown}): samples would be repeated or lost. "
            "Restore the data section, or start a new run folder with init_from."
        )
    samples = built.resolved.timeline.samples_before(checkpoint.step)
    if meta["samples"] != samples:
        raise ConfigError(
            f"{checkpoint.path}: had seen {meta['samples']} samples at step {checkpoint.step}; with this batch plan it is "
            f"{samples}. Restore train.batch_samples and train.batch_ramp, or start a new run folder with init_from."
        )


def state(built: Run) -> dict[str, Tensor]:
    """All tensors that a resume needs. The clock, and with it every schedule, follows from the step."""
    model = {f"model.{name}": parameter.detach() for name, parameter in built.model.named_parameters()}
    return model | optim.state_tensors(built.model, built.optimizer)


def loop(built: Run) -> int:
    """Step after step until the end or a verdict to stop. Returns the exit code."""
    settings, faults, here = built.config, built.faults, built.world
    steps = range(built.step, built.resolved.total_steps)
    before = built.clock
    for batch in built.loader.ahead(steps, here.rank, here.size):
        now = built.clock
        verdict = faults.agree(here, batch.num_valid, crossed(settings.checkpoint.every, before, now))
        before = now
        if verdict.save:
            save(built)
        if verdict.stop:
            return EXIT_RESUMABLE
        built.pending.append(step(built, batch, verdict.num_valid))
        before_step, built.step = built.resolved.timeline.clock(built.step), built.step + 1
        after_step = built.resolved.timeline.clock(built.step)
        if crossed(settings.train.log_every, before_step, after_step):
            log(built)
        if settings.validation.every is not None and crossed(settings.validation.every, before_step, after_step):
            validate(built)
    save(built)
    if settings.validation.at_end and not _validated_at(built):
        validate(built)
    return EXIT_DONE


def step(built: Run, batch: Batch, num_valid: float) -> Noted:
    """One optimizer step: accumulate the gradient over micro-batches, clip it, move the weights. Nothing waits for a device."""
    settings, contract = built.config, built.model
    lr = optim.lr_at(settings.optim, built.resolved.timeline, settings.train.length, built.step)
    rows = len(batch.tokens_BT)
    micro = settings.train.micro_samples or rows
    scale = built.world.size / max(num_valid, 1.0)  # FSDP2 averages over the ranks; a sum over all valid tokens is wanted
    sums: dict[str, Tensor] = {}
    for first in range(0, rows, micro):
        last = first + micro >= rows
        if built.world.size > 1:
            contract.set_requires_gradient_sync(last)  # type: ignore[operator]
        losses = contract.losses(to_device(_slice(batch, first, micro), built.world.device))  # type: ignore[operator]
        (torch.stack(list(losses.values())).sum() * scale).backward()
        sums = {name: value.detach() + sums.get(name, 0.0) for name, value in losses.items()}
    grad_norm = clip(built.model, settings.optim.clip_norm)
    optim.set_lr(built.optimizer, lr)
    built.optimizer.step()
    built.optimizer.zero_grad(set_to_none=True)
    return Noted(built.step + 1, sums, grad_norm, num_valid, lr)


def _slice(batch: Batch, first: int, count: int) -> Batch:
    arrays = (batch.tokens_BT, batch.targets_BT, batch.document_BT, batch.position_BT)
    return Batch(*(array[first : first + count] if array is not None else None for array in arrays))  # type: ignore[arg-type]


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm` if it is longer (0: never); its length before that, the same on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def log(built: Run) -> None:
    """Fetch the numbers of the steps since the last time, all at once, and hand them to the sinks.

    Raises:
        FloatingPointError: on every rank, when a loss is not a number.
    """
    if not built.pending:
        return
    noted, built.pending = built.pending, []
    names = list(noted[0].sums)
    sums = built.world.gather_sum(torch.stack([torch.stack([note.sums[name] for name in names]).double() for note in noted]))
    norms = torch.stack([note.grad_norm for note in noted]).tolist()
    now = time.monotonic()
    step_s, built.logged = (now - built.logged) / len(noted), now
    timeline = built.resolved.timeline
    record: dict[str, Any] = {}
    for note, values, norm in zip(noted, sums.tolist(), norms, strict=True):
        terms = {name: value / max(note.num_valid, 1.0) for name, value in zip(names, values, strict=True)}
        clock = timeline.clock(note.step)
        record = {
            "step": note.step,
            "samples": clock.samples,
            "tokens": clock.tokens,
            "loss": sum(terms.values()),
            **terms,
            "lr": note.lr,
            "grad_norm": norm,
            "step_s": step_s,
            "tokens_per_s": timeline.batch_samples(note.step - 1) * timeline.seq_len / step_s,
            "time": time.time(),
        }
        if built.world.is_main:
            built.metrics.train(record)
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"the loss is {record['loss']} at step {note.step}: lower optim.lr or look at the data")
    if built.world.is_main:
        built.metrics.progress(record, step_s * (built.resolved.total_steps - built.step))


def save(built: Run) -> None:
    """Write and commit a checkpoint of this step, unless it is there already; then delete what need not be kept."""
    log(built)
    if built.saved_step == built.step:
        return
    begin = time.monotonic()
    settings, plan, clock = built.config, built.resolved.plan, built.clock
    facts = {
        "samples": clock.samples,
        "tokens": clock.tokens,
        "attempt": built.attempt,
        "plan": plan.fingerprint,
        "tokenizer": plan.tokenizer_fingerprint,
        "config": to_dict(settings),
    }
    manifest = plan.datasets[0].manifest["tokenizer"]
    params = convert.params(settings.model, {"bos": manifest["bos"], "eos": manifest["eos"]})

    def beside(folder: Path) -> None:
        convert.write_params(folder, params, plan.datasets[0].tokenizer_path)

    sharded.save(built.store, built.step, state(built), facts, beside, built.world)
    built.saved_step = built.step
    if built.world.is_main:
        deleted = built.store.retain(settings.checkpoint.keep)
        seconds = time.monotonic() - begin
        built.folder.event("save", built.attempt, step=built.step, seconds=seconds, deleted=deleted)
        built.metrics.say(f"saved step {built.step} in {seconds:.1f} s")
    built.logged = time.monotonic()  # the time of a save is not the time of a step


def _validated_at(built: Run) -> bool:
    every = built.config.validation.every
    clock = built.resolved.timeline.clock
    return every is not None and built.step > 0 and crossed(every, clock(built.step - 1), clock(built.step))


def validate(built: Run) -> None:
    """The held-out loss of every set of the data, on the live model."""
    log(built)
    train = built.config.train
    micro = built.config.validation.micro_samples or train.micro_samples or max(1, train.batch_samples // built.world.size)
    for name, (loader, facts) in validation_sets(built.resolved.plan, built.config.data).items():
        values = validation.measure(built.model, loader, facts, micro, built.world)
        if built.world.is_main:
            clock = built.clock
            built.metrics.validation(
                {"step": built.step, "samples": clock.samples, "tokens": clock.tokens, "set": name, **values}
            )
            built.metrics.say(f"validation {name}: loss {values['loss']:.4f}, {values['bits_per_byte']:.4f} bits per byte")
    built.logged = time.monotonic()
