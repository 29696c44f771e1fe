"""A model of franca as transformers sees it: this file goes, with the sources of the model, into every folder whose
architecture transformers has not got (see `models.modeling`). Its tensors have our names, after `model.`.

Generation has no cache: each new token costs a pass over all before it. franca's own has one.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.generic import can_return_tuple

from franca.models.plain_config import read


class FrancaConfig(PreTrainedConfig):
    """`shape`: our configuration of the model. What is said of it under other names follows from it."""

    model_type = "franca_lm"

    def __init__(self, shape: dict[str, Any] | None = None, **more: Any) -> None:
        self.shape = shape or {}
        names = {"dim": "hidden_size", "num_layers": "num_hidden_layers", "max_seq_len": "max_position_embeddings"}
        names |= {"vocab_size": "vocab_size", "tied": "tie_word_embeddings"}
        super().__init__(**{**more, **{theirs: self.shape.get(ours) for ours, theirs in names.items()}})


class FrancaForCausalLM(PreTrainedModel, GenerationMixin):
    """Computes in the dtype of its weights; recurrences run in fp32 inside."""

    config_class = FrancaConfig
    base_model_prefix = "model"

    def __init__(self, config: FrancaConfig) -> None:
        super().__init__(config)
        self.model = read(config.shape).build()
        others = [name for name, _ in self.model.named_parameters() if not name.endswith((".weight", ".bias"))]
        self._keep_in_fp32_modules_strict = {rf"\.{name}$" for name in others}  # decays and steps of time
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module._parameters or module._buffers:
            owner: Any = module
            owner.reset(generator=None)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """Logits (B, T, V); with labels (B, T), which are the tokens themselves, the mean loss of predicting each from those
        before it (of `num_items_in_batch`, if that is given). The mask may have padding at either end, and no holes.
        """
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit and (self.model.rope is not None or self.model.positions is not None):
            raise ValueError(f"{length} tokens were given; the model has positions for {limit}")
        self.model.compute_dtype = self.model.embedding.weight.dtype
        logits = self.model(input_ids, *_without_padding(input_ids, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor | None]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _without_padding(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The documents and positions (B, T) by which a text sees nothing of its padding; None, None where there is none."""
    if mask is None or bool(mask.all()):
        return None, None
    if mask.shape != tokens.shape or bool((F.pad(mask.long(), (1, 0)).diff(dim=1) > 0).sum(1).gt(1).any()):
        raise ValueError(f"attention_mask, {tuple(mask.shape)}: expected {tuple(tokens.shape)}, each row's ones without holes")
    return mask.long(), (mask.long().cumsum(1) - 1).clamp_min(0)
