"""Tokens after tokens: batched generation with a cache. It knows the model's contract and nothing of families or text."""

from collections.abc import Collection, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from franca.core.config import Count, NotNegative, Share, config


@config
class SamplingConfig:
    """How the next token is drawn. `temperature: 0` takes the most likely one."""

    max_new_tokens: Count = 128
    temperature: NotNegative = 1.0
    top_k: Count | None = None  # only the k most likely tokens; of equal ones, those with the lower ids
    top_p: Annotated[Share, Field(gt=0)] | None = None  # only the likeliest tokens with this much probability together
    seed: int = 0


@torch.inference_mode()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, stop_tokens: Collection[int] = ()
) -> list[list[int]]:
    """Continue prompts by `max_new_tokens`, or until a stop token, which is left out. Raises ValueError for one that is empty
    or does not fit into the model's context with what is asked for.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    if longest + sampling.max_new_tokens > model.config.max_seq_len:
        raise ValueError(
            f"{longest} prompt tokens and {sampling.max_new_tokens} new ones do not fit into the model's context of "
            f"{model.config.max_seq_len}; shorten the prompt or lower max_new_tokens"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    pads = [longest - len(prompt) for prompt in prompts]
    tokens_BT = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)], device=device)
    cache = model.new_cache(len(prompts), longest + sampling.max_new_tokens)
    if any(pads):
        cache.pads_B = torch.tensor(pads, device=device)
    outputs: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for _ in range(sampling.max_new_tokens):
        logits_BV = model.next_logits(tokens_BT, cache)
        tokens_BT = choose(logits_BV.float(), sampling, generator)[:, None]
        for row, token in enumerate(tokens_BT[:, 0].tolist()):
            running[row] = running[row] and token not in stop_tokens
            if running[row]:
                outputs[row].append(token)
        if not any(running):
            break
    return outputs


def choose(logits_BV: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """One token per row: (B,). `top_p`: nucleus sampling (Holtzman et al. 2020)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV, ids_BV = (logits_BV / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        logits_BV[:, sampling.top_k :] = -torch.inf
    if sampling.top_p is not None and sampling.top_p < 1:
        share_BV = logits_BV.softmax(dim=-1)
        logits_BV.masked_fill_(share_BV.cumsum(dim=-1) - share_BV >= sampling.top_p, -torch.inf)
    drawn_B1 = torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)
    return ids_BV.gather(-1, drawn_B1)[:, 0]
