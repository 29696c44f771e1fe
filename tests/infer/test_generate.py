"""Tokens after tokens: equal to transformers where nothing is drawn, and to plain counting where something is."""

import random
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from franca.core.config import check
from franca.core.errors import ConfigError
from franca.infer import generate as module
from franca.infer.generate import Result, SamplingConfig, Text, choose, generate, stream
from franca.models.gpt2 import GPT2Config
from franca.models.llama import LlamaConfig

GREEDY = SamplingConfig(max_new_tokens=20, temperature=0)
EQUAL = [[5, 9, 200, 7], [300, 1, 2, 3], [40, 41, 42, 43]]
UNEQUAL = [[5], [300, 1, 2, 3, 8, 8, 100], [40, 41, 42], list(range(30, 60))]
RANDOM = random.Random(0)
MANY = [[RANDOM.randrange(96) for _ in range(RANDOM.randint(1, 40))] for _ in range(13)]
LIMITS = {number: RANDOM.randint(1, 16) for number in range(13)}


def tokens_of(results: list[Result]) -> list[list[int]]:
    return [result.tokens for result in results]


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


@pytest.mark.parametrize("max_rows", [None, 2])
@pytest.mark.parametrize("prompts", [EQUAL, UNEQUAL, [[7]]], ids=["equal", "unequal", "one"])
def test_greedy_tokens_are_those_of_transformers(trained: Any, theirs: Any, prompts: Any, max_rows: int | None) -> None:
    ours = generate(trained.model, prompts, SamplingConfig(max_new_tokens=20, temperature=0, max_rows=max_rows))
    assert tokens_of(ours) == their_greedy(theirs, prompts, None, 20)
    assert {result.finish for result in ours} == {"length"}
    assert len({token for row in ours for token in row.tokens}) > 5  # not one token for ever


@pytest.mark.parametrize(
    "shape",
    [
        GPT2Config(num_heads=4, vocab_multiple=64, dim=32, num_layers=2, max_seq_len=64, init_std=0.2),
        LlamaConfig(num_heads=4, window=9, dim=32, num_layers=2, max_seq_len=64, init_std=0.2),
    ],
    ids=["gpt2", "window"],
)
def test_greedy_tokens_of_other_families_are_those_of_transformers(tmp_path: Path, make: Any, shape: Any) -> None:
    made = make(tmp_path, shape)
    theirs = AutoModelForCausalLM.from_pretrained(made.folder)
    ours = tokens_of(generate(made.model, UNEQUAL, GREEDY))
    assert ours == their_greedy(theirs, UNEQUAL, None, 20)
    assert len({token for row in ours for token in row}) > 5


@pytest.mark.parametrize("prompts", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_a_row_ends_before_its_stop_token(trained: Any, theirs: Any, prompts: list[list[int]]) -> None:
    free = tokens_of(generate(trained.model, prompts, GREEDY))
    stop = free[1][6]  # a token that does appear
    stopped = generate(trained.model, prompts, GREEDY, [stop])
    assert tokens_of(stopped) == their_greedy(theirs, prompts, stop, 20)
    assert tokens_of(stopped) == [row[: row.index(stop)] if stop in row else row for row in free]
    assert [result.finish for result in stopped] == ["stop_token" if stop in row else "length" for row in free]
    assert all(len(result.logprobs) == len(result.tokens) for result in stopped)


def test_a_row_ends_before_the_first_of_several_stop_tokens(trained: Any) -> None:
    free = tokens_of(generate(trained.model, EQUAL, GREEDY))
    stops = {free[0][7], free[1][6]}
    cuts = [min([row.index(stop) for stop in stops if stop in row], default=20) for row in free]
    assert tokens_of(generate(trained.model, EQUAL, GREEDY, stops)) == [row[:cut] for row, cut in zip(free, cuts, strict=True)]


# --- what runs beside a prompt does not matter


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3}, {"top_k": 40, "top_p": 0.8, "temperature": 2.0}], ids=str)
def test_a_prompt_has_the_same_tokens_alone_and_among_others_for_any_number_of_rows(model: Any, options: Any) -> None:
    sampling = [SamplingConfig(max_new_tokens=24, max_rows=rows, **options) for rows in (None, 1, 4)]
    together, one, four = (tokens_of(generate(model, MANY, s, [7], limits=LIMITS)) for s in sampling)
    assert together == one == four
    for number in (0, 7, 12):
        [(_, _, alone)] = stream(model, {number: MANY[number]}, sampling[0], [7], None, LIMITS)
        assert alone is not None
        assert alone.tokens == together[number]
    backwards = dict(reversed(list(enumerate(MANY))))
    ends = {number: result for number, _, result in stream(model, backwards, sampling[2], [7], None, LIMITS)}
    assert [ends[number].tokens for number in range(13)] == together


def test_equal_prompts_of_other_numbers_and_seeds_get_other_tokens(model: Any) -> None:
    sampling = [SamplingConfig(max_new_tokens=20, temperature=2.0, seed=seed) for seed in (0, 1, -1)]
    rows = [tuple(row) for some in sampling for row in tokens_of(generate(model, [[5, 6]] * 4, some))]
    assert len(set(rows)) == 12


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.7, "top_k": 9}], ids=str)
def test_log_probabilities_are_those_of_a_whole_forward_pass(model: Any, options: Any) -> None:
    results = generate(model, MANY, SamplingConfig(max_new_tokens=20, max_rows=4, **options))
    for prompt, result in zip(MANY, results, strict=True):
        logits = model(torch.tensor([prompt + result.tokens]))[0, len(prompt) - 1 : -1].double()
        expected = logits.log_softmax(dim=-1)[range(20), result.tokens]
        torch.testing.assert_close(torch.tensor(result.logprobs).double(), expected, rtol=0, atol=1e-4)


def test_bf16_generates_too(model: Any) -> None:
    model.compute_dtype = torch.bfloat16
    try:
        results = generate(model, MANY, SamplingConfig(max_new_tokens=10, max_rows=4))
        for prompt, result in zip(MANY, results, strict=True):
            logits = model(torch.tensor([prompt + result.tokens]))[0, len(prompt) - 1 : -1].float()
            expected = logits.log_softmax(dim=-1)[range(10), result.tokens]
            assert (torch.tensor(result.logprobs) - expected).abs().max() < 0.3  # logits of about 8, to 8 bits, twice
    finally:
        model.compute_dtype = torch.float32


# --- nothing is computed twice or for nothing


class Counted:
    """A model that notes the shapes it was given to continue."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.parameters, self.new_cache = model, model.config, model.parameters, model.new_cache
        self.shapes: list[tuple[int, ...]] = []

    def next_logits(self, tokens_BT: Tensor, cache: Any) -> Tensor:
        assert len(tokens_BT) == len(cache.lengths)
        self.shapes.append(tuple(tokens_BT.shape))
        return self.model.next_logits(tokens_BT, cache)


@pytest.mark.parametrize("max_rows", [1, 4, 13])
def test_each_token_goes_through_the_model_once_and_rows_are_given_on(model: Any, max_rows: int) -> None:
    counted = Counted(model)
    generate(counted, MANY, SamplingConfig(max_rows=max_rows), limits=LIMITS)
    assert sum(rows * length for rows, length in counted.shapes) == sum(map(len, MANY)) - 13 + sum(LIMITS.values())
    assert max(rows for rows, _ in counted.shapes) == max_rows
    single = [rows for rows, length in counted.shapes if length == 1]
    first_short = next((place for place, rows in enumerate(single) if max_rows > rows > 1), len(single))
    assert len(single) - first_short <= 16 + sum(len(prompt) == 2 for prompt in MANY) + max_rows  # short only at the end


def test_prompts_are_read_as_stairs(model: Any) -> None:
    counted = Counted(model)
    generate(counted, [[1] * 6, [1] * 21, [1] * 6, [1] * 11], SamplingConfig(max_new_tokens=1))
    assert counted.shapes == [(4, 5), (2, 5), (1, 10), (4, 1)]


def test_long_prompts_are_read_in_pieces(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(model, MANY, GREEDY)
    monkeypatch.setattr(module, "_CHUNK", 16)
    counted = Counted(model)
    assert tokens_of(generate(counted, MANY, GREEDY)) == tokens_of(whole)
    assert max(rows * length for rows, length in counted.shapes if length > 1) <= 16


def test_rows_are_as_many_as_the_memory_holds(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(model)
    row = sum(tensor.nbytes for state in model.new_cache(1, 64).states for tensor in state.values())
    monkeypatch.setattr(module, "_CACHE_BYTES", 3 * row)
    generate(counted, MANY, SamplingConfig(max_new_tokens=2), limits={0: 64 - len(MANY[0])})
    assert max(rows for rows, _ in counted.shapes) == 3


def test_a_conversation_goes_on_without_being_read_again(model: Any) -> None:
    counted, cache, history = Counted(model), model.new_cache(1, 64), [1, 2, 3, 4]
    for words in ([], [9, 8, 7], [5]):
        history += words
        counted.shapes.clear()
        [result] = generate(counted, [history], SamplingConfig(max_new_tokens=8, temperature=0), cache=cache)
        [anew] = generate(model, [history], SamplingConfig(max_new_tokens=8, temperature=0))
        assert result.tokens == anew.tokens
        assert sum(length for _, length in counted.shapes) == 8 + (len(words) or 3)
        history += result.tokens


def test_generation_ends_when_all_rows_have(model: Any) -> None:
    stop = generate(model, MANY[:1], GREEDY)[0].tokens[3]
    counted = Counted(model)
    [result] = generate(counted, MANY[:1], GREEDY, [stop])
    assert sum(length == 1 for _, length in counted.shapes) == len(result.tokens) + 1
    assert generate(model, [], GREEDY) == []


# --- text and where it stops


def read(tokens: list[int]) -> str:
    """Tokens as bytes of UTF-8."""
    return bytes(tokens).decode("utf-8", "replace")


TEXTS = st.one_of(
    st.text("abß語🎈", max_size=12).map(lambda text: text.encode()),
    st.binary(max_size=12),
    st.text("ab", max_size=12).map(str.encode),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(TEXTS, TEXTS, st.lists(st.text("abß語", min_size=1, max_size=4), max_size=3))
def test_pieces_make_the_text_up_to_the_first_stop(before: bytes, after: bytes, stops: list[str]) -> None:
    whole = read([*before.decode("utf-8", "ignore").encode(), *after])[len(before.decode("utf-8", "ignore")) :]
    text, pieces = Text(read, list(before.decode("utf-8", "ignore").encode()), stops), []
    for place, token in enumerate(after):
        pieces.append(text.add([token], place == len(after) - 1))
        assert whole.startswith("".join(pieces))  # so nothing shown is taken back
        if text.stopped:
            break
    cut = min((place for stop in stops if (place := whole.find(stop)) >= 0), default=len(whole))
    assert "".join(pieces) == text.value == whole[:cut]
    assert text.stopped == (cut < len(whole))


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    text = Text(read, list(b"a"), [])
    assert [text.add([byte], False) for byte in "ß🎈é".encode()] == ["", "ß", "", "", "", "🎈", "", "é"]


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    text = Text(read, list(b"x"), ["abc", "bd"])
    assert [text.add([byte], False) for byte in b"aabeab"] == ["", "a", "", "abe", "", ""]
    assert text.add([], True) == "ab"


@pytest.mark.parametrize("max_rows", [1, 4])
def test_stop_strings_end_a_text_wherever_tokens_begin(model: Any, max_rows: int) -> None:
    words = ["un", "der", " und", "s", "\n\n", " e"]

    def decode(tokens: list[int]) -> str:
        return "".join(words[token % 6] for token in tokens)

    stop = ("rund", "\n ed", "sss", "never")
    sampling = SamplingConfig(max_new_tokens=24, temperature=1.0, stop=stop, max_rows=max_rows)
    results = generate(model, MANY, sampling, (), decode)
    for number, free in enumerate(generate(model, MANY, SamplingConfig(max_new_tokens=24, temperature=1.0))):
        ends = (end for end in count(1) if end == 24 or any(word in decode(free.tokens[:end]) for word in stop))
        expected = free.tokens[: next(ends)]
        whole = decode(expected)
        cut = min((place for word in stop if (place := whole.find(word)) >= 0), default=len(whole))
        assert results[number].tokens == expected
        assert results[number].text == whole[:cut]
        assert results[number].finish == ("stop_string" if cut < len(whole) else "length")
        assert len(results[number].logprobs) == len(expected)
    assert {result.finish for result in results} == {"stop_string", "length"}


def test_pieces_come_while_a_text_grows(trained: Any) -> None:
    prompts = {4: [60, 70], 9: [80]}
    texts, ends = {4: "", 9: ""}, {}
    pieces = 0
    for number, piece, result in stream(trained.model, prompts, GREEDY, (), trained.tokenizer.decode):
        assert number not in ends
        texts[number] += piece
        pieces += bool(piece)
        if result is not None:
            ends[number] = result
    assert pieces > 12
    for number, prompt in prompts.items():
        whole = trained.tokenizer.decode(prompt + ends[number].tokens)
        assert texts[number] == ends[number].text == whole[len(trained.tokenizer.decode(prompt)) :]


# --- drawing


def drawn(logits: Tensor, count: int, seed: int = 0, **options: Any) -> Tensor:
    """How often each token is drawn from (V,) logits."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    chosen = choose(logits.expand(count, -1), SamplingConfig(**options), uniform)
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
    narrow = generate(trained.model, UNEQUAL, SamplingConfig(max_new_tokens=20, seed=3, **options))
    assert tokens_of(narrow) == tokens_of(greedy)


@pytest.mark.parametrize(("top_k", "allowed"), [(1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (4, [0, 1, 3, 4]), (5, range(5))])
def test_of_equally_likely_tokens_the_first_are_kept(top_k: int, allowed: list[int]) -> None:
    logits = torch.tensor([0.5, 2.0, 0.5, 1.0, 2.0])
    assert drawn(logits, 2000, top_k=top_k).nonzero().flatten().tolist() == list(allowed)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}], ids=str)
def test_the_narrowest_choice_among_equals_is_the_greedy_one(options: dict[str, Any]) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0]])
    for uniform in torch.linspace(0, 0.999999, 20):
        chosen = choose(logits, SamplingConfig(**options), uniform.expand(3))
        assert chosen.tolist() == choose(logits, SamplingConfig(temperature=0), uniform.expand(3)).tolist() == [1, 0, 3]


def test_rows_are_drawn_from_their_own_logits() -> None:
    logits = torch.full((3, 5), -torch.inf)
    for row, token in enumerate([4, 0, 2]):
        logits[row, token] = 1.0
    assert choose(logits, SamplingConfig(), torch.tensor([0.0, 0.5, 0.9999999])).tolist() == [4, 0, 2]


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
def test_a_flat_distribution_keeps_more_than_the_tokens_looked_at_first(top_p: float) -> None:
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) / 10
    kept = module._likeliest(logits - logits.amax(dim=1, keepdim=True), None, top_p)
    for row, mask in zip(logits.double(), kept, strict=True):
        share, order = row.softmax(dim=0).sort(descending=True)
        expected = int((share.cumsum(dim=0) - share < top_p).sum())
        assert abs(int(mask.sum()) - expected) <= 1  # rounding
        assert mask[order[: expected - 1]].all()


def test_the_same_seed_draws_the_same_and_another_one_does_not(trained: Any) -> None:
    runs = [generate(trained.model, UNEQUAL, SamplingConfig(max_new_tokens=20, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert all(first.tokens != other.tokens for first, other in zip(runs[0], runs[2], strict=True))


def test_drawing_leaves_the_global_generator_alone(trained: Any) -> None:
    before = torch.get_rng_state()
    generate(trained.model, EQUAL, SamplingConfig(max_new_tokens=3))
    assert torch.equal(before, torch.get_rng_state())


# --- what cannot be


def test_prompts_that_cannot_be_continued_are_refused_together_each_with_its_number(trained: Any) -> None:
    with pytest.raises(ConfigError) as error:
        generate(trained.model, [[1], [1] * 45, [], [2]], GREEDY, limits={3: 64})
    assert str(error.value).splitlines() == [
        "prompts, counted from 0: 3 problems",
        "  prompt 1: 45 prompt tokens and 20 new ones do not fit into the model's context of 64; "
        "shorten the prompt or lower max_new_tokens",
        "  prompt 2 is empty; every prompt needs at least one token",
        "  prompt 3: 1 prompt tokens and 64 new ones do not fit into the model's context of 64; "
        "shorten the prompt or lower max_new_tokens",
    ]


def test_what_just_fits_is_generated(trained: Any) -> None:
    results = generate(trained.model, [[1], [1] * 44], GREEDY, limits={0: 63})
    assert [len(result.tokens) for result in results] == [63, 20]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: input should be greater than or equal to 1, got 0"),
        ({"temperature": -0.5}, "temperature: input should be greater than or equal to 0, got -0.5"),
        ({"top_k": 0}, "top_k: input should be greater than or equal to 1, got 0"),
        ({"top_p": 0.0}, "top_p: input should be greater than 0, got 0.0"),
        ({"top_p": 1.5}, "top_p: input should be less than or equal to 1, got 1.5"),
        ({"max_rows": 0}, "max_rows: input should be greater than or equal to 1, got 0"),
        ({"stop": [""]}, r"stop\[0\]: string should have at least 1 character, got ''"),
    ],
    ids=str,
)
def test_wrong_settings_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^here: {words}"):
        check(SamplingConfig, options, "here")


def test_right_settings_have_no_problems_and_wrong_ones_are_told_together() -> None:
    right = {"top_k": 5, "top_p": 1.0, "temperature": 0.0}
    assert check(SamplingConfig, right | {"stop": ["a"]}, "here") == SamplingConfig(**right, stop=("a",))
    with pytest.raises(ConfigError, match=r"^here: 4 problems\n"):
        check(SamplingConfig, {"max_new_tokens": 0, "temperature": -1.0, "top_k": 0, "top_p": 2.0}, "here")
