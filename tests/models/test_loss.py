"""The head's loss against float64 and PyTorch's own, whole and in shards; and what it holds in memory."""

import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from franca.models import layers
from franca.models.base import IGNORE, Batch
from franca.models.layers import VocabShard, cross_entropy_sum
from franca.models.llama import LlamaConfig
from franca.parallel.apply import init_weights


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def close(given: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(given.double(), expected.double(), rtol=tolerance, atol=tolerance)


def reference(x: Tensor, head: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[float, float]:
    """Both sums, number by number."""
    x, head, nll, z = x.detach().double(), head.detach().double(), 0.0, 0.0
    for row in range(x.shape[0]):
        for place in range(x.shape[1]):
            if int(targets[row, place]) != IGNORE:
                logits = [float(x[row, place] @ w) for w in head]
                top = max(logits)
                log_z = top + math.log(sum(math.exp(value - top) for value in logits))
                nll += log_z - logits[int(targets[row, place])]
                z += z_loss * log_z**2
    return nll, z


def plain_gradients(x: Tensor, head: Tensor, targets: Tensor, z_loss: float, factor: float) -> tuple[Tensor, ...]:
    """Of the plain loss in float64."""
    x64, head64 = x.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    logits = (x64 @ head64.T).flatten(0, 1)
    nll = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    z = (logits.logsumexp(dim=1) ** 2)[targets.flatten() != IGNORE].sum()
    return torch.autograd.grad((nll + z_loss * z) * factor, (x64, head64))


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(3))
    targets[0, :4] = IGNORE
    targets[1, 8] = IGNORE
    return normal(2, 9, 5, seed=1).requires_grad_(), normal(11, 5, seed=2).requires_grad_(), targets


# --- sums and gradients


@pytest.mark.parametrize("chunk", [1, 4, 9, 18, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_sums_are_those_of_the_valid_targets(case: tuple[Tensor, ...], chunk: int | None, z_loss: float) -> None:
    sums = cross_entropy_sum(*case, chunk, z_loss=z_loss)
    assert [value.dtype for value in sums] == [torch.float32, torch.float32]
    assert [float(value.detach()) for value in sums] == pytest.approx(reference(*case, z_loss), rel=1e-6)
    with torch.no_grad():
        assert cross_entropy_sum(*case, chunk, z_loss=z_loss) == sums


@pytest.mark.parametrize("chunk", [1, 4, 18, None])
@pytest.mark.parametrize("factor", [1.0, 0.125])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_gradients_are_those_of_torch(case: tuple[Tensor, ...], chunk: int | None, factor: float, z_loss: float) -> None:
    nll, z = cross_entropy_sum(*case, chunk, z_loss=z_loss)
    given = torch.autograd.grad((nll + z) * factor, case[:2])
    for mine, theirs in zip(given, plain_gradients(*case, z_loss, factor), strict=True):
        close(mine, theirs, 2e-6)


def test_a_wide_vocabulary_in_many_chunks_equals_the_plain_loss() -> None:
    x, head = normal(1, 200, 16, seed=1).requires_grad_(), normal(3000, 16, seed=2).requires_grad_()
    targets = torch.randint(0, 3000, (1, 200), generator=torch.Generator().manual_seed(3))
    nll, _ = cross_entropy_sum(x, head, targets, 7)
    given = torch.autograd.grad(nll, (x, head))
    plain = F.cross_entropy(F.linear(x, head)[0], targets[0], reduction="sum")
    assert float(nll.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    for mine, theirs, exact in zip(
        given, torch.autograd.grad(plain, (x, head)), plain_gradients(x, head, targets, 0.0, 1.0), strict=True
    ):
        close(mine, theirs, 1e-5)
        close(mine, exact, 1e-5)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_ignored_targets_alone_are_zero_with_zero_gradients(z_loss: float) -> None:
    x, head = normal(1, 4, 3).requires_grad_(), normal(6, 3, seed=1).requires_grad_()
    sums = cross_entropy_sum(x, head, torch.full((1, 4), IGNORE), z_loss=z_loss)
    torch.stack(sums).sum().backward()
    assert [float(value.detach()) for value in sums] == [0.0, 0.0]
    assert torch.count_nonzero(x.grad) == 0
    assert torch.count_nonzero(head.grad) == 0


def test_huge_logits_are_finite() -> None:
    x = torch.full((1, 2, 2), 1e4).requires_grad_()
    head = torch.tensor([[1e4, 1e4], [-1e4, -1e4]])
    nll, _ = cross_entropy_sum(x, head, torch.tensor([[0, 1]]))
    nll.backward()
    assert float(nll.detach()) == pytest.approx(4e8, rel=1e-6)
    assert torch.isfinite(x.grad).all()


def test_a_bf16_trunk_has_fp32_sums_and_the_head_gets_fp32_gradients(case: tuple[Tensor, ...]) -> None:
    x, head, targets = case
    x_half = x.detach().bfloat16().requires_grad_()
    nll, _ = cross_entropy_sum(x_half, head, targets)
    (nll / 3).backward()
    rounded = head.detach().bfloat16()
    assert nll.dtype == torch.float32
    assert (x_half.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.float32)
    assert float(nll.detach()) == pytest.approx(reference(x_half.detach(), rounded, targets)[0], rel=1e-2)
    expected = plain_gradients(x_half, rounded, targets, 0.0, 1 / 3)
    close(x_half.grad, expected[0], 1e-2)
    close(head.grad, expected[1], 1e-2)


def test_the_heads_gradient_is_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with products in bf16: with a sum in bf16, 400 small parts would stop growing at 256 times one part."""
    monkeypatch.setattr(layers, "product_dtype", lambda x: x.dtype)
    x, head = torch.ones(1, 400, 1, dtype=torch.bfloat16), torch.zeros(2, 1).requires_grad_()
    cross_entropy_sum(x, head, torch.zeros(1, 400, dtype=torch.int64), 1)[0].backward()
    assert head.grad.flatten().tolist() == [-200.0, 200.0]


def test_terms_with_different_factors_have_no_gradient_rather_than_a_wrong_one(case: tuple[Tensor, ...]) -> None:
    nll, z = cross_entropy_sum(*case, z_loss=0.3)
    gradients = torch.autograd.grad(nll + 2 * z, case[:2])
    assert all(bool(gradient.isnan().all()) for gradient in gradients)


def test_gradients_taken_twice_are_refused(case: tuple[Tensor, ...]) -> None:
    nll, _ = cross_entropy_sum(*case)
    torch.autograd.grad(nll * 0.5, case[:2], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(nll, case[:2])


def test_a_compiled_caller_gets_the_same(case: tuple[Tensor, ...]) -> None:
    def total(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        nll, z = cross_entropy_sum(x * 2.0, head, targets, z_loss=0.3)
        return (nll + z) * 0.5

    compiled: Callable[..., Tensor] = torch.compile(total, backend="eager")
    for way in (total, compiled):
        gradients = torch.autograd.grad(way(*case), case[:2])
        expected = plain_gradients(case[0] * 2.0, case[1], case[2], 0.3, 0.5)
        close(gradients[0], expected[0] * 2.0, 1e-5)
        close(gradients[1], expected[1], 1e-5)


# --- a head in shards


def in_shards(
    x: Tensor, head: Tensor, targets: Tensor, sizes: list[int], vocab_size: int, z_loss: float, chunk: int
) -> list[tuple[list[float], Tensor, Tensor]]:
    """Sums, the gradient of x and that of its rows, as each shard has them; one thread stands for each process."""
    given: list[Tensor] = [torch.empty(0)] * len(sizes)
    found: list[Any] = [None] * len(sizes)
    meet = threading.Barrier(len(sizes), timeout=20)

    def reduce(number: int, how: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def reduced(value: Tensor) -> Tensor:
            given[number] = value
            meet.wait()
            result = how(torch.stack(given))
            meet.wait()
            return result

        return reduced

    def work(number: int) -> None:
        first = sum(sizes[:number])
        mine_x = x.detach().clone().requires_grad_()
        mine = head.detach()[first : first + sizes[number]].clone().requires_grad_()
        shard = VocabShard(first, reduce(number, lambda t: t.amax(dim=0)), reduce(number, lambda t: t.sum(dim=0)))
        sums = cross_entropy_sum(mine_x, mine, targets, chunk, vocab_size, z_loss, shard)
        found[number] = ([float(s.detach()) for s in sums], *torch.autograd.grad(torch.stack(sums).sum(), (mine_x, mine)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert all(result is not None for result in found)
    return found


@pytest.mark.parametrize("sizes", [[12], [6, 6], [3, 3, 3, 3], [11, 1], [5, 5, 2]], ids=str)
@pytest.mark.parametrize("vocab_size", [12, 11, 6, 5])  # a row of padding; whole shards of it, and parts
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_shards_of_the_head_together_are_the_whole(sizes: list[int], vocab_size: int, z_loss: float) -> None:
    x, head = normal(2, 9, 5, seed=1).requires_grad_(), normal(12, 5, seed=2).requires_grad_()
    targets = torch.randint(0, vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))
    targets[0, :4] = IGNORE
    sums = cross_entropy_sum(x, head, targets, 4, vocab_size, z_loss)
    expected = torch.autograd.grad(torch.stack(sums).sum(), (x, head))
    found = in_shards(x, head, targets, sizes, vocab_size, z_loss, 4)
    for given, _, _ in found:
        assert given == pytest.approx([float(value.detach()) for value in sums], rel=1e-6)
    close(torch.stack([part for _, part, _ in found]).sum(dim=0), expected[0], 1e-6)
    close(torch.cat([rows for _, _, rows in found]), expected[1], 1e-6)


# --- the trunk's terms


def test_a_trunk_has_its_z_loss_as_a_term_of_its_own() -> None:
    shape = LlamaConfig(kind="llama", vocab_size=13, vocab_multiple=8, dim=16, num_layers=1, num_heads=2, future_tokens=2)
    batch = Batch(torch.arange(12).view(2, 6), torch.arange(1, 13).view(2, 6))
    found = []
    for z_loss in (0.0, 0.01):
        model = dataclasses.replace(shape, z_loss=z_loss).build()
        init_weights(model, torch.Generator().manual_seed(1))
        found.append(model.losses(batch))
    without, losses = found
    assert (list(without), list(losses)) == (["nll", "nll_2"], ["nll", "nll_2", "z_loss"])
    assert all(torch.equal(without[name], losses[name]) for name in without)
    x = model._trunk(batch.tokens_BT, None, None, None).detach()
    square = sum(
        ((x[:, : 6 - ahead].double() @ head.weight[:13].detach().double().T).logsumexp(dim=-1) ** 2).sum()
        for ahead, head in enumerate([model.head, *model.future_heads])
    )
    assert float(losses["z_loss"].detach()) == pytest.approx(0.01 * float(square), rel=1e-5)
    mine = torch.autograd.grad(sum(losses.values()), model.head.weight)[0]
    logits = model(batch.tokens_BT).flatten(0, 1)
    plain = F.cross_entropy(logits, batch.targets_BT.flatten(), reduction="sum") + 0.01 * (logits.logsumexp(-1) ** 2).sum()
    close(mine, torch.autograd.grad(plain, model.head.weight)[0], 1e-5)


# --- memory


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and not yet gone; deterministic, unlike what a process holds."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.before:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def peak_bytes(loss: Callable[..., Tensor], rows: int, vocab: int, dim: int, dtype: torch.dtype) -> int:
    """Of forward and backward, the inputs apart; the tensors have shapes but no numbers."""
    with torch.device("meta"):
        x, head = torch.empty(1, rows, dim, dtype=dtype).requires_grad_(), torch.empty(vocab, dim).requires_grad_()
        targets = torch.empty(1, rows, dtype=torch.int64)
        with Peak(x, head, targets) as counted:
            loss(x, head, targets).backward()
    return counted.peak


def plain(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, head.to(x.dtype))[0].float(), targets[0], reduction="sum")


@pytest.mark.parametrize(
    ("dtype", "rows", "dim"), [(torch.float32, 2048, 512), (torch.float32, 4096, 1024), (torch.bfloat16, 4096, 1024)], ids=str
)
def test_at_128k_words_the_peak_is_at_most_a_fifth_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, dim: int
) -> None:
    monkeypatch.setattr(layers, "product_dtype", lambda x: x.dtype)  # else it depends on the CPU
    theirs = peak_bytes(plain, rows, 131072, dim, dtype)
    assert theirs >= 3 * rows * 131072 * 4  # logits, their logarithms, one gradient
    assert peak_bytes(lambda *given: cross_entropy_sum(*given)[0], rows, 131072, dim, dtype) <= theirs / 5
