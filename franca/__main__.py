"""The command line: each verb says what it takes and where its code is; the code is imported when the verb is called."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from franca import __version__
from franca.core.errors import EXIT_CONFIG, ConfigError

app = typer.Typer(
    name="franca",
    help="From raw text to a trained, evaluated and published language model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.YAML", help="A run file, or an existing run folder to go on with.")]
Words = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings laid over the file.")]
Ranks = Annotated[int, typer.Option(help="How many devices, and so processes, it runs on.")]
Output = Annotated[Path, typer.Argument(help="The folder to make.")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the numbers.")]
Imports = Annotated[
    list[str] | None, typer.Option("--imports", help="A module of yours that defines the model; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _import(names: list[str] | None) -> None:
    for name in names or []:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"--imports {name}: cannot be imported ({error}). Is it on PYTHONPATH?") from None


def _call(target: str, *arguments: Any) -> Any:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)(*arguments)


@app.command(epilog="Example: franca demo my_demo")
def demo(
    folder: Annotated[Path, typer.Argument(help="Where everything goes; must not exist yet.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="How long to train; the default takes about three minutes on two cores.")] = 1100,
) -> None:
    """The whole way on this machine: prepare, train, stop, resume, measure, sample, export."""
    raise typer.Exit(_call("franca.demo:main", folder, steps))


@app.command(
    epilog="Example: franca prepare data.yaml workers=8 (or: prepare shuffle text.yaml, prepare tokenizer llama3 llama3.json)"
)
def prepare(
    file: Annotated[Path, typer.Argument(metavar="[shuffle|mix|tokenizer] DATA.YAML", help="What to prepare.")],
    words: Words = None,
) -> None:
    """Text to a dataset: a tokenizer, token shards, a held-out set. `shuffle`: all documents into one random order first.
    `mix`: prepared datasets and weights into one dataset. `tokenizer`: one by its name or file, or trained on DATA.YAML.
    """
    given, module = list(words or []), "prepare"
    if str(file) == "tokenizer":
        _call("franca.data.prepare:make_tokenizer", given)
        return
    if str(file) in ("shuffle", "mix"):
        if not given:
            raise ConfigError(f"franca prepare {file}: which settings? For example: franca prepare {file} {file}.yaml")
        file, module = Path(given.pop(0)), str(file)
    _call(f"franca.data.{module}:main", file, given)


@app.command(epilog="Example: franca verify data/mine --json (or: verify losses runs/mine runs/other --rtol 1e-5)")
def verify(
    path: Annotated[Path, typer.Argument(metavar="[losses RUN] PATH", help="A prepared dataset; or: losses, and two runs.")],
    runs: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    rtol: Annotated[
        float | None, typer.Option(min=0, help="Of losses: the relative difference that is none; default 0.")
    ] = None,
    json: Json = False,
) -> None:
    """Read every byte of a dataset and say what is not as it was written.
    `losses`: whether two runs are the same, and the first step and the first tensor of their checkpoints that differ.
    """
    if str(path) == "losses":
        if len(runs or []) != 2:
            raise ConfigError("franca verify losses: which two runs? For example: franca verify losses runs/mine runs/other")
        raise typer.Exit(_call("franca.train.compare:main", *(runs or []), rtol or 0.0, json))
    if runs or rtol is not None:
        raise ConfigError(
            f"franca verify {path}: a dataset is verified by itself, without --rtol. For runs: franca verify losses"
        )
    raise typer.Exit(_call("franca.data.verify:main", path, json))


@app.command(epilog="Example: franca plan run.yaml --ranks 8 train.batch_samples=256")
def plan(file: RunFile, words: Words = None, ranks: Ranks = 1, json: Json = False) -> None:
    """What a run will take, and every problem that would keep it from finishing."""
    raise typer.Exit(_call("franca.cluster.plan:main", file, words or [], ranks, json))


@app.command(epilog="Example: franca train run.yaml optim.lr=3e-4")
def train(file: RunFile, words: Words = None) -> None:
    """Train in this process (or, under torchrun or srun, as one of several). Run it again to resume."""
    raise typer.Exit(_call("franca.train.loop:main", file, words or []))


@app.command(epilog="Example: franca launch run.yaml --ranks 2")
def launch(file: RunFile, words: Words = None, ranks: Ranks = 1) -> None:
    """Train on several processes of this machine."""
    raise typer.Exit(_call("franca.cluster.local:main", file, words or [], ranks))


@app.command(epilog="Example: franca status runs/mine --json")
def status(run: Annotated[Path, typer.Argument(help="A run folder.")], json: Json = False) -> None:
    """Where a run stands: step, loss, checkpoints, attempts."""
    _call("franca.cluster.status:main", run, json)


@app.command(epilog="Example: franca sample runs/mine -p 'import os' -p 'def main' temperature=0.8 max_new_tokens=64")
def sample(
    source: Annotated[Path, typer.Argument(help="A run, a checkpoint or a Hugging Face folder.")],
    words: Words = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; may be repeated.")] = None,
    precision: Precision = "fp32",
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL: objects with a `prompt`, perhaps `max_new_tokens`, and what else is to be kept.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL to make: the same with the answers. If killed, run it again.")] = None,
    imports: Imports = None,
) -> None:
    """Let a model continue a text (from -p, from a file, or from standard input)."""
    _import(imports)
    _call("franca.infer.sample:main", source, prompt or [], words or [], precision, prompts, out)


@app.command(epilog="Example: franca export runs/mine my-model --precision bf16")
def export(
    source: Annotated[Path, typer.Argument(help="A run or a checkpoint.")],
    output: Output,
    precision: Precision = "fp32",
    form: Annotated[
        Literal["hf", "torch"], typer.Option("--format", help="A folder for transformers, or one torch file.")
    ] = "hf",
    ema: Annotated[bool, typer.Option(help="The average of the weights (optim.ema) in place of the last ones.")] = False,
    imports: Imports = None,
) -> None:
    """Write a Hugging Face folder that transformers loads as it is."""
    _import(imports)
    _call("franca.checkpoint.convert:export", source, output, precision, form, ema)
    print(output)


@app.command("import", epilog="Example: franca import Llama-3.2-1B imported/llama-1b")
def import_(
    source: Annotated[Path, typer.Argument(help="A folder with safetensors, or a torch file of export.")],
    output: Output,
    imports: Imports = None,
) -> None:
    """A Hugging Face folder as a checkpoint to sample from, or to start from (init_from)."""
    _import(imports)
    _call("franca.checkpoint.convert:import_folder", source, output)
    print(output)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"franca {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; a wrong config is one message and exit code 78."""
    try:
        app()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)


if __name__ == "__main__":
    main()
