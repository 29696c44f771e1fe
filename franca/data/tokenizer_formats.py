"""Tokenizers from anywhere as a `tokenizer.json`: SentencePiece models, tiktoken files, and tokenizers by name.

What is converted is read back, compared with the library it came from, and refused where the ids differ: never used silently.
What it refuses to know: how a tokenizer is trained, and what is done with it.
"""

import re
import sys
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from franca.core.errors import ConfigError
from franca.core.run import write_atomically
from franca.data.tokenizer import END_OF_TEXT, TRAPS, Tokenizer

HUB = {
    "gpt2": "openai-community/gpt2",
    "llama2": "meta-llama/Llama-2-7b-hf",
    "llama3": "meta-llama/Meta-Llama-3-8B",
    "gemma": "google/gemma-2-2b",
}


class Scheme(NamedTuple):
    """What a file of ranks does not say. The pattern is in words that tiktoken and `tokenizers` read alike."""

    pattern: str
    num_ranks: int
    special: Mapping[str, int]


def _schemes() -> dict[str, Scheme]:
    endings, rest = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    any_case = rf"{endings}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{rest}"
    lower, upper = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    cased = [rf"[^\r\n\p{{L}}\p{{N}}]?{word}{endings}?" for word in (f"{upper}*{lower}+", f"{upper}+{lower}*")]
    by_case = "|".join([*cased, r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", rest])
    fill = [f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix")]
    cl100k = {END_OF_TEXT: 100_257, "<|endofprompt|>": 100_276} | {name: 100_258 + n for n, name in enumerate(fill)}
    spare = [f"<|reserved_special_token_{n}|>" for n in range(251)]
    turns = ["<|start_header_id|>", "<|end_header_id|>", spare[4], "<|eot_id|>"]
    llama3 = ["<|begin_of_text|>", "<|end_of_text|>", *spare[:4], *turns, *spare[5:]]
    return {
        "gpt2": Scheme(words, 50_256, {END_OF_TEXT: 50_256}),
        "r50k_base": Scheme(words, 50_256, {END_OF_TEXT: 50_256}),
        "p50k_base": Scheme(words, 50_280, {END_OF_TEXT: 50_256}),
        "cl100k_base": Scheme(any_case, 100_256, cl100k),
        "o200k_base": Scheme(by_case, 199_998, {END_OF_TEXT: 199_999, "<|endofprompt|>": 200_018}),
        "llama3": Scheme(any_case, 128_000, {name: 128_000 + n for n, name in enumerate(llama3)}),
    }


SCHEMES = _schemes()
NAMES = ("bytes", *dict.fromkeys([*HUB, *SCHEMES]))


def named(name: str) -> Tokenizer:
    """A tokenizer by its name: `bytes`, one of the hub, one of tiktoken. Raises ConfigError if it cannot be had."""
    if name == "bytes":
        ranks = {bytes([value]): value for value in range(256)}
        return _checked(_byte_level(ranks, None, {END_OF_TEXT: 256}), lambda text: list(text.encode()), name, (END_OF_TEXT,))
    if name in HUB:
        return _from_hub(HUB[name])
    if name not in SCHEMES:
        close = "".join(f"Did you mean {found!r}? " for found in get_close_matches(name, NAMES, n=1))
        raise ConfigError(f"tokenizer {name!r}: no such name or file. {close}Names are {', '.join(NAMES)}.")
    tiktoken = _extra("tiktoken")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        problem = f"tiktoken cannot load it ({type(error).__name__})"
        raise ConfigError(f"tokenizer {name!r}: {problem}. Is the network there? Or give the path of a file.") from None
    return _of_encoding(encoding, SCHEMES[name].pattern, name)


def open_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.json`, a SentencePiece model, a tiktoken file, or a folder that holds one; known by its content."""
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise ConfigError(f"{path}: has neither a tokenizer.json nor a tokenizer.model")
        path = found[0]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a tokenizer.") from None
    if content.lstrip()[:1] == b"{":
        return Tokenizer.load(path)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", content):
        return _from_ranks(path, content)
    return _from_sentencepiece(str(path), content)


def main(words: list[str], train: Callable[[Path, list[str]], Tokenizer]) -> None:
    """The command: NAME|FILE|DATA.YAML [OUTPUT.json] [a.b=c...]. `train` makes a tokenizer of a DATA.YAML and settings."""
    given, settings = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if len(given) not in (1, 2):
        raise ConfigError(f"franca prepare tokenizer NAME|FILE|DATA.YAML [OUTPUT.json]: names are {', '.join(NAMES)}")
    name, source = given[0], Path(given[0]).expanduser()
    trained, is_file = source.suffix in (".yaml", ".yml"), name not in NAMES and source.exists()
    if settings and not trained:
        raise ConfigError(f"settings ({' '.join(settings)}) go with a DATA.YAML, not with {name}")
    output = Path(given[1] if len(given) == 2 else f"{source.stem if is_file or trained else name}.json").expanduser()
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"{output}: {'is a folder' if output.is_dir() else 'its folder is missing'}. Name an OUTPUT.json.")
    tokenizer = train(source, settings) if trained else open_tokenizer(source) if is_file else named(name)
    if output.exists() and output.read_bytes() != tokenizer.json.encode():
        raise ConfigError(f"{output}: is there already, and is another one. Remove it, or name another OUTPUT.json.")
    write_atomically(output, tokenizer.json)
    bos, eos = ("none" if t is None else f"{t} {tokenizer.backend.id_to_token(t)}" for t in (tokenizer.bos, tokenizer.eos))
    print(f"{output}: {tokenizer.vocab_size:,} tokens, bos {bos}, eos {eos}")
    for text, ids in zip(TRAPS[:3], tokenizer.encode(TRAPS[:3]), strict=True):
        back = tokenizer.decode(ids.tolist())
        print(f"  {text!r} -> {' '.join(map(str, ids))} -> {'the same' if back == text else repr(back)}")


def _extra(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(f"this tokenizer needs {module.partition('.')[0]}: pip install 'franca[data]'") from None


def _checked(backend: Backend, reference: Callable[[str], list[int]], where: str, special: Iterable[str]) -> Tokenizer:
    """The tokenizer as others will read it, if it has the ids of `reference` for texts that are easy to get wrong."""
    tokenizer = Tokenizer.parse(Tokenizer(backend).json, where)
    for text in (*TRAPS, " ".join(special), f"a{'b'.join(special)}"):
        if tokenizer.encode([text])[0].tolist() != reference(text):
            problem = f"a tokenizer.json of it would give other ids than its own library, for instance for {text[:60]!r}"
            raise ConfigError(f"{where}: {problem}. Take a tokenizer.json that its makers published, or another tokenizer.")
    return tokenizer


def _from_hub(repo: str) -> Tokenizer:
    """The `tokenizer.json` of a model on the hub. The token is the user's own; it is sent to the hub and written nowhere."""
    import httpx2
    from huggingface_hub import constants, hf_hub_download

    try:
        with TemporaryDirectory() as folder:
            text = Path(hf_hub_download(repo, "tokenizer.json", local_dir=folder)).read_text(encoding="utf-8", errors="replace")
    except (OSError, httpx2.HTTPError) as error:  # what the server says is not repeated: it has seen the token
        answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        status = getattr(answer, "status_code", None)
        if status in (401, 403):
            ask = f"Ask for access at {constants.ENDPOINT}/{repo}, and set HF_TOKEN or run `hf auth login`"
            problem = f"says no ({status}). {ask}"
        elif status is not None:
            problem = f"says {status}" + (": it has no tokenizer.json there" if status == 404 else "; try again later")
        elif constants.HF_HUB_OFFLINE:
            problem = "was not asked, since HF_HUB_OFFLINE is set. Unset it, or give the path of a file"
        else:
            problem = f"cannot be reached ({type(error.__cause__ or error).__name__}). Is the network there?"
        raise ConfigError(f"{repo}: {constants.ENDPOINT} {problem}.") from None
    return Tokenizer.parse(text, f"{repo}/tokenizer.json")


def _from_ranks(path: Path, content: bytes) -> Tokenizer:
    """A tiktoken file: a line for each token, its bytes in base64 and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: is not a token in base64 and its rank ({error})") from None
    by_size = "llama3" if len(ranks) == SCHEMES["llama3"].num_ranks else ""
    name = path.stem if path.stem in SCHEMES else by_size
    if not name:
        known = ", ".join(f"{name}.tiktoken" for name in SCHEMES)
        raise ConfigError(f"{path}: its name does not say how text is split into words. Call it what it is, one of: {known}")
    scheme = SCHEMES[name]
    ids = {*ranks.values(), *scheme.special.values()}
    whole = len(ranks) == scheme.num_ranks and len(ids) == len(ranks) + len(scheme.special)
    if not whole or not all(bytes([value]) in ranks for value in range(256)):
        wanted = f"{scheme.num_ranks:,} tokens with ranks of their own, all single bytes among them"
        raise ConfigError(f"{path}: {name} has {wanted}; this file has {len(ranks):,}. Load it again.")
    words = {"pat_str": scheme.pattern, "mergeable_ranks": ranks, "special_tokens": dict(scheme.special)}
    return _of_encoding(_extra("tiktoken").Encoding(name, **words), scheme.pattern, str(path))


def _of_encoding(encoding: Any, pattern: str, where: str) -> Tokenizer:
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    special = {name: encoding.encode_single_token(name) for name in sorted(encoding.special_tokens_set)}
    return _checked(_byte_level(ranks, pattern, special), encoding.encode_ordinary, where, special)


def _byte_level(ranks: Mapping[bytes, int], pattern: str | None, special: Mapping[str, int]) -> Backend:
    """Byte-level BPE. A word that is a token is that token, whatever its merges; without `pattern` there are no words."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that `tokenizers` writes as they are in Latin-1
    others = {value: 256 + n for n, value in enumerate(sorted({*range(256)} - {*shown}))}

    def spell(token: bytes) -> str:
        return token.decode("latin-1").translate(others)

    merges = [(spell(left), spell(right)) for left, right in _merges(ranks)]
    vocab = {spell(token): rank for token, rank in ranks.items()} | dict(special)
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pattern is not None))
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, as_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return backend


def _merges(ranks: Mapping[Any, int]) -> Iterator[tuple[Any, Any]]:
    """The last merge of every token (bytes or str), by rank. It is the only one that ever makes that token: until then its
    text is merged as it would be alone, since no merge crosses its ends. Without it a token is only found as a whole word.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[n : n + 1] for n in range(len(token))]
        while len(parts) > 2:
            found = [(ranks[a + b], n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not found:
                break
            place = min(found)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _from_sentencepiece(where: str, content: bytes) -> Tokenizer:
    """A SentencePiece model. Raises ConfigError for those that a tokenizer.json cannot express."""
    library, proto = _extra("sentencepiece"), _extra("sentencepiece.sentencepiece_model_pb2").ModelProto()
    try:
        proto.ParseFromString(content)
        _refuse_inexact(where, proto)
        model = library.SentencePieceProcessor(model_proto=content)
    except ConfigError:
        raise
    except Exception as error:  # of protobuf or of sentencepiece
        known = "a tokenizer.json, a SentencePiece model or a tiktoken file"
        raise ConfigError(f"{where}: is not {known}, or not a whole one ({type(error).__name__})") from None
    spaces, replace = proto.normalizer_spec, normalizers.Replace
    build = _bpe if proto.trainer_spec.model_type == proto.trainer_spec.BPE else _unigram
    backend = build(proto, model.unk_id())
    steps: list[Any] = [replace(" ", "▁")]
    if spaces.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    if spaces.remove_extra_whitespaces:  # the last also for this sign in a text, as sentencepiece does
        steps = [replace(Regex(r"\A +"), ""), replace(Regex(" {2,}"), " "), *steps, replace(Regex(r"(?<!▁)▁+\z"), "")]
    backend.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if spaces.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    own = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED]
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(piece, normalized=True) for piece in own])
    tokenizer = _checked(backend, model.encode, where, [*special, *own, "<0x0A>"])
    for name, found, wanted in (("BOS", tokenizer.bos, model.bos_id()), ("EOS", tokenizer.eos, model.eos_id())):
        if (-1 if found is None else found) != wanted:
            given = "none" if wanted < 0 else repr(model.id_to_piece(wanted))
            raise ConfigError(f"{where}: its {name} token is {given}; by the usual names another one would be found")
    return tokenizer


def _refuse_inexact(where: str, proto: Any) -> None:
    """Raise ConfigError for what `tokenizers` does otherwise than sentencepiece."""
    model, text, kinds = proto.trainer_spec, proto.normalizer_spec, {p.type for p in proto.pieces}
    normal, kind = [p for p in proto.pieces if p.type == p.NORMAL], proto.SentencePiece
    if not normal:
        raise ValueError("no pieces")
    scores = [p.score for p in normal if len(p.piece) > 1]
    one_way = model.model_type == model.BPE and not (text.add_dummy_prefix or text.remove_extra_whitespaces)
    characters = {p.piece for p in proto.pieces if len(p.piece) == 1}
    problems = {
        "its type is neither BPE nor Unigram": model.model_type not in (model.BPE, model.UNIGRAM),
        f"its normaliser ({text.name}) rewrites sequences of characters": bool(text.precompiled_charsmap),
        "it marks white space in its own way": model.treat_whitespace_as_suffix or not text.escape_whitespaces,
        "it has pieces that may not be used": kind.UNUSED in kinds,
        "it has user-defined symbols, and is Unigram or adds or removes spaces": kind.USER_DEFINED in kinds and not one_way,
        "two of its merges have one score": model.model_type == model.BPE and len({*scores}) < len(scores),
        "it has pieces of characters that are no pieces": not characters.issuperset(c for p in normal for c in p.piece),
    }
    if found := [problem for problem, is_so in problems.items() if is_so]:
        advice = "Take the tokenizer.json that its makers published, or train one with the normaliser `identity`"
        raise ConfigError(f"{where}: no tokenizer.json would give its ids, since {' and '.join(found)}. {advice}.")


def _bpe(proto: Any, unknown: int) -> Backend:
    by_score = sorted((p for p in proto.pieces if p.type == p.NORMAL and len(p.piece) > 1), key=lambda p: -p.score)
    merges = list(_merges({p.piece: rank for rank, p in enumerate(by_score)}))
    vocab = {p.piece: number for number, p in enumerate(proto.pieces)}
    fallback, name = proto.trainer_spec.byte_fallback, proto.pieces[unknown].piece
    return Backend(models.BPE(vocab, merges, unk_token=name, fuse_unk=True, byte_fallback=fallback))


def _unigram(proto: Any, unknown: int) -> Backend:
    """Control pieces and bytes, which are no text, get a score so low that no known text is split into them. Between unknown
    and known characters, where every split has a bound, words end: so unknown text never becomes such a piece either.
    """
    print("note: of splits with the same score, sentencepiece may take another: it sums in 32 bits", file=sys.stderr)
    normal, others = ([p for p in proto.pieces if (p.type == p.NORMAL) is wanted] for wanted in (True, False))
    never = (1 + max(len(p.piece) for p in others)) * min(-1.0, *(p.score for p in normal))
    scores = [(p.piece, p.score if p.type == p.NORMAL else never) for p in proto.pieces]
    backend = Backend(models.Unigram(scores, unknown, proto.trainer_spec.byte_fallback))
    letters = {letter for p in others for letter in p.piece}
    known = letters & {p.piece for p in normal}
    strange, familiar = ("".join(map(re.escape, sorted(some))) for some in (letters - known, known))
    if strange and familiar:
        ends = f"(?<=[{strange}])(?=[{familiar}])|(?<=[{familiar}])(?=[{strange}])"
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(ends), "isolated")
    return backend
