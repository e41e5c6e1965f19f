"""The `pldr` command: one function a verb. Heavy imports happen inside the verbs, so that help starts at once."""

import contextlib
import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pldr.training import TrainingInterrupted

_EXPECTED = (ValueError, OSError, FloatingPointError, ModuleNotFoundError)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train, run and study PLDR-LLMs.",
)

Model = Annotated[Path, typer.Argument(help="Model folder (this library's, hub or reference layout) or .pth file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Tokenizer = Annotated[
    Path | None, typer.Option(help="Tokenizer folder or SentencePiece file, if not in the model folder.")
]
Rope = Annotated[
    str | None, typer.Option("--rope", help="RoPE of a reference checkpoint: adjacent (v51, default) or halves (v52).")
]
OperatorFile = Annotated[
    Path | None, typer.Option("--g-lm", help="File with a predefined G_LM (.safetensors, or a pickle of tensors).")
]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from pldr import __version__

        typer.echo(f"pldr {__version__}")
        raise typer.Exit


@app.command()
def generate(
    model: Annotated[
        str,
        typer.Argument(help="Model folder or .pth file; or, with no prompt, the text for the model that comes along."),
    ],
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; - reads it from standard input.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to add; 64 by default.")] = None,
    cache: Annotated[str, typer.Option(help="What to keep between tokens: kv+g, kv, g or none.")] = "kv+g",
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; greedy if no sampling is set.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most probable tokens; 0 means all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens of this total probability.")] = None,
    beams: Annotated[int, typer.Option(help="Beam-search width.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is generated.")] = False,
    as_json: AsJson = False,
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    g_lm: OperatorFile = None,
    device: Annotated[str, typer.Option(help="Where to run, for example cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
) -> None:
    """Continue a text, with the model named or with the small story model that comes with the package."""
    from pldr.models.shipped import STORIES

    if prompt is None:
        if os.path.exists(model):  # also of a text too long for a file name
            raise ValueError(f"generate: {model} is a model or a file; say what text it should continue")
        model, prompt = str(STORIES), model
    if stream and as_json:
        raise ValueError("--stream and --json: choose one")
    if prompt == "-":
        prompt = sys.stdin.read()
    from pldr.generation import generate_text

    loaded, text_tokenizer = _load(Path(model), tokenizer, device=device, dtype=dtype, rope=rope, g_lm=g_lm)
    result = generate_text(
        loaded, text_tokenizer, prompt, max_new_tokens=max_new_tokens, cache=cache, temperature=temperature,
        top_k=top_k, top_p=top_p, beams=beams, seed=seed,
        on_text=(lambda piece: typer.echo(piece, nl=False)) if stream else None,
    )  # fmt: skip
    if as_json:
        fields = {"prompt": prompt, "cache": cache, "operator": loaded.config.operator} | vars(result)
        _print_json(fields | {"tokens_per_second": result.tokens_per_second})
    else:
        typer.echo("" if stream else result.text)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of one that comes with the package.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value pairs, e.g. optimization.steps=100.")] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output.")] = False,
    resume_from: Annotated[Path | None, typer.Option(help="Go on from this checkpoint.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse bad rows of the data, rather than skip them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from a recipe: alone, or in each process of torchrun or accelerate launch."""
    if sum((overwrite, resume, resume_from is not None)) > 1:
        raise ValueError("--overwrite, --resume and --resume-from: choose one")
    from pldr.recipe import load_recipe

    parsed = load_recipe(recipe, overrides)
    _quiet()
    _require("train", "accelerate")
    from pldr.training.run import train as run

    parsed.data.strict |= strict
    summary = run(parsed, overwrite=overwrite, resume=resume_from or resume)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        _print_json({"output": parsed.output} | summary)
    else:
        for name, value in summary.items():
            typer.echo(f"{name:>18}  {value:,.4f}" if isinstance(value, float) else f"{name:>18}  {value:,}")
        typer.echo(f"{'saved in':>18}  {parsed.output}")


tokenizer_app = typer.Typer(no_args_is_help=True, help="Tokenizers.")
app.add_typer(tokenizer_app, name="tokenizer")


@tokenizer_app.command("train")
def train_tokenizer(
    sources: Annotated[list[str], typer.Argument(help="Text, .jsonl and .parquet files or patterns, hub:NAME.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Number of pieces.")] = 32000,
    model: Annotated[str, typer.Option(help="unigram (as published) or bpe.")] = "unigram",
    text_column: Annotated[str, typer.Option(help="Of JSON lines, Parquet files and hub data sets.")] = "text",
    split: Annotated[str, typer.Option(help="Of hub data sets.")] = "train",
    interval: Annotated[str, typer.Option(help="Which documents: start:stop, by index or percent.")] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse bad rows, rather than skip them.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a SentencePiece model and save it as a transformers fast tokenizer too."""
    _quiet()
    from pldr.data.sources import BadRows, Source, read_pieces
    from pldr.files import check_output, whole_folder
    from pldr.tokenizer import load_tokenizer, train_sentencepiece

    check_output(output, overwrite=overwrite)
    bad = BadRows(strict)
    pieces = read_pieces(Source(sources, text_column, split, interval), bad)
    with whole_folder(output, overwrite=overwrite) as folder:
        file = train_sentencepiece((piece.text for piece in pieces), folder / "tokenizer.model", vocab_size, model)
        load_tokenizer(file).save_pretrained(folder)
    if bad.counts:
        _report(f"data: {bad.summary()}")
    typer.echo(f"{output}: {vocab_size:,} pieces ({model})")


@app.command()
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a training run, sharded or not.")],
    destination: Annotated[Path, typer.Argument(help="Model folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Make a model folder of a training checkpoint."""
    _quiet()
    from pldr.training.checkpoint import merge_checkpoint

    model = merge_checkpoint(checkpoint, destination, overwrite=overwrite)
    typer.echo(f"{destination}: {model.num_parameters():,} parameters, {model.config.operator} operator")


@app.command()
def convert(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="Layout to write: pldr, hub or reference.")] = "pldr",
    rope: Rope = None,
    g_lm: OperatorFile = None,
    tokenizer: Tokenizer = None,
    overwrite: Overwrite = False,
) -> None:
    """Rewrite a checkpoint in another layout, bit for bit."""
    _quiet()
    from pldr.checkpoints.convert import convert_checkpoint

    model = convert_checkpoint(
        source, destination, to=to, rope_pairing=rope, G_LM=g_lm, tokenizer=tokenizer, overwrite=overwrite
    )
    typer.echo(f"{destination}: {model.num_parameters():,} parameters, {model.config.operator} operator, {to} layout")


@app.command()
def freeze(
    model: Model,
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to compute G_LM from; may be repeated.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="File of such texts, one a line.")] = None,
    g_lm: OperatorFile = None,
    trainable: Annotated[bool, typer.Option("--trainable", help="Make G_LM a parameter, to train on with.")] = False,
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    overwrite: Overwrite = False,
) -> None:
    """Make the operator a constant, from prompts or from a file, and drop the network that computed it."""
    from pldr.files import check_output, whole_folder

    check_output(destination, overwrite=overwrite)
    texts = list(prompt or [])
    if prompts_file is not None:
        from pldr.files import read_text

        texts += [line for line in read_text(prompts_file).splitlines() if line.strip()]
    if bool(texts) == (g_lm is not None):
        raise ValueError("pass either --prompt / --prompts-file (with some text) or --g-lm")
    import torch

    from pldr.checkpoints.load import load_predefined_G
    from pldr.generation import encode_prompt
    from pldr.operator import freeze as make_constant

    loaded, text_tokenizer = _load(model, tokenizer, rope=rope, needs_tokenizer=bool(texts))
    before = loaded.num_parameters()
    if texts:
        prompts = [torch.tensor(encode_prompt(text_tokenizer, text)) for text in texts]
        make_constant(loaded, prompts, trainable=trainable)
    else:
        make_constant(loaded, G_LM=load_predefined_G(g_lm), trainable=trainable)  # type: ignore[arg-type]
    with whole_folder(destination, overwrite=overwrite) as folder:
        loaded.save_pretrained(folder)
        if text_tokenizer is not None:
            text_tokenizer.save_pretrained(folder)
    typer.echo(f"{destination}: constant operator, {loaded.num_parameters():,} parameters (before: {before:,})")


@app.command()
def info(model: Model, rope: Rope = None, g_lm: OperatorFile = None, as_json: AsJson = False) -> None:
    """Show a model's shape, parameters, operators and cache sizes."""
    _quiet()
    from pldr.checkpoints.certificate import read_certificate
    from pldr.checkpoints.load import load_model
    from pldr.tables import facts_view, model_facts, show

    facts = model_facts(load_model(model, rope_pairing=rope, G_LM=g_lm))
    if certificate := read_certificate(model):
        facts["certificate"] = certificate
    if as_json:
        _print_json(facts)
    else:
        show(facts_view(facts))


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="Model folder or .pth file, or a G_LM (.safetensors, .pkl).")],
    data: Annotated[
        list[str] | None,
        typer.Argument(help="Text: .txt, .jsonl, .parquet files or patterns, hub:NAME; else what comes along."),
    ] = None,
    passages: Annotated[int | None, typer.Option(help="Passages to look at; 32, or as many as there are.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a passage; 512, or the context if that is less.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Of JSON lines, Parquet files and hub data sets.")] = "text",
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    g_lm: OperatorFile = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Also write a report with pictures, one HTML file.")] = None,
    device: Annotated[str, typer.Option(help="Where to run, for example cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
) -> None:
    """Statistics of A, A_LM, A_P and G_LM: rank, determinant, singular values, whether they depend on the text."""
    if html is not None and html.is_dir():
        raise ValueError(f"--html: {html} is a folder; name a file")
    if model.is_file() and model.suffix in (".safetensors", ".pkl"):
        if any((data, passages, length, tokenizer, rope, g_lm, device != "cpu", dtype != "auto")):
            raise ValueError(
                f"inspect: {model} holds a tensor, with which go no data and no options but --json and --html"
            )
        _quiet()
        from pldr.checkpoints.load import load_predefined_G
        from pldr.study.statistics import analyse_operator

        analysis, source = analyse_operator(load_predefined_G(model)), ""
    else:
        from pldr.study.statistics import analyse_model

        loaded, text_tokenizer = _load(model, tokenizer, device=device, dtype=dtype, rope=rope, g_lm=g_lm)
        ids, source = _passages(
            data, text_tokenizer, loaded.config.max_position_embeddings, passages, length, text_column
        )
        analysis = analyse_model(loaded, ids)
    if html is not None:
        from pldr.study.page import write_report

        write_report(analysis, html, title=model.resolve().name, source=source)
    if as_json:
        _print_json({"model": str(model), "source": source} | analysis.to_json())
        return
    from pldr.tables import analysis_view, show

    if source:
        typer.echo(f"{analysis.passages} passages of {analysis.length} tokens: {source}\n")
    show(analysis_view(analysis))
    if html is not None:
        typer.echo(f"report: {html}")


def _passages(
    data: list[str] | None, tokenizer: Any, context: int, count: int | None, length: int | None, text_column: str
) -> tuple[Any, str]:
    """Token ids [B, T] of the passages to look at, and what they are, for people.

    Raises:
        ValueError: a length beyond the context; no text, or fewer passages than asked for.
    """
    if length is not None and not 1 <= length <= context:
        raise ValueError(f"--length must be between 1 and the context of {context}, got {length}")
    if count is not None and count < 1:
        raise ValueError(f"--passages must be at least 1, got {count}")
    from pldr.data.rows import read_passages
    from pldr.data.sources import Source
    from pldr.models.shipped import HELD_OUT

    length = length or min(512, context)
    # The excerpts that come along have one form; --text-column is about the user's own data.
    source = Source(data, text_column) if data else Source([str(HELD_OUT)])
    ids = read_passages(source, tokenizer, length, count or 32)
    if count is not None and len(ids) < count:
        raise ValueError(
            f"data: {len(ids)} passages of {length} tokens, {count} are asked for; give more text, or lower --passages "
            "or --length"
        )
    return ids, ", ".join(data) if data else "held-out excerpts that come with the package"


@app.command()
def certify(
    model: Model,
    data: Annotated[
        list[str], typer.Argument(help="Held-out text: .txt, .jsonl, .parquet files or patterns, hub:NAME.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the frozen model and its certificate, written if certified.")
    ] = None,
    frozen: Annotated[
        Path | None, typer.Option(help="A frozen form of the model to certify, rather than make one.")
    ] = None,
    passages: Annotated[int, typer.Option(help="Passages to compare on.")] = 32,
    calibration: Annotated[int, typer.Option(help="Further passages, that G_LM is frozen from.")] = 4,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a passage; 512, or the context if that is less.")
    ] = None,
    loss: Annotated[float, typer.Option(help="Bound on the difference of mean loss, nats a token.")] = 1e-5,
    agreement: Annotated[float, typer.Option(help="Least fraction of the same greedy tokens.")] = 0.999,
    text_column: Annotated[str, typer.Option(help="Of JSON lines, Parquet files and hub data sets.")] = "text",
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    device: Annotated[str, typer.Option(help="Where to run, for example cpu or cuda.")] = "cpu",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure whether G_LM may be cached or frozen. Exit code 0: certified, 1: not certified, 2: error."""
    with _errors_exit(2):
        from pldr.files import check_output

        if output is not None:
            check_output(output, overwrite=overwrite)
        if frozen is not None and output is not None:
            raise ValueError(
                "--frozen and --output: the certificate goes into the folder given by --frozen; choose one"
            )
        certificate, constant, text_tokenizer = _certify(
            model, data, frozen, passages, calibration, length, loss, agreement, text_column, tokenizer, rope, device
        )
        certified = certificate["report"]["certified"]
        if certified and output is not None:
            _write_certified(output, constant, certificate, text_tokenizer, overwrite)
        elif certified and frozen is not None:
            from pldr.checkpoints.certificate import write_certificate

            write_certificate(frozen, certificate)
        if as_json:
            _print_json(certificate)
        else:
            from pldr.tables import certificate_view, show

            show(certificate_view(certificate))
    raise typer.Exit(0 if certified else 1)


def _certify(
    model: Path, data: list[str], frozen: Path | None, passages: int, calibration: int, length: int | None, loss: float,
    agreement: float, text_column: str, tokenizer: Path | None, rope: str | None, device: str,
) -> tuple[dict[str, Any], Any, Any]:  # fmt: skip
    """The certificate, the frozen model and the tokenizer."""
    if passages < 2 or calibration < 1:
        raise ValueError("--passages must be at least 2 and --calibration at least 1")
    if not loss > 0 or not 0 <= agreement <= 1:
        raise ValueError("--loss must be positive and --agreement between 0 and 1")
    import hashlib

    import torch
    from rich.console import Console
    from rich.progress import track

    from pldr.checkpoints.certificate import weights_digest
    from pldr.checkpoints.load import load_model
    from pldr.data.rows import read_passages
    from pldr.data.sources import Source
    from pldr.study.certify import Thresholds, certify, make_certificate

    loaded, text_tokenizer = _load(model, tokenizer, device=device, rope=rope)
    weights = weights_digest(loaded.state_dict())  # as they are stored; measured in float32
    loaded = loaded.float()
    context = loaded.config.max_position_embeddings
    length = min(512, context) if length is None else length
    if not 4 <= length <= context:
        raise ValueError(f"--length must be between 4 and the context of {context}, got {length}")
    wanted = passages + calibration
    # Spread over the beginning of the data, rather than one stretch of one document.
    found = read_passages(Source(data, text_column), text_tokenizer, length, 8 * wanted)
    if len(found) < wanted:
        raise ValueError(
            f"data: {len(found)} passages of {length} tokens, {passages} + {calibration} are asked for; give more text, or "
            "lower --passages, --calibration or --length"
        )
    rows = found[torch.linspace(0, len(found) - 1, wanted).long()]
    rows = rows[torch.randperm(wanted, generator=torch.Generator().manual_seed(0))]
    constant = frozen_weights = None
    if frozen is not None:
        constant = load_model(frozen, device=device)
        frozen_weights = weights_digest(constant.state_dict())
        if constant.config.vocab_size != loaded.config.vocab_size:
            raise ValueError(f"{frozen}: has another vocabulary than {model}; it is not its frozen form")
        constant = constant.float()
    report, constant = certify(
        loaded, rows[calibration:].to(device), rows[:calibration].to(device), frozen=constant,
        thresholds=Thresholds(loss, agreement),
        track=lambda items: track(items, "certifying", console=Console(stderr=True), transient=True),
    )  # fmt: skip
    about = {
        "sources": data, "passages": passages, "calibration_passages": calibration, "length": length,
        "sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
    }  # fmt: skip
    certificate = make_certificate(
        report, model=model.resolve().name, weights=weights, device=device, data=about,
        frozen_weights=frozen_weights or weights_digest(constant.state_dict()),
    )  # fmt: skip
    return certificate, constant, text_tokenizer


def _write_certified(output: Path, model: Any, certificate: dict[str, Any], tokenizer: Any, overwrite: bool) -> None:
    from pldr.checkpoints.certificate import write_certificate
    from pldr.files import whole_folder

    with whole_folder(output, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_certificate(folder, certificate)


@app.command()
def reproduce(
    claim: Annotated[str, typer.Argument(help="caching, invariance, ablation, transfer, handoff, or all.")],
    size: Annotated[str, typer.Option(help="tiny (minutes on a CPU), small (minutes on a GPU) or paper.")] = "tiny",
    output: Annotated[Path, typer.Option(help="Folder for pages, pictures, numbers and trained runs.")] = Path(
        "reproduced"
    ),
    train_data: Annotated[list[str] | None, typer.Option("--train", help="Training text; may be repeated.")] = None,
    validation: Annotated[list[str] | None, typer.Option(help="Held-out text; may be repeated.")] = None,
    tokenizer: Tokenizer = None,
    model: Annotated[
        Path | None, typer.Option(help="Model for caching and transfer, in place of the one here.")
    ] = None,
    parallel: Annotated[int, typer.Option(help="Runs at once.")] = 1,
    device: Annotated[str, typer.Option(help="Where models are measured.")] = "cpu",
) -> None:
    """Reproduce a claim of the paper: train what it needs, measure, write tables and pictures. Finished runs are kept."""
    _quiet()
    _require("train", "accelerate", "matplotlib")
    from pldr.models.shipped import STORIES
    from pldr.study.claims import CLAIMS, OF_A_MODEL, reproduce
    from pldr.study.lab import SIZES, Lab, default_data

    if size not in SIZES:
        raise ValueError(f"--size: must be one of {', '.join(SIZES)}, got {size!r}")
    if claim not in (*CLAIMS, "all"):
        raise ValueError(f"reproduce: no claim {claim!r}; choose one of {', '.join(CLAIMS)}, all")
    if (train_data is None) != (validation is None):
        raise ValueError("--train and --validation: give both or neither")
    if parallel < 1:
        raise ValueError("--parallel: must be at least 1")
    for name in CLAIMS if claim == "all" else [claim]:
        data = default_data(size, held_out=name in OF_A_MODEL and model is None)
        if train_data is not None:
            data = {"train": train_data, "validation": validation, "tokenizer": data["tokenizer"]}
        if tokenizer is not None:
            data["tokenizer"] = str(tokenizer)
        lab = Lab(SIZES[size], output / name, output / "runs", dict(data), parallel, model or STORIES, device,
                  say=_report, command=f"pldr {' '.join(sys.argv[1:])}")  # fmt: skip
        typer.echo(reproduce(name, lab))


@app.command("eval")
def evaluate(
    model: Model,
    files: Annotated[list[Path] | None, typer.Argument(help="Text files, with --perplexity.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", help="Tasks of lm-evaluation-harness, comma-separated; may be repeated."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="paper: the eight benchmarks of the paper, and their average.")
    ] = None,
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Measure perplexity on the files.")] = False,
    operator: Annotated[str, typer.Option(help="Where G_LM comes from: frozen, cached or learned.")] = "frozen",
    compare: Annotated[bool, typer.Option("--compare", help="Run all three, and compare every answer.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the benchmarks' published files, in place of the hub.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Questions of each task; below 1, their share.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    batch_size: Annotated[str, typer.Option(help="Sequences of a batch, or auto.")] = "auto",
    window: Annotated[
        int | None, typer.Option(help="Tokens of the perplexity's window; the context by default.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens by which it moves; half the window by default.")] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help="Text that G_LM is frozen from; else what comes with the package.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Of that text, if it has columns.")] = "text",
    threshold: Annotated[float, typer.Option(help="Nats by which modes may differ without a warning.")] = 0.01,
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    g_lm: OperatorFile = None,
    device: Annotated[str, typer.Option(help="Where to run, for example cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: as it is stored.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Benchmarks and perplexity of a model, with G_LM frozen, cached or computed anew."""
    from pldr.evaluation.published import SUITES

    names = [name.strip() for part in tasks or [] for name in part.split(",") if name.strip()]
    if suite is not None and suite not in SUITES:
        raise ValueError(f"--suite: must be one of {', '.join(SUITES)}, got {suite!r}")
    names += [name for name in SUITES[suite] if name not in names] if suite is not None else []
    if bool(files) != perplexity:
        raise ValueError("--perplexity: needs text files, and they need it: pldr eval MODEL --perplexity FILE ...")
    if not names and not files:
        raise ValueError("eval: name --tasks, a --suite, or text files for --perplexity")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"--num-fewshot: must be 0 or more, got {num_fewshot}")
    if data_dir is not None and not data_dir.is_dir():
        raise ValueError(f"--data-dir: {data_dir} is not a folder")
    from pldr.files import read_text

    texts = {str(file): read_text(file) for file in files or []}
    _quiet()
    if names:
        _require("eval", "lm_eval")
        from pldr.evaluation.harness import check_limit, load_tasks, suite_report
        from pldr.evaluation.harness import evaluate as run

        check_limit(limit)
    loaded, text_tokenizer = _load(model, tokenizer, device=device, dtype=dtype, rope=rope, g_lm=g_lm)
    from pldr.evaluation.modes import MODES
    from pldr.evaluation.perplexity import check_window, evaluate_texts
    from pldr.evaluation.scoring import make_scorers, mode_disagreement, read_calibration
    from pldr.tables import evaluation_view, show

    is_learned, context = loaded.config.operator == "learned", loaded.config.max_position_embeddings
    check_window(context, window, stride)
    if operator not in MODES:
        raise ValueError(f"--operator: must be one of {', '.join(MODES)}, got {operator!r}")
    if not is_learned and (compare or operator != "frozen"):
        raise ValueError("eval: this model's operator is constant, so that frozen is its only mode")
    if not is_learned and calibration:
        raise ValueError("--calibration: this model's operator is constant already")
    if names:
        found = load_tasks(names, data_dir=data_dir, num_fewshot=num_fewshot)
    passages = read_calibration(text_tokenizer, context, calibration, text_column) if is_learned else None
    scorers = make_scorers(loaded, passages, batch_size=batch_size)
    chosen = scorers if compare else {operator: scorers[operator]}
    report: dict[str, Any] = {
        "model": str(model), "operator": loaded.config.operator, "modes": list(chosen), "device": device, "dtype": dtype,
        "calibration": (calibration or "comes with the package") if is_learned else None, "tasks": {}, "disagreement": 0.0,
    }  # fmt: skip
    if passages is not None:  # in float32, where what differs is the operator and not the rounding
        report["disagreement"] = mode_disagreement(
            scorers if dtype == "float32" else make_scorers(copy.deepcopy(loaded).float(), passages), passages
        )
    if texts:
        report["texts"] = evaluate_texts(chosen, text_tokenizer, texts, length=window, stride=stride)
    if names:
        report |= run(chosen, text_tokenizer, found, limit=limit)
        if suite is not None:
            report["suite"] = suite_report(report, suite)
    report["truncated"] = max(scorer.truncated for scorer in chosen.values())
    for warning in _evaluation_warnings(report, threshold):
        _report(f"warning: {warning}")
    if as_json:
        _print_json(report)
    else:
        show(evaluation_view(report))


def _evaluation_warnings(report: dict[str, Any], threshold: float) -> Iterator[str]:
    if report["disagreement"] > threshold:
        yield (
            f"G_LM depends on the text: where it comes from moves a log-likelihood of 32 tokens by "
            f"{report['disagreement']:.2g} nats, more than {threshold:g}; a learned G_LM sees the tokens it scores, so that "
            "only frozen scores compare with other models'; see pldr certify"
        )
    largest = max((value for task in report["tasks"].values() for value in task["largest"].values()), default=0.0)
    if largest > threshold:
        rounding = "" if report["dtype"] == "float32" else f"; in {report['dtype']} much of that is rounding"
        yield f"the modes' log-likelihoods of an answer differ by up to {largest:.2g} nats, more than {threshold:g}{rounding}"
    if report["truncated"]:
        yield f"{report['truncated']} contexts were longer than the model's and lost their beginning"
    for name, found in report.get("texts", {}).items():
        if not all(value["is_lossless"] for value in found.values()):
            yield (
                f"{name}: the tokenizer drops part of the text (ends of lines, repeated spaces), which is counted in bits a "
                "byte and word perplexity all the same"
            )


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="Output folder of pldr train.")],
    output: Annotated[Path | None, typer.Option(help="PNG file; curves.png in the folder by default.")] = None,
) -> None:
    """Draw the curves of a training run."""
    _require("train", "matplotlib")
    from pldr.plots import plot_run

    target = output or run / "curves.png"
    plot_run(run, target)
    typer.echo(target)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, the picture and the table.")] = Path(
        "demo-output"
    ),
    train: Annotated[bool, typer.Option("--train", help="Also train a small model here, and compare it too.")] = False,
    recipe: Annotated[str, typer.Option(help="What --train trains.")] = "demo-cpu",
    as_json: AsJson = False,
) -> None:
    """Cache and freeze the operator of the model that comes along, and compare; with --train, of a new one too."""
    _quiet()
    _require("train", "accelerate", "matplotlib")
    from pldr.study.demo import run_demo
    from pldr.tables import demo_view, show

    result = run_demo(output, recipe if train else None)
    if as_json:
        _print_json(result)
    else:
        show(demo_view(result))


def main() -> NoReturn:
    """Run the command line; a mistake is one line on standard error and a non-zero exit code, not a traceback.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. PLDR_TRACEBACK=1 shows the traceback of a failure.
    """
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _report("interrupted")
        sys.exit(130)
    except typer.TyperException as error:  # wrong usage; an empty message has printed the help by itself
        if message := error.format_message():
            _report(f"{message} See: pldr --help" if not message.startswith("Usage") else message)
        sys.exit(error.exit_code)
    except TrainingInterrupted as error:
        _report(str(error))
        sys.exit(128 + error.signal)
    except Exception as error:
        if os.environ.get("PLDR_TRACEBACK"):
            raise
        _report(_described(error))
        sys.exit(1)
    if code == 130:  # typer has made an exit of the interruption
        _report("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _errors_exit(code: int) -> Iterator[None]:
    """Errors are one line and this exit code, for commands whose code 1 means something else."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if os.environ.get("PLDR_TRACEBACK"):
            raise
        _report(_described(error))
        raise typer.Exit(code) from None


def _report(message: str) -> None:
    print("pldr:", " ".join(message.split()), file=sys.stderr)  # noqa: T201


def _described(error: Exception) -> str:
    kind = "" if isinstance(error, _EXPECTED) else f"unexpected {type(error).__name__} (PLDR_TRACEBACK=1 shows where): "
    return kind + _message(error)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _load(
    model: Path,
    tokenizer: Path | None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    rope: str | None = None,
    g_lm: Path | None = None,
    needs_tokenizer: bool = True,
) -> tuple[Any, Any]:
    _quiet()
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype: must be auto, float32 or bfloat16, got {dtype!r}")
    import torch

    from pldr.checkpoints.load import load_model
    from pldr.tokenizer import check_vocabulary, load_tokenizer

    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device: {device} can not be used here ({' '.join(str(error).split())[:120]})") from None
    loaded = load_model(model, dtype=dtype, device=device, rope_pairing=rope, G_LM=g_lm)
    try:
        text_tokenizer = load_tokenizer(tokenizer or (model if model.is_dir() else model.parent))
    except FileNotFoundError:
        if needs_tokenizer or tokenizer is not None:
            raise
        return loaded, None
    check_vocabulary(text_tokenizer, loaded.config.vocab_size)
    return loaded, text_tokenizer


def _quiet() -> None:
    """Keep the libraries' own bars and notes out of the output; errors stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _require(extra: str, *packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"needs {', '.join(missing)}: pip install 'pldr[{extra}]'")


def _print_json(fields: dict[str, Any]) -> None:
    from pldr.files import to_json

    typer.echo(to_json(fields))
