"""What the loop computes, against plain references."""

import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from franca.checkpoint import convert, sharded
from franca.checkpoint.convert import open_model
from franca.checkpoint.store import Checkpoint, Store
from franca.core.errors import ConfigError
from franca.core.run import RunFolder, read_records
from franca.data.loader import IGNORE, Loader
from franca.data.megatron import MegatronOrder
from franca.models.base import Batch
from franca.parallel.apply import init_weights
from franca.parallel.world import World
from franca.train import loop, optim
from franca.train.adamw import AdamWConfig
from franca.train.config import Resolved, read_config, resolve
from franca.train.faults import Faults

HERE = World(0, 1, 0, torch.device("cpu"))


def train(path: Path, *words: str) -> int:
    return loop.start(read_config(path, list(words)), HERE, Faults())


def close(mine: list[dict], theirs: list[dict], rel: float) -> None:
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=rel)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=50 * rel)


def test_losses_and_weights_equal_a_plain_loop(run_file, records) -> None:
    """The reference: full logits, mean cross-entropy, torch's own AdamW, written without any of franca's loop."""
    path = run_file(train={"length": "10 steps"})
    settings = read_config(path, [])
    resolved = resolve(settings, 1)
    assert train(path) == 0
    model = resolved.config.model.build()
    init_weights(model, torch.Generator().manual_seed(settings.seed))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    loader = loader_of(resolved)
    for record in records(Path(settings.run)):
        batch = loader.batch(record["step"] - 1, 0, 1)
        logits = model(torch.from_numpy(batch.tokens_BT))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets_BT).flatten(), ignore_index=IGNORE)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = record["lr"]
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    trained, _, _ = open_model(Path(settings.run), torch.device("cpu"), "fp32")
    for (name, mine), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5, msg=name)


def loader_of(resolved: Resolved) -> Loader:
    plan, attention = resolved.plan, resolved.config.data.attention
    return Loader(plan.order, plan.shards, resolved.timeline, resolved.stop_samples, attention)


@pytest.mark.parametrize("attention", ["causal", "document"])
def test_micro_batches_change_nothing(run_file, records, attention: str) -> None:
    runs = []
    for micro in (1, 2, 8):
        path = run_file(f"micro{micro}", train={"length": "8 steps", "micro_samples": micro}, data={"attention": attention})
        assert train(path) == 0
        runs.append(records(Path(read_config(path, []).run)))
    close(runs[0], runs[2], rel=2e-6)
    close(runs[1], runs[2], rel=2e-6)


def test_an_epoch_takes_every_row_and_masks_the_rest(run_file, records, dataset) -> None:
    path = run_file(train={"length": "1 epochs", "batch_samples": 512}, data={"seq_len": 64}, optim={"warmup": "1 steps"})
    resolved = resolve(read_config(path, []), 1)
    rows = resolved.plan.order.epoch_samples
    assert rows % 512, "the last batch is a partial one"
    assert resolved.total_steps == math.ceil(rows / 512)
    tokens = sum(shard.num_tokens for group in resolved.plan.shards for shard in group)
    loader = loader_of(resolved)
    seen = sum(loader.batch(step, 0, 1).num_valid for step in range(resolved.total_steps))
    short = 1 if tokens % 64 else 0  # the row that the source ends in
    assert seen == tokens - 1 or short == 0
    assert train(path) == 0
    assert len(records(Path(resolved.config.run))) == resolved.total_steps


def test_the_same_settings_give_the_same_bits(run_file, records) -> None:
    for name in ("one", "two"):
        assert train(run_file(name, train={"length": "6 steps"})) == 0
    one, two = (read_config(run_file(name), []).run for name in ("one", "two"))
    assert records(Path(one)) == records(Path(two))


def test_training_learns(run_file, records) -> None:
    path = run_file(train={"length": "40 steps"}, validation={"at_end": True, "every": "20 steps"})
    assert train(path) == 0
    folder = Path(read_config(path, []).run)
    losses = [record["loss"] for record in records(folder)]
    assert losses[0] == pytest.approx(math.log(512), rel=0.02)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0
    held_out = records(folder, "metrics.validation.jsonl")
    assert [record["step"] for record in held_out] == [20, 40]
    assert held_out[1]["loss"] < held_out[0]["loss"]


def test_loss_is_that_of_the_next_tokens_and_total_loss_the_sum_of_several_terms(run_file, records) -> None:
    path = run_file(train={"length": "2 steps"}, optim={"warmup": "1 steps"}, model={"future_tokens": 2, "z_loss": 0.01})
    assert train(path) == 0
    found = records(Path(read_config(path, []).run))
    for record in found:
        assert record["loss"] == record["nll"]
        assert record["total_loss"] == pytest.approx(record["nll"] + record["nll_2"] + record["z_loss"], rel=1e-12)
    assert found[0]["z_loss"] == pytest.approx(2 * 0.01 * math.log(512) ** 2, rel=0.02)  # two heads, near-zero logits
    alone = run_file("alone", train={"length": "2 steps"}, optim={"warmup": "1 steps"})
    assert train(alone) == 0
    assert "total_loss" not in records(Path(read_config(alone, []).run))[0]


def test_a_finished_run_run_again_does_nothing_twice(run_file, records) -> None:
    path = run_file(train={"length": "4 steps"}, validation={"at_end": True}, optim={"warmup": "1 steps"})
    assert train(path) == 0
    folder = Path(read_config(path, []).run)
    before = (
        records(folder),
        records(folder, "metrics.validation.jsonl"),
        [c.meta for c in Store(folder / "checkpoints").committed()],
    )
    assert train(path) == 0
    after = (
        records(folder),
        records(folder, "metrics.validation.jsonl"),
        [c.meta for c in Store(folder / "checkpoints").committed()],
    )
    assert after == before


def test_a_damaged_checkpoint_is_passed_over_and_written_down(run_file, records) -> None:
    path = run_file(train={"length": "20 steps"})
    assert train(path) == 0
    folder = RunFolder(read_config(path, []).run)
    whole = records(folder.root)
    newest = folder.checkpoints / "0000000020"
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert train(path) == 0
    events = [e for e in read_records(folder.events) if e["event"] in ("damaged_checkpoint", "resume")]
    assert [(e["event"], e["step"]) for e in events] == [("damaged_checkpoint", 20), ("resume", 10)]
    assert records(folder.root) == whole
    assert Store(folder.checkpoints).committed()[-1].damage() == []


def test_keep_deletes_all_but_the_newest(run_file) -> None:
    path = run_file(train={"length": "12 steps"}, checkpoint={"every": "3 steps", "keep": 2})
    assert train(path) == 0
    root = Path(read_config(path, []).run) / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == [
        "0000000009",
        "0000000012",
        "checkpoint_0000000009.done",
        "checkpoint_0000000012.done",
    ]


def test_a_changed_rate_takes_effect_at_a_resume_and_is_recorded(run_file, records) -> None:
    path = run_file(train={"length": "6 steps"})
    assert train(path) == 0
    assert train(path, "train.length=9 steps", "optim.lr=0.5", "optim.decay.kind=constant") == 0
    folder = RunFolder(read_config(path, []).run)
    assert [record["lr"] for record in records(folder.root)][6:] == [0.5] * 3
    changes = [e["changes"] for e in read_records(folder.events) if e["event"] == "resume"][-1]
    assert ["optim.lr", 0.01, 0.5] in changes


def test_init_from_starts_from_the_weights_of_another_run(run_file, records) -> None:
    path = run_file("first", train={"length": "30 steps"})
    assert train(path) == 0
    first = records(Path(read_config(path, []).run))
    path = run_file("second", train={"length": "5 steps"}, optim={"lr": 1e-9, "warmup": "1 steps"})
    assert train(path, f"init_from={read_config(run_file('first'), []).run}") == 0
    assert records(Path(read_config(path, []).run))[0]["loss"] < first[0]["loss"] - 1


def test_a_folder_of_imported_weights_is_no_run_to_go_on_with(run_file) -> None:
    path = run_file(train={"length": "2 steps"}, optim={"warmup": "1 steps"})
    folder = Path(read_config(path, []).run)
    tensors = {"model.norm.weight": torch.ones(32)}
    sharded.save(Store(folder / "checkpoints"), 0, tensors, {"weights_only": True}, lambda partial: None, HERE)
    with pytest.raises(ConfigError, match=r"holds weights alone, nothing to resume\. Start a new run folder with init_from"):
        train(path)


def test_a_loss_that_is_no_number_ends_the_run(run_file) -> None:
    path = run_file(optim={"lr": 1e30, "warmup": "0 steps", "clip_norm": 0.0})
    with pytest.raises(FloatingPointError, match=r"optim\.lr"):
        train(path)


def test_two_attempts_in_one_folder_are_refused(run_file) -> None:
    path = run_file()
    with RunFolder(read_config(path, []).run).lock(), pytest.raises(ConfigError, match="another process"):
        train(path)


def test_a_signal_before_the_first_step_stops_in_good_order(run_file) -> None:
    path = run_file()
    with Faults() as faults:
        signal.raise_signal(signal.SIGUSR2)
        assert loop.start(read_config(path, []), HERE, faults) == 75
    assert train(path) == 0


def test_handlers_are_put_back_and_a_second_interrupt_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Faults() as faults:
        signal.raise_signal(signal.SIGINT)
        assert faults.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_compiled_blocks_compute_the_same(run_file, records) -> None:
    for name, words in (("eager", []), ("compiled", ["parallel.compile=true"])):
        assert train(run_file(name, train={"length": "2 steps"}, optim={"warmup": "1 steps"}), *words) == 0
    eager, compiled = (records(Path(read_config(run_file(name), []).run)) for name in ("eager", "compiled"))
    close(compiled, eager, rel=1e-5)


def test_bits_per_byte_against_a_plain_count(run_file, records) -> None:
    """Row by row through plain logits, in float64."""
    path = run_file(train={"length": "2 steps"}, validation={"at_end": True, "micro_samples": 3}, optim={"warmup": "1 steps"})
    assert train(path) == 0
    folder = Path(read_config(path, []).run)
    model, _, _ = open_model(folder, torch.device("cpu"), "fp32")
    resolved = resolve(read_config(path, []), 1)
    shard = resolved.plan.datasets[0].shards("validation", "stdlib")[0]
    tokens = torch.from_numpy(shard.read(0, shard.num_tokens).astype("int64"))
    nll, count = 0.0, 0
    for start in range(0, len(tokens), 32):
        row = tokens[start : start + 33]
        targets = row[1:]
        if len(targets):
            logits = model(row[None, :-1])[0].double()
            nll += F.cross_entropy(logits, targets, reduction="sum").item()
            count += len(targets)
    record = records(folder, "metrics.validation.jsonl")[-1]
    facts = resolved.plan.datasets[0].manifest["sources"]["stdlib"]["validation"]
    assert count == len(tokens) - 1
    assert record["loss"] == pytest.approx(nll / count, rel=1e-6)
    assert record["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert record["bits_per_byte"] == pytest.approx(nll / count / math.log(2) * len(tokens) / facts["bytes"], rel=1e-6)


def test_state_names_every_parameter_and_moment(run_file) -> None:
    model = resolve(read_config(run_file(), []), 1).config.model.build()
    names = [name for name, _ in model.named_parameters()]
    state = optim.state_tensors(model, optim.Optimizer(model, AdamWConfig()))
    assert set(state) == {f"optimizer.{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert Batch._fields == ("tokens_BT", "targets_BT", "document_BT", "position_BT")


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_begin_again(run_file) -> None:
    path = run_file(train={"length": "10 steps"})
    assert train(path) == 0
    folder = RunFolder(read_config(path, []).run)
    for checkpoint in Store(folder.checkpoints).committed():
        (checkpoint.path / "params.json").unlink()
    with pytest.raises(ConfigError, match="no checkpoint can be read"):
        train(path)
    assert [checkpoint.step for checkpoint in Store(folder.checkpoints).committed()] == [10]


def test_a_finished_epoch_may_be_followed_by_more_without_a_loss_of_samples(run_file, dataset: Path) -> None:
    keys = {"length": "1 epochs", "batch_samples": 512}
    path = run_file(train=keys, optim={"warmup": "1 steps"}, data={"seq_len": 64}, checkpoint={"every": "99 steps"})
    assert train(path) == 0
    words = ["train.length=1.5 epochs", f"data.sources=[{{path: {dataset}, max_epochs: 2}}]"]
    assert train(path, *words) == 0
    first, second = Store(Path(read_config(path, []).run) / "checkpoints").committed()
    rows = resolve(read_config(path, []), 1).plan.order.epoch_samples
    assert (first.meta["samples"], second.meta["samples"]) == (rows, math.ceil(1.5 * rows))
    assert second.step - first.step == math.ceil((second.meta["samples"] - rows) / 512), "it began with the next row"


def test_a_folder_that_was_moved_goes_on_where_it_is(run_file, tmp_path: Path) -> None:
    path = run_file(train={"length": "6 steps"})
    assert train(path) == 0
    moved = tmp_path / "elsewhere"
    Path(read_config(path, []).run).rename(moved)
    assert train(moved, "train.length=8 steps") == 0
    assert Store(moved / "checkpoints").committed()[-1].step == 8
    assert not Path(read_config(path, []).run).exists()


def test_a_refused_configuration_does_not_become_the_runs_own(run_file) -> None:
    path = run_file(train={"length": "6 steps"})
    assert train(path) == 0
    folder = RunFolder(read_config(path, []).run)
    before = folder.config.read_text()
    with pytest.raises(ConfigError, match="data plan"):
        train(path, "data.seed=5")
    assert folder.config.read_text() == before
    assert list(read_records(folder.events))[-1]["reason"].startswith("ConfigError")


def test_a_run_in_the_order_of_2021(run_file, records) -> None:
    order = {"kind": "megatron-2021", "samples": 330, "split": "90,10,0"}
    path = run_file("megatron", data={"order": order, "attention": "document"}, train={"length": "40 steps"})
    assert train(path) == 0
    resolved = resolve(read_config(path, []), 1)
    order_of_run, shards = resolved.plan.order, resolved.plan.shards[0]
    assert isinstance(order_of_run, MegatronOrder)
    batch = loader_of(resolved).batch(3, 0, 1)
    tokens = np.concatenate([shard.tokens for shard in shards])
    spans = order_of_run.spans(np.arange(24, 32))
    for row in range(8):
        pieces = [range(s, s + c) for r, s, c in zip(spans.rows, spans.starts, spans.counts, strict=True) if r == row]
        expected = np.concatenate([tokens[piece.start : piece.stop] for piece in pieces])
        assert len(expected) == 33
        assert batch.tokens_BT[row].tolist() == expected[:32].tolist()
        assert batch.document_BT is not None
        begins = np.flatnonzero(np.diff(batch.document_BT[row])) + 1
        assert set(np.cumsum([len(piece) for piece in pieces])[:-1]) - {32} <= set(begins.tolist())
    assert records(Path(read_config(path, []).run))[-1]["step"] == 40
    with pytest.raises(ConfigError, match="was made for 330"):
        resolve(read_config(path, ["train.length=42 steps"]), 1)
    with pytest.raises(ConfigError, match="knows weights alone"):
        resolve(read_config(path, ["data.temperature=2"]), 1)


def test_an_average_of_the_weights_is_measured_and_exported(run_file, records, tmp_path: Path) -> None:
    """Against the average of the checkpoints' weights, and the held-out loss of a run that begins with the export."""
    optimizer = {"ema": 0.5, "warmup": "1 steps"}
    path = run_file(
        "run", train={"length": "3 steps"}, optim=optimizer, checkpoint={"every": "1 steps"}, validation={"at_end": True}
    )
    seed = run_file("seed", train={"length": "0 steps"}, optim=optimizer)
    assert (train(path), train(seed)) == (0, 0)
    stores = [Store(tmp_path / name / "checkpoints") for name in ("seed", "run")]
    first, *others = [weights for store in stores for weights in map(weights_of, store.committed())]
    for weights in others:
        first = {name: (first[name] + weights[name]) / 2 for name in first}
    convert.export(tmp_path / "run", tmp_path / "average.pt", form="torch", ema=True)
    average = torch.load(tmp_path / "average.pt")["model"]
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, first[f"model.{name}"], rtol=1e-6, atol=1e-8)
    convert.import_folder(tmp_path / "average.pt", tmp_path / "average")
    again = run_file("again", train={"length": "0 steps"}, init_from=str(tmp_path / "average"), validation={"at_end": True})
    assert train(again) == 0
    (mine,), (theirs,) = (records(tmp_path / name, "metrics.validation.jsonl") for name in ("run", "again"))
    assert mine["ema_loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert mine["loss"] != mine["ema_loss"]
    with pytest.raises(ConfigError, match="holds no average"):
        convert.export(tmp_path / "again", tmp_path / "none.pt", form="torch", ema=True)


def weights_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    stored = sharded.Reader(checkpoint.path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size) for name, entry in stored.items() if name.startswith("model.")}
    sharded.load(checkpoint, tensors, num_ranks=1)
    return tensors
