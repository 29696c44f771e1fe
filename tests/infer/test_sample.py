"""Text in, text out."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from franca.core.errors import ConfigError
from franca.data.tokenizer import Tokenizer
from franca.infer import sample
from franca.infer.generate import SamplingConfig, generate
from franca.infer.sample import complete

GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)
PROMPTS = ["The miller", "größer als", " two  geese, and", ""]


def test_run_checkpoint_and_exported_folder_say_the_same(trained: Any) -> None:
    from_run = complete(trained.run, PROMPTS, GREEDY)
    assert complete(trained.run / "checkpoints" / "0000000003", PROMPTS, GREEDY) == from_run
    assert complete(trained.folder, PROMPTS, GREEDY) == from_run
    assert all(from_run)


def test_the_text_is_that_of_transformers(trained: Any) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(trained.folder), AutoModelForCausalLM.from_pretrained(trained.folder)
    for prompt, text in zip(PROMPTS[:3], complete(trained.folder, PROMPTS[:3], GREEDY), strict=True):
        given = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        assert tokenizer.decode(out, skip_special_tokens=True) == prompt + text


def test_an_empty_prompt_starts_where_a_text_ended(trained: Any) -> None:
    tokens = generate(trained.model, [[trained.tokenizer.eos]], GREEDY, [trained.tokenizer.eos])
    assert complete(trained.run, [""], GREEDY) == [trained.tokenizer.decode(tokens[0])]


def test_bf16_speaks_too(trained: Any) -> None:
    run, folder = (complete(source, PROMPTS[:1], GREEDY, "bf16") for source in (trained.run, trained.folder))
    assert run == folder


def test_a_seed_is_reproducible(trained: Any) -> None:
    texts = [complete(trained.run, PROMPTS, SamplingConfig(max_new_tokens=12, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_the_space_between_prompt_and_continuation_is_kept() -> None:
    """Tokenizers like Llama 2's write a leading space as part of a word and drop it at the start of a text."""
    backend = tokenizers.Tokenizer(models.WordLevel({"▁two": 0, "▁geese": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode(["two"])[0].tolist() == [0]
    assert tokenizer.decode([1]) == "geese"
    assert sample._new_text(tokenizer, [0], [1, 1]) == " geese geese"
    assert sample._new_text(tokenizer, [0], []) == ""


@pytest.mark.parametrize(
    ("sampling", "prompt", "words"),
    [
        (GREEDY, "geese " * 60, r"prompt tokens and 12 new ones do not fit into the model's context of 64"),
        (SamplingConfig(max_new_tokens=64), "two", r"64 new ones do not fit"),
    ],
    ids=["long prompt", "long answer"],
)
def test_what_cannot_be_is_one_message(trained: Any, sampling: SamplingConfig, prompt: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        complete(trained.run, [prompt], sampling)


def test_a_folder_without_a_model_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither a run nor a checkpoint folder"):
        complete(tmp_path, ["two"], GREEDY)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_settings_are_given_as_words(trained: Any, capsys: pytest.CaptureFixture[str], precision: Any) -> None:
    sample.main(trained.run, PROMPTS[:2], ["temperature=0", "max_new_tokens=12"], precision)
    first, second = complete(trained.run, PROMPTS[:2], GREEDY, precision)
    assert capsys.readouterr().out == f"{PROMPTS[0]}{first}\n\n---\n{PROMPTS[1]}{second}\n"


def test_a_setting_out_of_range_is_refused_by_its_name(trained: Any) -> None:
    with pytest.raises(ConfigError, match=r"^franca sample: temperature: input should be greater than or equal to 0"):
        sample.main(trained.run, ["two"], ["temperature=-1.0"], "fp32")


def test_an_unknown_setting_is_refused_by_its_name(trained: Any) -> None:
    with pytest.raises(ConfigError, match=r"^franca sample: temprature: unknown key \(did you mean 'temperature'\?\)"):
        sample.main(trained.run, ["two"], ["temprature=0"], "fp32")


def test_a_model_is_opened_without_gradients(trained: Any) -> None:
    with torch.enable_grad():
        complete(trained.run, ["two"], GREEDY)
        assert torch.is_grad_enabled()
