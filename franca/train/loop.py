"""The training run: start -> build -> loop -> step. Pre-training and tuning, one process and many, start and resume: all this.

There are no callbacks: what happens, and in which order, is what stands here.
"""

import dataclasses
import math
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import franca
from franca.checkpoint import convert, sharded
from franca.checkpoint.store import Checkpoint, Store, find
from franca.core.config import differences, to_dict, to_yaml
from franca.core.duration import crossed
from franca.core.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RESUMABLE, ConfigError
from franca.core.run import RunFolder, write_atomically
from franca.data.loader import Batch, Loader, validation_sets
from franca.observe.metrics import Metrics
from franca.parallel import apply, mesh, world
from franca.parallel.apply import DTYPES
from franca.parallel.mesh import Mesh
from franca.parallel.pipeline import Pipeline
from franca.parallel.world import World
from franca.train import optim, validation
from franca.train.care import Care
from franca.train.config import Resolved, RunConfig, read_config, resolve
from franca.train.faults import Faults
from franca.train.optim import Optimizer
from franca.train.scale import LossScale, LossScaleConfig
from franca.train.validation import to_device


@dataclass
class Run:
    """One attempt at a run, built. `step` counts the finished steps; it alone says where the data and the schedules stand."""

    resolved: Resolved
    world: World
    mesh: Mesh
    faults: Faults
    folder: RunFolder
    attempt: int
    metrics: Metrics
    model: nn.Module
    optimizer: Optimizer
    loss_scale: LossScale | None  # of fp16
    loader: Loader
    step: int = 0
    saved_step: int | None = None
    noted: list["Noted"] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # steps, from 0, that changed nothing: their gradient was not finite
    checked: int = 0  # the steps before it are known to be skipped or not
    began: float = field(default_factory=time.monotonic)
    logged: float = field(default_factory=time.monotonic)

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def known_skips(self) -> tuple[int, ...]:
        """The skipped steps that the rate of `step` knows of.

        fp16 waits for every step, as its overflows are many; other precisions look one step late, so that a device always
        has a step to work on.
        """
        return tuple(step for step in self.skipped if step < self.step - (self.loss_scale is None))


@dataclass(frozen=True)
class Noted:
    """The numbers of one step, left on the device until a log step fetches them."""

    step: int
    sums: dict[str, Tensor]
    grad_norm: Tensor
    found_inf: Tensor  # 1: the step was skipped
    loss_scale: Tensor | None
    num_valid: float
    lr: float


def main(path: Path, words: list[str]) -> int:
    """`franca train`: run to the end, or until told to stop. Returns the exit code."""
    here = world.start()
    with Faults() as faults:
        code = start(agreed_config(path, words, here), here, faults, path)
    world.stop()  # not after an exception: leaving a group is a collective
    return code


def agreed_config(path: Path, words: list[str], here: World) -> RunConfig:
    """Let rank 0 look for problems first, so that a wrong config is reported once and not by every rank."""
    problem = None
    if here.is_main:
        try:
            resolve(read_config(path, words), here.size)
        except ConfigError as error:
            problem = error
    if here.from_main(problem is not None):
        raise problem or SystemExit(EXIT_CONFIG)
    return read_config(path, words)


def start(settings: RunConfig, here: World, faults: Faults, path: Path | None = None) -> int:
    """One attempt at a run, from nothing or from its newest good checkpoint. Returns the exit code."""
    resolved = resolve(settings, here.size)
    folder = RunFolder(Path(settings.run).expanduser())
    world.set_deterministic(settings.train.deterministic, here.device)
    with folder.lock() if here.is_main else nullcontext():
        attempt = open_folder(folder, resolved, here, path)
        here.dump_flights_to(folder.logs / f"collectives_attempt{attempt}_rank")
        with Metrics(settings.metrics, folder, attempt, resolved.total_steps, speaking=here.is_main) as metrics:
            bits = "on" if settings.train.deterministic else "off (train.deterministic)"
            metrics.say(f"attempt {attempt}, {here.size} rank(s) on {here.device.type}: deterministic algorithms are {bits}")
            try:
                run = build(resolved, here, faults, folder, attempt, metrics)
                if here.is_main:  # not before: what a resume refuses must not become the run's configuration
                    write_atomically(folder.config, to_yaml(resolved.config))
                with Care(here, settings.parallel) as care:
                    code = loop(run, care)
            except Exception as error:
                if here.is_main:
                    folder.event("exit", attempt, code=1, reason=f"{type(error).__name__}: {error}")
                raise
            if here.is_main:
                farewell(run, code)
    return code


def open_folder(folder: RunFolder, resolved: Resolved, here: World, path: Path | None) -> int:
    """Write down, on rank 0, what is about to run; returns the number of this attempt."""
    attempt = 0
    if here.is_main:
        attempt = folder.next_attempt()
        modules = [Path(str(sys.modules[name].__file__)) for name in resolved.config.imports]
        code = folder.snapshot_code(Path(franca.__file__).parent, modules)
        folder.write_environment(world.environment(here))
        if path is not None and path.is_file() and not folder.base_config.exists():
            write_atomically(folder.base_config, path.read_bytes())
        folder.logs.mkdir(exist_ok=True)
        deterministic = resolved.config.train.deterministic
        plan = resolved.plan.order.fingerprint()
        folder.event("start", attempt, world_size=here.size, code=code, plan=plan, deterministic=deterministic)
        Store(folder.checkpoints).tidy()
    return int(here.from_main(attempt))


def build(resolved: Resolved, here: World, faults: Faults, folder: RunFolder, attempt: int, metrics: Metrics) -> Run:
    """Model, optimizer and loader, in the state of the newest good checkpoint if there is one."""
    settings, plan = resolved.config, resolved.plan
    place, train = mesh.make(settings.parallel, here.size, here.rank, here.device), settings.train
    model = apply.build(
        lambda: on_meta(settings),
        place,
        settings.parallel,
        train.precision,
        here.device,
        settings.seed,
        train.float8,
        settings.data.seq_len,
    )
    optimizer = Optimizer(model, settings.optim, settings.seed, DTYPES[train.precision])
    loss_scale = LossScale(train.loss_scale or LossScaleConfig(), here.device) if train.precision == "fp16" else None
    loader = Loader(plan.order, plan.shards, resolved.timeline, resolved.stop_samples, settings.data.attention)
    run = Run(resolved, here, place, faults, folder, attempt, metrics, model, optimizer, loss_scale, loader)
    if attempt == 1:
        metrics.say(optim.table_text(on_meta(settings), settings.optim))
    resume(run)
    return run


def on_meta(settings: RunConfig) -> nn.Module:
    """The model without memory, its parameters in their dtype."""
    with torch.device("meta"):
        model: nn.Module = settings.model.build()
    if settings.optim.bf16_params is not None:  # buffers stay as exact as they are
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


def loop(run: Run, care: Care) -> int:
    """Step after step to the end, or to a verdict to stop. Returns the exit code."""
    settings, timeline = run.config, run.resolved.timeline
    validate_every = settings.validation.every
    now = timeline.clock(run.step)
    save_due = False
    for batch in run.loader.ahead(range(run.step, run.resolved.total_steps), run.mesh.dp_rank, run.mesh.dp_size):
        verdict = run.faults.agree(run.world, batch.num_valid if run.mesh.counts_rows else 0, save_due)
        if verdict.save:
            save(run)
        if verdict.stop:
            return EXIT_RESUMABLE
        care.step()
        run.noted.append(step(run, batch, verdict.num_valid))
        run.step += 1
        note_skips(run, run.step - (run.loss_scale is None))
        before, now = now, timeline.clock(run.step, time.monotonic() - run.began)
        if crossed(settings.train.log_every, before, now):
            log(run)
        if validate_every is not None and crossed(validate_every, before, now):
            validate(run)
        save_due = crossed(settings.checkpoint.every, before, now)
    save(run)
    if settings.validation.at_end:
        validate(run)
    return EXIT_DONE


def step(run: Run, batch: Batch, num_valid: float) -> Noted:
    """One optimizer step: gradients of the micro-batches added up, clipped, applied. Nothing here waits for a device."""
    settings, model = run.config, run.model
    lr = optim.lr_at(settings.optim, run.resolved.timeline, settings.train.length, run.step, run.known_skips)
    # The mean over all valid tokens of the step. FSDP2 averages over its ranks; times their number, that is a sum.
    scale: float | Tensor = run.mesh.gradient_parts / max(num_valid, 1.0)
    loss_scale = None if run.loss_scale is None else run.loss_scale.scale.clone()
    if loss_scale is not None:
        scale = scale * loss_scale
    sums = gradients(run, batch, scale)
    grad_norm = optim.clip(model, settings.optim.clip_norm, loss_scale)
    found_inf = (~grad_norm.isfinite()).float()
    run.optimizer.step(lr, found_inf, run.step)
    run.optimizer.zero_grad()
    if run.loss_scale is not None:
        run.loss_scale.update(found_inf)
    return Noted(run.step + 1, sums, grad_norm, found_inf, loss_scale, num_valid, lr)


def gradients(run: Run, batch: Batch, scale: float | Tensor) -> dict[str, Tensor]:
    """The gradient of `scale` times the sum of all losses, micro-batch by micro-batch; returns the named sums of losses."""
    model, rows, device = run.model, len(batch.tokens_BT), run.world.device
    micro = run.config.train.micro_samples or -(-rows // run.mesh.sizes["pp"])

    def draw(first: int, stage: int = 0) -> None:
        """What a model draws (dropout) follows from the place, as the data do."""
        place = f"{run.config.seed} {run.step} {first} {run.world.rank}" + (f" {stage}" if stage else "")
        torch.manual_seed(random.Random(place).getrandbits(63))

    if isinstance(model, Pipeline):
        return model.step(to_device(batch, device), micro, scale, draw)
    sums: dict[str, Tensor] = {}
    for first in range(0, rows, micro):
        if run.mesh.fsdp is not None:
            model.set_requires_gradient_sync(first + micro >= rows)  # type: ignore[operator]
        draw(first)
        losses = model.losses(to_device(batch.part(first, micro), device))  # type: ignore[operator]
        (torch.stack(list(losses.values())).sum() * scale).backward()
        sums = {name: value.detach() + sums.get(name, 0.0) for name, value in losses.items()}
    return sums


def note_skips(run: Run, before: int) -> None:
    """Learn which of the steps below `before` were skipped; this waits for the device to finish them."""
    run.skipped += [note.step - 1 for note in run.noted if run.checked < note.step <= before and note.found_inf]
    run.checked = max(run.checked, before)


def log(run: Run) -> None:
    """Fetch the numbers of all steps since the last time in one go, and hand them to the sinks; losses in nats per token.

    Raises FloatingPointError on every rank, when a loss or a gradient is not a number and `optim.max_skipped` does not forgive
    it. The weights are then still those of the last finite gradient.
    """
    if not run.noted:
        return
    note_skips(run, run.step)
    timeline, noted, run.noted = run.resolved.timeline, run.noted, []
    mine = torch.stack([torch.stack(list(note.sums.values())).double() for note in noted])
    sums = run.world.gather_sum(mine * run.mesh.counts_losses).tolist()
    norms = torch.stack([note.grad_norm for note in noted]).tolist()
    now = time.monotonic()
    step_s, run.logged = (now - run.logged) / len(noted), now
    for note, values, norm in zip(noted, sums, norms, strict=True):
        clock = timeline.clock(note.step)
        terms = {name: value / max(note.num_valid, 1.0) for name, value in zip(note.sums, values, strict=True)}
        total = sum(terms.values())
        record = {
            "step": note.step,
            "samples": clock.samples,
            "tokens": clock.tokens,
            "loss": terms["nll"],
            **terms,
            **({"total_loss": total} if len(terms) > 1 else {}),
            "lr": note.lr,
            "grad_norm": norm,
            "skipped": sum(step < note.step for step in run.skipped),
            **({} if note.loss_scale is None else {"loss_scale": note.loss_scale.item()}),
            "step_s": step_s,
            "tokens_per_s": timeline.batch_samples(note.step - 1) * timeline.seq_len / step_s,
            "time": time.time(),
        }
        run.metrics.train(record)
        if not math.isfinite(total + norm) and not forgiven(run, note):
            what = f"the loss is {total} and the gradient's norm {norm} at step {note.step}"
            raise FloatingPointError(f"{what}: lower optim.lr, or look at the data. The last checkpoint is untouched")
    run.metrics.progress(record, step_s * (run.resolved.total_steps - run.step))


def forgiven(run: Run, note: Noted) -> bool:
    """Whether a step that is not finite may pass: it was skipped, and it is fp16's scale that is too large, or one of a few."""
    if note.step - 1 not in run.skipped:
        return False
    if note.loss_scale is not None and run.loss_scale is not None and note.loss_scale > run.loss_scale.settings.min:
        return True
    last = range(note.step - 1 - run.config.optim.max_skipped, note.step)
    return not all(step in run.skipped for step in last)


def validate(run: Run) -> None:
    """The held-out loss of every set of the data, on the live model; once per step, also when a finished run is run again."""
    log(run)
    train, timeline = run.config.train, run.resolved.timeline
    micro = run.config.validation.micro_samples or train.micro_samples or max(1, train.batch_samples // run.mesh.dp_size)
    for name, (loader, facts) in validation_sets(run.resolved.plan, run.config.data).items():
        if run.world.from_main(run.metrics.has_validation(name, run.step)):
            continue
        values = validation.measure(run.model, loader, facts, micro, run.world, run.mesh)
        if run.config.optim.ema is not None:
            with run.optimizer.averaged():
                average = validation.measure(run.model, loader, facts, micro, run.world, run.mesh)
            values |= {f"ema_{key}": value for key, value in average.items()}
        clock = timeline.clock(run.step)
        run.metrics.validation({"step": run.step, "samples": clock.samples, "tokens": clock.tokens, "set": name, **values})
        run.metrics.say(f"validation {name}: loss {values['loss']:.4f}, {values['bits_per_byte']:.4f} bits per byte")
    run.logged = time.monotonic()  # the time of a validation is not the time of a step


def state(run: Run) -> dict[str, Tensor]:
    """All tensors that a resume needs. Everything else (data order, rates, batch sizes) follows from the step."""
    model = {f"model.{name}": parameter.detach() for name, parameter in run.model.named_parameters()}
    scale = {} if run.loss_scale is None else run.loss_scale.state_tensors()
    return model | optim.state_tensors(run.model, run.optimizer) | scale


def save(run: Run) -> None:
    """Write and commit a checkpoint of this step, unless it is there already; then delete what need not be kept."""
    log(run)
    if run.saved_step == run.step:
        return
    begin = time.monotonic()
    plan, clock = run.resolved.plan, run.resolved.timeline.clock(run.step)
    samples = min(clock.samples, run.resolved.stop_samples)
    facts = {
        "samples": samples,
        "tokens": clock.tokens,
        "batch_stages": [dataclasses.astuple(s) for s in run.resolved.timeline.stages if s.step < run.step],
        "attempt": run.attempt,
        "plan": plan.order.fingerprint(samples),
        "skipped": run.skipped,
        "tokenizer": plan.tokenizer["sha256"],
        "config": to_dict(run.config),
    }
    special = {name: plan.tokenizer[name] for name in ("bos", "eos")}
    beside = convert.params_writer(run.config.model, special, plan.datasets[0].tokenizer_path)
    store = Store(run.folder.checkpoints)
    sharded.save(store, run.step, state(run), facts, beside, run.world)
    run.saved_step = run.step
    if run.world.is_main:
        deleted = store.retain(run.config.checkpoint.keep)
        seconds = time.monotonic() - begin
        run.folder.event("save", run.attempt, step=run.step, seconds=seconds, deleted=deleted)
        run.metrics.say(f"saved step {run.step} in {seconds:.1f} s")
    run.logged = time.monotonic()


def resume(run: Run) -> None:
    """Go to the newest good checkpoint; without one, to the weights of `init_from`, or stay at the initial ones."""
    checkpoint, damaged = sharded.newest_good(Store(run.folder.checkpoints), run.world)
    for step, damage in damaged.items() if run.world.is_main else ():
        run.folder.event("damaged_checkpoint", run.attempt, step=step, damage=damage)
        run.metrics.say(f"checkpoint {step} is damaged ({'; '.join(damage)}): trying the one before it")
    if damaged and checkpoint is None:
        steps = ", ".join(map(str, damaged))
        raise ConfigError(f"{run.folder.checkpoints}: no checkpoint can be read (steps {steps}). Mend them, or move them away")
    if checkpoint is not None:
        refuse_other_data(run, checkpoint)
        sharded.load(checkpoint, state(run), run.world.size)
        run.step = run.saved_step = run.checked = checkpoint.step
        run.skipped = list(checkpoint.meta.get("skipped", ()))
        run.resolved = run.resolved.continued(checkpoint.meta)  # its batches may have been others
        run.loader.timeline, run.loader.stop = run.resolved.timeline, run.resolved.stop_samples
        run.metrics.total_steps = run.resolved.total_steps
    elif run.config.init_from is not None:
        weights = {name: tensor for name, tensor in state(run).items() if name.startswith("model.")}
        sharded.load(find(Path(run.config.init_from).expanduser(), whole=True), weights, run.world.size)
    if run.world.is_main:
        run.metrics.roll_back(run.step)
        if checkpoint is not None:
            changes = differences(checkpoint.meta["config"], to_dict(run.config))
            run.folder.event("resume", run.attempt, step=checkpoint.step, changes=changes)
            shown = "".join(f"\n  {path}: {old!r} -> {new!r}" for path, old, new in changes)
            run.metrics.say(f"resumed at step {run.step}" + (f", with changes:{shown}" if shown else ""))
    run.logged = time.monotonic()


def refuse_other_data(run: Run, checkpoint: Checkpoint) -> None:
    """What may not change in a run: the tokenizer, the data plan, the samples before this step (the model: see the load)."""
    meta, plan = checkpoint.meta, run.resolved.plan
    if meta.get("weights_only"):
        raise ConfigError(f"{checkpoint.path}: holds weights alone, nothing to resume. Start a new run folder with init_from.")
    if meta["tokenizer"] != plan.tokenizer["sha256"]:
        raise ConfigError(f"{checkpoint.path}: was trained with another tokenizer. Start a new run folder (run=...).")
    if meta["plan"] != plan.order.fingerprint(meta["samples"]):
        changed = differences(meta["config"]["data"], to_dict(run.config.data))
        shown = "; ".join(f"data.{path}: {old!r} -> {new!r}" for path, old, new in changed) or "the files of a dataset changed"
        raise ConfigError(
            f"{checkpoint.path}: its data plan is another one ({shown}): samples would be repeated or lost. "
            "Restore the data section, or start a new run folder with init_from."
        )


def farewell(run: Run, code: int) -> None:
    """The last line of an attempt, for the log of logs and for people."""
    reason = "done" if code == EXIT_DONE else f"stopped by {run.faults.received or 'a signal to another rank'}"
    run.folder.event("exit", run.attempt, step=run.step, code=code, reason=reason)
    advice = "" if code == EXIT_DONE else "; run the same command again to go on"
    run.metrics.say(f"{reason} at step {run.step} of {run.resolved.total_steps}, saved in {run.config.run}{advice}")
