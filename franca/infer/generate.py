"""Tokens after tokens: continuous batching over any cache. It knows the model's contract and nothing of families or tokenizers.

The active sequences are rows [0, n) of the cache, so every step works on views, and nothing is padded or gathered. A sequence
that ends leaves its row to the next prompt that waits, or else the last active row moves into it and n shrinks.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from franca.core.config import Count, NotNegative, Share, config, problems_error
from franca.models.base import Cache

Decode = Callable[[list[int]], str]
Finish = Literal["stop_token", "stop_string", "length"]

_CHUNK = 1024  # tokens of prompts that go through the model at once: bounds the memory of its activations
_ROWS, _CACHE_BYTES = 64, 4 * 2**30  # at most so many rows unless told otherwise, and not more cache than this on a CPU
_LIKELIEST = 1024  # `top_p` looks at so many tokens first: sorting a whole vocabulary takes longer than a step of the model
_BROKEN = "\ufffd"  # what decoders put where bytes are no character, or not one yet
_HELD = 3  # so many of them at the end may be the beginning of one character
_CONTEXT = 4  # tokens of the prompt that its continuation is decoded with: some decoders drop a text's first space


@config
class SamplingConfig:
    """How the next token is drawn, and when a text ends. `temperature: 0` takes the most likely token."""

    max_new_tokens: Count = 128
    temperature: NotNegative = 1.0
    top_k: Count | None = None  # only the k most likely tokens; of equal ones, those with the lower ids
    top_p: Annotated[Share, Field(gt=0)] | None = None  # only the likeliest tokens with this much probability together
    seed: int = 0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # a text ends before the first of these strings
    max_rows: Count | None = None  # sequences at a time; None: 64, or fewer if their caches would take much memory


@dataclass(frozen=True)
class Result:
    """What was drawn for one prompt: a stop token is left out, the tokens that hold a stop string are not.

    `logprobs`: natural logarithms of the tokens' probabilities, all tokens allowed, at temperature 1. `text`: up to the stop
    string; empty without a decoder.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: Finish
    text: str


def generate(model: Any, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, *more: Any, **named: Any) -> list[Result]:
    """What `stream` makes of prompts 0, 1, ... with the same arguments, in their order."""
    ends = {number: end for number, _, end in stream(model, dict(enumerate(prompts)), sampling, *more, **named) if end}
    return [ends[number] for number in range(len(prompts))]


@torch.inference_mode()
def stream(
    model: Any,
    prompts: Mapping[int, Sequence[int]],
    sampling: SamplingConfig,
    stop_tokens: Collection[int] = (),
    decode: Decode | None = None,
    limits: Mapping[int, int] | None = None,
    cache: Cache | None = None,
) -> Iterator[tuple[int, str, Result | None]]:
    """Continue numbered prompts; yields (number, new text that nothing can take back, the result once it has ended).

    Tokens depend on the model, the prompt, `sampling` and the prompt's number: draw t of number n is the t-th number of the
    Philox sequence with the key (seed, n). They do not depend on what else runs, but for rounding, which may decide between
    equals (in bf16, logits often are). `limits`: a prompt's own `max_new_tokens`. `cache`: of one row, long enough, that
    holds the beginning of the one prompt, as a call leaves it: so a conversation goes on without being read again.
    Raises ConfigError for prompts that are empty or do not fit into the model's context.
    """
    lengths = {number: (limits or {}).get(number, sampling.max_new_tokens) for number in prompts}
    _check(prompts, lengths, model.config.max_seq_len)
    assert decode is not None or not sampling.stop, "stop strings need a decoder"
    assert cache is None or len(prompts) == len(cache.lengths) == 1, "a cache is given for one conversation"
    device, stops, waiting = next(model.parameters()).device, frozenset(stop_tokens), deque(prompts)
    if cache is None:
        max_len = max((len(prompts[number]) + lengths[number] for number in waiting), default=0)
        cache = model.new_cache(_num_rows(model, len(waiting), max_len, sampling, device), max_len)

    def start() -> _Sequence:
        number = waiting.popleft()
        return _Sequence(number, list(prompts[number]), lengths[number], sampling, decode)

    rows = sorted((start() for _ in range(min(len(cache.lengths), len(waiting)))), key=lambda s: -len(s.prompt))
    _read(model, cache, rows, device)
    while rows:
        tokens_BT = torch.tensor([[sequence.last] for sequence in rows], device=device)
        logits_BV = model.next_logits(tokens_BT, cache.rows(0, len(rows))).float()
        draws = [sequence.draws.random(dtype=np.float32) for sequence in rows] if sampling.temperature else []
        uniform_B = torch.tensor(draws, device=device)
        chosen_B = choose(logits_BV, sampling, uniform_B)
        logprobs_B = logits_BV.gather(1, chosen_B[:, None])[:, 0] - logits_BV.logsumexp(dim=1)
        for sequence, token, logprob in zip(rows, chosen_B.tolist(), logprobs_B.tolist(), strict=True):
            piece = sequence.take(token, logprob, stops)
            if piece or sequence.finish:
                yield sequence.number, piece, sequence.result()
        for place in reversed(range(len(rows))):  # so that the last row, which may move, is an active one
            if rows[place].finish is None:
                continue
            if waiting:
                rows[place] = start()
                cache.clear(place)
                _read(model, cache.rows(place, place + 1), rows[place : place + 1], device)
            elif (last := rows.pop()).finish is None:
                rows[place] = last
                cache.copy(len(rows), place)


def _check(prompts: Mapping[int, Sequence[int]], lengths: Mapping[int, int], max_seq_len: int) -> None:
    problems = []
    for number, prompt in prompts.items():
        if not len(prompt):
            problems.append(f"prompt {number} is empty; every prompt needs at least one token")
        elif len(prompt) + lengths[number] > max_seq_len:
            given = f"prompt {number}: {len(prompt)} prompt tokens and {lengths[number]} new ones"
            advice = "shorten the prompt or lower max_new_tokens"
            problems.append(f"{given} do not fit into the model's context of {max_seq_len}; {advice}")
    if problems:
        raise problems_error("prompts, counted from 0", problems)


def _num_rows(model: Any, num_prompts: int, max_len: int, sampling: SamplingConfig, device: torch.device) -> int:
    """Rows of the cache: as many as were asked for, or as there are prompts and a good part of the memory holds."""
    if sampling.max_rows is not None:
        return min(num_prompts, sampling.max_rows)
    budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _CACHE_BYTES
    row_bytes = sum(tensor.nbytes for state in model.new_cache(1, max_len).states for tensor in state.values())
    return min(num_prompts, _ROWS, max(1, budget // max(1, row_bytes)))


def _read(model: Any, cache: Cache, rows: Sequence["_Sequence"], device: torch.device) -> None:
    """Put the prompts into the cache, but for what it holds of them and their last tokens, which the next step takes.

    Longest first: all rows go on by what the shortest has, then those that have more, and so on: no padding, few products.
    """
    rests = [sequence.prompt[held:-1] for sequence, held in zip(rows, cache.lengths.tolist(), strict=False)]
    done = 0
    for count in range(len(rests), 0, -1):
        while (size := min(len(rests[count - 1]) - done, max(1, _CHUNK // count))) > 0:
            tokens_BT = torch.tensor([rest[done : done + size] for rest in rests[:count]], device=device)
            model.next_logits(tokens_BT, cache.rows(0, count))
            done += size


def choose(logits_BV: Tensor, sampling: SamplingConfig, uniform_B: Tensor) -> Tensor:
    """One token per row, (B,), from fp32 logits and numbers in [0, 1). `top_p`: nucleus sampling (Holtzman et al. 2020).

    Cumulative probabilities run over the tokens by id, not by rank: rounding moves them a little, but changes no order.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)  # of equal ones the first
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None or (sampling.top_p or 1) < 1:
        logits_BV = logits_BV.masked_fill(~_likeliest(logits_BV, sampling.top_k, sampling.top_p or 1.0), -torch.inf)
    sums_BV = logits_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(sums_BV, uniform_B.double()[:, None] * sums_BV[:, -1:], right=True)[:, 0]


def _likeliest(logits_BV: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Which tokens are kept, (B, V) bool; of equal ones at the border, those with the lower ids. The largest logit is 0."""
    size = logits_BV.shape[-1]
    top_BK = logits_BV.topk(min(top_k or _LIKELIEST, size)).values
    count_B1 = torch.full_like(top_BK[:, :1], top_BK.shape[1], dtype=torch.int64)
    if top_p < 1:
        sums_BK = top_BK.exp().cumsum(dim=-1)
        wanted_B1 = top_p * (sums_BK[:, -1:] if top_k else logits_BV.exp().sum(dim=-1, keepdim=True))
        if not top_k and bool((sums_BK[:, -1:] < wanted_B1).any()):
            return _likeliest(logits_BV, size, top_p)
        count_B1 = 1 + (sums_BK[:, :-1] < wanted_B1).sum(dim=-1, keepdim=True)
    border_B1 = top_BK.gather(-1, count_B1 - 1)
    above_BV, equal_BV = logits_BV > border_B1, logits_BV == border_B1
    return above_BV | (equal_BV & (equal_BV.cumsum(dim=-1) <= count_B1 - above_BV.sum(dim=-1, keepdim=True)))


class _Sequence:
    """One prompt under way; `last` is the token that the model has not seen yet."""

    def __init__(self, number: int, prompt: list[int], limit: int, sampling: SamplingConfig, decode: Decode | None) -> None:
        self.number, self.prompt, self.limit, self.last = number, prompt, limit, prompt[-1]
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Finish | None = None
        self.text = None if decode is None else Text(decode, prompt, sampling.stop)
        self.draws = np.random.Generator(np.random.Philox(key=np.array([sampling.seed % 2**64, number], dtype=np.uint64)))

    def take(self, token: int, logprob: float, stop_tokens: frozenset[int]) -> str:
        """Go on by a token, or end; returns new text."""
        self.last, ends = token, token in stop_tokens
        new = [] if ends else [token]
        self.tokens += new
        self.logprobs += [] if ends else [logprob]
        self.finish = "stop_token" if ends else "length" if len(self.tokens) == self.limit else None
        if self.text is None:
            return ""
        piece = self.text.add(new, self.finish is not None)
        self.finish = "stop_string" if self.text.stopped else self.finish
        return piece

    def result(self) -> Result | None:
        text = "" if self.text is None else self.text.value
        return None if self.finish is None else Result(self.tokens, self.logprobs, self.finish, text)


class Text:
    """The text of tokens that come one by one after those `before`: up to the first stop string, never half a character."""

    def __init__(self, decode: Decode, before: Sequence[int], stops: Sequence[str]) -> None:
        self.decode, self.stops = decode, stops
        self.recent = list(before[-_CONTEXT:])  # since the last but one border of tokens that is one of characters too
        self.border, self.seen = len(self.recent), decode(self.recent)  # `seen`: what of `recent` was read and is settled
        self.value, self.given, self.stopped = "", 0, False

    def add(self, tokens: list[int], end: bool) -> str:
        """New text that nothing can take back. At the end, what was held back counts as it is."""
        self.recent += tokens
        read, begin = self.decode(self.recent), len(self.value)
        held = 0 if end else min(_HELD, len(read) - len(read.rstrip(_BROKEN)))
        read = read[: len(read) - held]
        if end or read.startswith(self.seen):  # some decoders change what they said while bytes are missing
            self.value, self.seen = self.value + read[len(self.seen) :], read
            if not held:
                self.recent = self.recent[self.border :]
                self.border, self.seen = len(self.recent), self.decode(self.recent)
        places = [place for stop in self.stops if (place := self.value.find(stop, max(0, begin - len(stop) + 1))) >= 0]
        self.stopped = bool(places)
        self.value = self.value[: min(places, default=None)]
        begun = [n for stop in self.stops for n in range(1, len(stop)) if self.value.endswith(stop[:n])]
        perhaps = 0 if self.stopped or end else max(begun, default=0)  # characters that may be the beginning of a stop string
        piece = self.value[self.given : len(self.value) - perhaps]
        self.given += len(piece)
        return piece
