"""Tokens after tokens: equal to transformers where nothing is drawn, and to plain counting where something is."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from franca.core.config import check
from franca.core.errors import ConfigError
from franca.infer.generate import SamplingConfig, choose, generate

GREEDY = SamplingConfig(max_new_tokens=20, temperature=0)
EQUAL = [[5, 9, 200, 7], [300, 1, 2, 3], [40, 41, 42, 43]]
UNEQUAL = [[5], [300, 1, 2, 3, 8, 8, 100], [40, 41, 42], list(range(30, 60))]


@pytest.fixture(scope="module")
def theirs(trained: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(trained.folder)


def their_greedy(theirs: Any, prompts: list[list[int]], stop: int | None, count: int) -> list[list[int]]:
    """transformers' own continuations, cut before the stop token."""
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    # eos_token_id=-1 is no token: the folder's own would be used instead of None.
    options = {"eos_token_id": stop if stop is not None else -1, "pad_token_id": 0, "do_sample": False}
    out = theirs.generate(padded, attention_mask=real, max_new_tokens=count, **options)[:, longest:].tolist()
    return [row[: row.index(stop)] if stop in row else row for row in out]


# --- greedy


@pytest.mark.parametrize("prompts", [EQUAL, UNEQUAL, [[7]]], ids=["equal", "unequal", "one"])
def test_greedy_tokens_are_those_of_transformers(trained: Any, theirs: Any, prompts: list[list[int]]) -> None:
    ours = generate(trained.model, prompts, GREEDY)
    assert ours == their_greedy(theirs, prompts, None, 20)
    assert all(len(row) == 20 for row in ours)
    assert len({token for row in ours for token in row}) > 5  # not one token for ever


@pytest.mark.parametrize("prompts", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_a_row_ends_before_its_stop_token(trained: Any, theirs: Any, prompts: list[list[int]]) -> None:
    free = generate(trained.model, prompts, GREEDY)
    stop = free[1][6]  # a token that does appear
    stopped = generate(trained.model, prompts, GREEDY, [stop])
    assert stopped == their_greedy(theirs, prompts, stop, 20)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(stopped[1]) <= 6


def test_a_row_ends_before_the_first_of_several_stop_tokens(trained: Any) -> None:
    free = generate(trained.model, EQUAL, GREEDY)
    stops = {free[0][7], free[1][6]}
    cuts = [min([row.index(stop) for stop in stops if stop in row], default=20) for row in free]
    assert generate(trained.model, EQUAL, GREEDY, stops) == [row[:cut] for row, cut in zip(free, cuts, strict=True)]


def test_generation_ends_when_all_rows_have(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = generate(trained.model, EQUAL[:1], GREEDY)[0][3]
    passes: list[int] = []
    real = trained.model.next_logits
    monkeypatch.setattr(trained.model, "next_logits", lambda *given: passes.append(1) or real(*given))
    [row] = generate(trained.model, EQUAL[:1], GREEDY, [stop])
    assert len(passes) == len(row) + 1


@pytest.mark.parametrize("row", range(len(UNEQUAL)))
def test_a_prompt_continues_alike_alone_and_among_longer_ones(trained: Any, row: int) -> None:
    assert generate(trained.model, [UNEQUAL[row]], GREEDY) == [generate(trained.model, UNEQUAL, GREEDY)[row]]


# --- the cache


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 320, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [7, 1, 1, 20, 1, 10], [39, 1], [1, 39]], ids=str)
def test_logits_through_the_cache_are_those_of_the_whole_row(trained: Any, pieces: list[int]) -> None:
    row = tokens(2, 40)
    cache = trained.model.new_cache(2, 40)
    given = torch.cat([trained.model(part, cache=cache) for part in row.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(given, trained.model(row), rtol=0, atol=1e-5)
    assert cache.length == 40


def test_next_logits_are_the_last_of_the_row(trained: Any) -> None:
    row, cache = tokens(2, 30), trained.model.new_cache(2, 30)
    whole = trained.model(row)
    first = trained.model.next_logits(row[:, :29], cache)
    second = trained.model.next_logits(row[:, 29:], cache)
    torch.testing.assert_close(first, whole[:, 28], rtol=0, atol=1e-5)
    torch.testing.assert_close(second, whole[:, 29], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pieces", [[25], [20, 5], [3] + [1] * 22], ids=str)
def test_padding_at_the_left_changes_no_logit(trained: Any, pieces: list[int]) -> None:
    row, pads = tokens(3, 25), [0, 4, 19]
    for number, pad in enumerate(pads):
        row[number, :pad] = 0
    cache = trained.model.new_cache(3, 25)
    cache.pads_B = torch.tensor(pads)
    given = torch.cat([trained.model(part, cache=cache) for part in row.split(pieces, dim=1)], dim=1)
    assert torch.isfinite(given).all()
    for number, pad in enumerate(pads):
        alone = trained.model(row[number : number + 1, pad:])[0]
        torch.testing.assert_close(given[number, pad:], alone, rtol=0, atol=1e-5)


# --- drawing


def drawn(logits: Tensor, count: int, seed: int = 0, **options: Any) -> Tensor:
    """How often each token is drawn from (V,) logits."""
    sampling = SamplingConfig(**options)
    chosen = choose(logits.expand(count, -1), sampling, torch.Generator().manual_seed(seed))
    return torch.bincount(chosen, minlength=len(logits))


def allowed_naively(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> dict[int, float]:
    """The tokens that may be drawn, with their probabilities; in float64, one token at a time."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = order[:top_k] if top_k is not None else order
    weights = [
        torch.tensor((logits[token] - logits[order[0]]) / temperature, dtype=torch.float64).exp().item() for token in order
    ]
    kept: dict[int, float] = {}
    reached = 0.0
    for token, weight in zip(order, weights, strict=True):
        if top_p is not None and reached >= top_p:
            break
        kept[token] = weight
        reached += weight / sum(weights)
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    order=st.permutations(range(8)),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 3, 8, 50]),
    top_p=st.sampled_from([None, 0.001, 0.3, 0.55, 0.9, 1.0]),
)
def test_the_tokens_that_are_drawn_are_those_that_may_be(
    order: list[int], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = [0.37 * place for place in order]
    counts = drawn(torch.tensor(logits), 4000, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = allowed_naively(logits, temperature, top_k, top_p)
    # The rarest of 8 tokens has at least 0.3 % (temperature 0.5): 4000 draws miss it once in 10^5 times.
    assert set(counts.nonzero().flatten().tolist()) == set(expected)
    for token, probability in expected.items():
        deviation = (4000 * probability * (1 - probability)) ** 0.5
        assert abs(int(counts[token]) - 4000 * probability) <= 5 * deviation + 1


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    counts = drawn(logits, 100_000, temperature=temperature).double()
    expected = (logits.double() / temperature).softmax(dim=0)
    deviation = (100_000 * expected * (1 - expected)).sqrt()
    assert ((counts - 100_000 * expected).abs() < 4.5 * deviation + 1).all()


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_choice_is_the_most_likely_token(trained: Any, options: dict[str, Any]) -> None:
    greedy = generate(trained.model, UNEQUAL, GREEDY)
    assert generate(trained.model, UNEQUAL, SamplingConfig(max_new_tokens=20, seed=3, **options)) == greedy


@pytest.mark.parametrize(("top_k", "allowed"), [(1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (4, [0, 1, 3, 4]), (5, range(5))])
def test_of_equally_likely_tokens_the_first_are_kept(top_k: int, allowed: list[int]) -> None:
    logits = torch.tensor([0.5, 2.0, 0.5, 1.0, 2.0])
    assert drawn(logits, 2000, top_k=top_k).nonzero().flatten().tolist() == list(allowed)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}], ids=str)
def test_the_narrowest_choice_among_equals_is_the_greedy_one(options: dict[str, Any]) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0]])
    for seed in range(20):
        chosen = choose(logits, SamplingConfig(**options), torch.Generator().manual_seed(seed))
        assert torch.equal(chosen, choose(logits, SamplingConfig(temperature=0), torch.Generator()))


def test_rows_are_drawn_from_their_own_logits() -> None:
    logits = torch.full((3, 5), -torch.inf)
    for row, token in enumerate([4, 0, 2]):
        logits[row, token] = 1.0
    assert choose(logits, SamplingConfig(), torch.Generator().manual_seed(0)).tolist() == [4, 0, 2]


def test_the_same_seed_draws_the_same_and_another_one_does_not(trained: Any) -> None:
    runs = [generate(trained.model, UNEQUAL, SamplingConfig(max_new_tokens=20, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert all(first != other for first, other in zip(runs[0], runs[2], strict=True))


def test_drawing_leaves_the_global_generator_alone(trained: Any) -> None:
    before = torch.get_rng_state()
    generate(trained.model, EQUAL, SamplingConfig(max_new_tokens=3))
    assert torch.equal(before, torch.get_rng_state())


# --- what cannot be


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]], ids=str)
def test_an_empty_prompt_is_refused(trained: Any, prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        generate(trained.model, prompts, GREEDY)


def test_what_does_not_fit_into_the_context_is_refused_with_the_numbers(trained: Any) -> None:
    with pytest.raises(ValueError, match=r"45 prompt tokens and 20 new ones do not fit .* context of 64; shorten"):
        generate(trained.model, [[1], [1] * 45], GREEDY)


def test_what_just_fits_is_generated(trained: Any) -> None:
    assert [len(row) for row in generate(trained.model, [[1], [1] * 44], GREEDY)] == [20, 20]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: input should be greater than or equal to 1, got 0"),
        ({"temperature": -0.5}, "temperature: input should be greater than or equal to 0, got -0.5"),
        ({"top_k": 0}, "top_k: input should be greater than or equal to 1, got 0"),
        ({"top_p": 0.0}, "top_p: input should be greater than 0, got 0.0"),
        ({"top_p": 1.5}, "top_p: input should be less than or equal to 1, got 1.5"),
    ],
    ids=str,
)
def test_wrong_settings_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^here: {words}"):
        check(SamplingConfig, options, "here")


def test_right_settings_have_no_problems_and_wrong_ones_are_told_together() -> None:
    right = {"top_k": 5, "top_p": 1.0, "temperature": 0.0}
    assert check(SamplingConfig, right, "here") == SamplingConfig(**right)
    with pytest.raises(ConfigError, match=r"^here: 4 problems\n"):
        check(SamplingConfig, {"max_new_tokens": 0, "temperature": -1.0, "top_k": 0, "top_p": 2.0}, "here")
