"""Text in, text out."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from franca.__main__ import app
from franca.core.errors import ConfigError
from franca.data.tokenizer import Tokenizer
from franca.infer import sample
from franca.infer.generate import Result, SamplingConfig, Text, generate
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
    [result] = generate(trained.model, [[trained.tokenizer.eos]], GREEDY, [trained.tokenizer.eos])
    assert complete(trained.run, [""], GREEDY) == [trained.tokenizer.decode(result.tokens)]


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
    text = Text(tokenizer.decode, [0], [])
    assert [text.add([1], False), text.add([1], False), text.add([], True)] == [" geese", " geese", ""]


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


# --- files of prompts


def prompts_file(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


RECORDS = [{"id": n, "prompt": PROMPTS[n % 4], "tags": ["ä"], **({"max_new_tokens": 3 + n} if n % 3 else {})} for n in range(7)]
WORDS = ["temperature=0.9", "max_new_tokens=12", "seed=5", "max_rows=3"]


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts_becomes_one_of_answers_in_its_order(trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    sample.main(trained.run, [], WORDS, "fp32", prompts_file(tmp_path / "in.jsonl", *RECORDS), out)
    found = answers(out)
    assert [{key: record[key] for key in RECORDS[n]} for n, record in enumerate(found)] == RECORDS
    for record in found:
        assert set(record) - {"id", "prompt", "tags", "max_new_tokens"} == {"text", "tokens", "logprobs", "finish"}
        assert len(record["tokens"]) == len(record["logprobs"]) <= record.get("max_new_tokens", 12)
        assert record["finish"] in ("length", "stop_token")
        assert len(record["tokens"]) == record.get("max_new_tokens", 12) or record["finish"] == "stop_token"
    texts = complete(
        trained.run, [record["prompt"] for record in RECORDS], SamplingConfig(max_new_tokens=12, seed=5, temperature=0.9)
    )
    assert [record["text"] for record in found][::3] == texts[::3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_job_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = prompts_file(tmp_path / "in.jsonl", *RECORDS)
    sample.main(trained.run, [], WORDS, "fp32", file, tmp_path / "whole.jsonl")
    real, asked = sample.stream, []

    def dying(model: Any, prompts: Any, *more: Any) -> Any:
        asked.append(set(prompts))
        ended = 0
        for number, piece, result in real(model, prompts, *more):
            yield number, piece, result
            ended += result is not None
            if ended == 3 and len(asked) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(sample, "stream", dying)
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample.main(trained.run, [], WORDS, "fp32", file, out)
    assert not out.exists()
    with open(tmp_path / ".out.jsonl.partial", "a") as partial:
        partial.write('{"number": 6, "tok')  # torn
    with pytest.raises(ConfigError, match=r"was begun with other settings \(seed: was 5, is 6\); give those, or remove"):
        sample.main(trained.run, [], [*WORDS, "seed=6"], "fp32", file, out)
    sample.main(trained.run, [], [*WORDS, "max_rows=2"], "fp32", file, out)
    assert [len(numbers) for numbers in asked] == [7, 4]
    whole, resumed = answers(tmp_path / "whole.jsonl"), answers(out)
    for one, other in zip(whole, resumed, strict=True):
        assert one.pop("logprobs") == pytest.approx(other.pop("logprobs"), abs=1e-4)
    assert whole == resumed
    with pytest.raises(ConfigError, match=r"out.jsonl: exists already; choose another file or remove it"):
        sample.main(trained.run, [], WORDS, "fp32", file, out)


def test_all_lines_that_are_wrong_are_told_together(trained: Any, tmp_path: Path) -> None:
    wrong = ['{"prompt": "a"', {"text": "a"}, {"prompt": 1}, [1], {"prompt": "a", "max_new_tokens": 0}]
    file = prompts_file(tmp_path / "in.jsonl", {"prompt": "a"}, *wrong, {"prompt": "a", "tokens": [], "finish": 1})
    with pytest.raises(ConfigError) as error:
        sample.main(trained.run, [], [], "fp32", file)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{file}: 6 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [f"line {n}" for n in range(2, 8)]
    assert "is not JSON" in lines[1]
    assert all("needs an object with a string `prompt`" in line for line in lines[2:5])
    assert "max_new_tokens is 0; give a whole number from 1 on" in lines[5]
    assert "finish, tokens: the answer gets this name" in lines[6]


@pytest.mark.parametrize(
    ("prompts", "file", "out", "words"),
    [
        (["a"], "in.jsonl", None, "was given --prompt and --prompts"),
        ([], "none.jsonl", None, "none.jsonl: cannot be read"),
        ([], "empty.jsonl", None, "empty.jsonl: has no lines"),
        (["a"], None, "none/out.jsonl", "its folder does not exist"),
    ],
)
def test_files_that_cannot_be_are_told(trained: Any, tmp_path: Path, prompts: Any, file: Any, out: Any, words: str) -> None:
    prompts_file(tmp_path / "in.jsonl", {"prompt": "a"})
    prompts_file(tmp_path / "empty.jsonl")
    places = [None if name is None else tmp_path / name for name in (file, out)]
    with pytest.raises(ConfigError, match=words):
        sample.main(trained.run, prompts, [], "fp32", *places)


# --- the screen


def test_the_first_text_that_has_not_ended_is_shown_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    end = Result([], [], "length", "")
    steps: list[tuple[tuple[int, str, Result | None], str]] = [
        ((1, "one", None), "A"),
        ((0, " two", None), " two"),
        ((1, " three", end), ""),
        ((0, " four", end), " four\n\n---\nBone three\n\n---\nC"),
        ((2, " five", None), " five"),
        ((2, "", end), "\n"),
    ]
    shown: list[str] = []

    def come() -> Any:
        for answer, _ in steps:
            yield answer
            shown.append(capsys.readouterr().out)

    sample._print([{"prompt": "A"}, {"prompt": "B"}, {"prompt": "C"}], come())
    assert shown == [expected for _, expected in steps]


def test_a_stop_string_is_a_setting(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    [text] = complete(trained.run, [PROMPTS[0]], GREEDY)
    stop = next(character for character in text[2:] if character.isascii() and character.isalpha())
    sample.main(trained.run, PROMPTS[:1], ["temperature=0", "max_new_tokens=12", f'stop=["{stop}","\\n\\n\\n"]'], "fp32")
    assert capsys.readouterr().out == f"{PROMPTS[0]}{text[: text.index(stop)]}\n"


def test_the_verb_takes_files(trained: Any, tmp_path: Path) -> None:
    file, out = prompts_file(tmp_path / "in.jsonl", *RECORDS), tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["sample", str(trained.run), *WORDS, "--prompts", str(file), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert len(answers(out)) == 7
