"""The `pldr` command: a verb parses, calls one public function, and prints. Heavy imports happen inside the verbs."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer import Argument, Option

from pldr.files import one_line, printable, read_text, require, to_json
from pldr.training import TrainingInterrupted

if TYPE_CHECKING:
    from pldr.tables import Printable

_EXPECTED = (ValueError, OSError, FloatingPointError, ModuleNotFoundError)

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_HELP,
    help="Train, run and study PLDR-LLMs.",
)
tokenizer_app = typer.Typer(no_args_is_help=True, context_settings=_HELP, help="Tokenizers.")
app.add_typer(tokenizer_app, name="tokenizer")

Model = Annotated[
    Path, Argument(help="Model folder (this library's, hub or reference layout), .pth file, or OWNER/NAME.")
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an output folder that is not empty.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object on standard output.")]
Tokenizer = Annotated[Path | None, Option(help="Tokenizer folder or SentencePiece file, if not beside the model.")]
Rope = Annotated[
    Literal["adjacent", "halves"] | None, Option(help="RoPE of a reference checkpoint: v51's (default) or v52's.")
]
OperatorFile = Annotated[
    Path | None, Option(help="File with a predefined G_LM (.safetensors, or a pickle of tensors).")
]
TextColumn = Annotated[str, Option(help="Of JSON lines, Parquet files and hub data sets.")]
Length = Annotated[int | None, Option(help="Tokens of a passage; 512, or the context if that is less.")]
Device = Annotated[str | None, Option(help="Where to run, cpu (default) or for example cuda.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], Option(help="Of the weights; auto: as they are stored.")]
Quantize = Annotated[Literal["int8"] | None, Option(help="Weights of 8 bits, on a CPU.")]
Strict = Annotated[bool, Option("--strict", help="Refuse bad rows of the data, rather than skip them.")]


def _verb(example: str, name: str | None = None, group: typer.Typer = app) -> Callable[[Any], Any]:
    """A command whose help ends with an example."""
    shown = example.replace("[", r"\[")  # no markup
    return group.command(name, epilog=f"Example: [bold]pldr {shown}[/bold]")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from pldr import __version__

        typer.echo(f"pldr {__version__}")
        raise typer.Exit


@_verb('generate "Once upon a time there was" --stream --temperature 0.8')
def generate(
    model: Annotated[str, Argument(help="Model folder or .pth file; or, alone, the text to continue with our own.")],
    prompt: Annotated[str | None, Argument(help="Text to continue; - reads it from standard input.")] = None,
    prompts_file: Annotated[
        Path | None, Option(help="Texts to continue, one a line; prints one JSON object a line.")
    ] = None,
    max_new_tokens: Annotated[int | None, Option(help="Most tokens to add; 64 by default.")] = None,
    cache: Annotated[
        Literal["kv+g", "kv", "g", "none"] | None, Option(help="A published cache mode; the engine by default.")
    ] = None,
    temperature: Annotated[float | None, Option(help="Sampling temperature; greedy if none is set.")] = None,
    top_k: Annotated[int | None, Option(help="Sample among the k most probable tokens; 0 means all.")] = None,
    top_p: Annotated[float | None, Option(help="Sample among tokens of this total probability.")] = None,
    repetition_penalty: Annotated[float, Option(help="Above 1, tokens that were there get less probable.")] = 1.0,
    beams: Annotated[int, Option(help="Beam-search width.")] = 1,
    stop: Annotated[list[str] | None, Option(help="Text that ends the continuation; may be repeated.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the sampling.")] = None,
    stream: Annotated[bool, Option("--stream", help="Print the text as it is generated.")] = False,
    as_json: AsJson = False,
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    g_lm: OperatorFile = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Continue a text, with the model named or with the small story model that ships with pldr."""
    place, text = _model_and_prompt(model, prompt, prompts_file)
    if stream and (as_json or prompts_file is not None):
        raise ValueError("--stream, --json and --prompts-file: choose one")
    if prompts_file is not None and (cache is not None or beams > 1):
        raise ValueError("--prompts-file: is the engine's; leave --cache and --beams out")
    _quiet()
    from pldr.checkpoints.load import load_with_tokenizer
    from pldr.generation import generate_text, generate_texts

    loaded, text_tokenizer = load_with_tokenizer(place, tokenizer, device=device, dtype=dtype, rope=rope, g_lm=g_lm)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        "repetition_penalty": repetition_penalty, "stop": stop or (), "quantize": quantize,
    }  # fmt: skip
    if prompts_file is not None:
        prompts = read_text(prompts_file).removesuffix("\n")
        for line in generate_texts(loaded, text_tokenizer, prompts.split("\n") if prompts else [], **settings):
            typer.echo(to_json(line))
        return
    show = (lambda piece: typer.echo(piece, nl=False)) if stream else None
    result = generate_text(loaded, text_tokenizer, text, cache=cache, beams=beams, on_text=show, **settings)
    used = {"prompt": text, "cache": cache or ("kv+g" if beams > 1 else "engine"), "operator": loaded.config.operator}
    facts = used | vars(result) | {"tokens_per_second": result.tokens_per_second}
    typer.echo(to_json(facts) if as_json else "" if stream else result.text)


def _model_and_prompt(model: str, prompt: str | None, prompts_file: Path | None) -> tuple[Path, str]:
    """Raises ValueError: one argument, and it is no text; or a prompt beside a file of them."""
    from pldr.models.shipped import STORIES

    if prompts_file is not None:
        if prompt is not None:
            raise ValueError("--prompts-file: holds the prompts; leave the other one out")
        return Path(model), ""
    if prompt is None:
        if os.path.exists(model):  # also of a text too long for a file name
            raise ValueError(f"generate: {model} is a model or a file; say what text it should continue")
        model, prompt = str(STORIES), model
    return Path(model), sys.stdin.read() if prompt == "-" else prompt


@_verb("train laptop 'data.train=[my-book.txt]'")
def train(
    recipe: Annotated[str, Argument(help="Recipe file, or the name of one that ships with pldr.")],
    overrides: Annotated[list[str] | None, Argument(help="key=value pairs, e.g. optimization.steps=100.")] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint in the output.")] = False,
    resume_from: Annotated[
        Path | None, Option(help="Go on from this checkpoint; auto: from the newest, or begin if there is none.")
    ] = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from a recipe: in one process, or in each of torchrun or accelerate launch."""
    if sum((overwrite, resume, resume_from is not None)) > 1:
        raise ValueError("--overwrite, --resume and --resume-from: choose one")
    from pldr.recipe import load_recipe

    parsed = load_recipe(recipe, [*(overrides or ()), *(["data.strict=true"] if strict else ())])
    require("train", "accelerate")
    _quiet()
    from pldr.training.run import train as run

    _print(run(parsed, overwrite=overwrite, resume=str(resume_from) if resume_from else resume), as_json)


@_verb("tokenizer train my-book.txt --output my-tokenizer --vocab-size 2000", "train", tokenizer_app)
def train_tokenizer(
    sources: Annotated[list[str], Argument(help="Text, .jsonl and .parquet files or patterns, hub:NAME.")],
    output: Annotated[Path, Option(help="Folder to write.")],
    vocab_size: Annotated[int, Option(help="Number of pieces.")] = 32000,
    model: Annotated[Literal["unigram", "bpe"], Option(help="unigram, as published, or bpe.")] = "unigram",
    text_column: TextColumn = "text",
    split: Annotated[str, Option(help="Of hub data sets.")] = "train",
    interval: Annotated[str, Option(help="Which documents: start:stop, by index or percent.")] = "",
    strict: Strict = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a SentencePiece model and save it as a transformers fast tokenizer too."""
    result = _show("train_tokenizer", locals())
    if result.skipped:
        _report(f"data: {result.skipped}")


@_verb("merge runs/big/checkpoint-1000 runs/big-merged")
def merge(
    checkpoint: Annotated[Path, Argument(help="Checkpoint folder of a training run, sharded or not.")],
    destination: Annotated[Path, Argument(help="Model folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Make a model folder of a training checkpoint."""
    require("train", "accelerate")
    written = _call("merge_checkpoint", locals())
    typer.echo(f"{destination}: {written.num_parameters():,} parameters, {written.config.operator} operator")


@_verb("convert runs/laptop runs/hub --to hub")
def convert(
    source: Model,
    destination: Annotated[Path, Argument(help="Folder to write.")],
    to: Annotated[Literal["pldr", "hub", "reference"], Option(help="Layout to write.")] = "pldr",
    with_code: Annotated[
        bool,
        Option("--with-code", help="Of the hub layout: the model's code too, for people who have transformers alone."),
    ] = False,
    rope: Rope = None,
    g_lm: OperatorFile = None,
    tokenizer: Tokenizer = None,
    overwrite: Overwrite = False,
) -> None:
    """Rewrite a checkpoint in another layout, bit for bit."""
    written = _call("convert_checkpoint", locals())
    typer.echo(
        f"{destination}: {written.num_parameters():,} parameters, {written.config.operator} operator, {to} layout"
    )


@_verb('freeze runs/laptop runs/constant --prompt "Any text will do."')
def freeze(
    model: Model,
    destination: Annotated[Path, Argument(help="Folder to write.")],
    prompts: Annotated[list[str] | None, Option("--prompt", help="Text to compute G_LM from; may be repeated.")] = None,
    prompts_file: Annotated[Path | None, Option(help="File of such texts, one per line.")] = None,
    g_lm: OperatorFile = None,
    trainable: Annotated[bool, Option("--trainable", help="Make G_LM a parameter, to train on with.")] = False,
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make the operator a constant, from prompts or from a file, and drop the network that computed it."""
    _show("freeze_checkpoint", locals())


@_verb("compress runs/laptop runs/compressed --tolerance 1e-3")
def compress(
    model: Model,
    destination: Annotated[Path, Argument(help="Folder to write.")],
    tolerance: Annotated[float, Option(help="Bound on the loss difference (95%), nats per token.")] = 1e-4,
    agreement: Annotated[float, Option(help="Least fraction of the same greedy tokens.")] = 0.999,
    rank: Annotated[int | None, Option(help="Of every layer, in place of those that the bounds allow.")] = None,
    weighting: Annotated[
        Literal["moments", "none"], Option(help="moments: best for the scores of text; none: for G_LM itself.")
    ] = "moments",
    calibration: Annotated[
        list[str] | None, Option(help="Text to compress for and to prove it on; else excerpts that ship with pldr.")
    ] = None,
    passages: Annotated[int, Option(help="Held-out passages to prove it on.")] = 16,
    length: Length = None,
    text_column: TextColumn = "text",
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Factor the operator, so that keys are cached in fewer dimensions, within a bound on the loss."""
    _show("compress", locals())


@_verb("quantize runs/laptop runs/int8 --to int8")
def quantize(
    model: Model,
    destination: Annotated[Path, Argument(help="Folder to write.")],
    to: Annotated[Literal["int8", "int4", "fp8"], Option(help="Kind of the weights.")] = "int8",
    operator: Annotated[bool, Option("--operator", help="Quantise the metric learner, too.")] = False,
    loss: Annotated[float, Option(help="Bound on the loss difference (95%), nats per token, of the verdict.")] = 0.01,
    agreement: Annotated[float, Option(help="Least fraction of the same greedy tokens, of the verdict.")] = 0.98,
    data: Annotated[list[str] | None, Option(help="Held-out text; else excerpts that ship with pldr.")] = None,
    passages: Annotated[int, Option(help="Passages to compare on.")] = 16,
    length: Length = None,
    text_column: TextColumn = "text",
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model with weights of 8 or 4 bits on disk, with a certificate of what that changes."""
    _show("quantize", locals())


@_verb("export demo-output/stories-frozen runs/onnx")
def export(
    model: Model,
    destination: Annotated[Path, Argument(help="Folder to write.")],
    to: Annotated[
        Literal["onnx", "torch"], Option(help="For ONNX Runtime and others, or for torch.export.load.")
    ] = "onnx",
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    g_lm: OperatorFile = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a frozen or factored model, with its KV-cache, as a graph for other runtimes."""
    _show("export", locals())


@_verb("info demo-output/stories-frozen")
def info(model: Model, rope: Rope = None, g_lm: OperatorFile = None, as_json: AsJson = False) -> None:
    """Show a model's shape, parameters, operators and cache sizes."""
    _show("info", locals())


@_verb("inspect runs/laptop my-other-book.txt --html report.html")
def inspect(
    model: Annotated[Path, Argument(help="Model folder or .pth file, or a G_LM (.safetensors, .pkl).")],
    data: Annotated[
        list[str] | None, Argument(help="Text files or patterns, hub:NAME; else excerpts that ship with pldr.")
    ] = None,
    passages: Annotated[int | None, Option(help="Passages to look at; 32, or as many as there are.")] = None,
    length: Length = None,
    text_column: TextColumn = "text",
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    g_lm: OperatorFile = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, Option(help="Also write a report with pictures, one HTML file.")] = None,
    order_parameter: Annotated[
        bool, Option("--order-parameter", help="Also compare the outputs of two random continuations.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Statistics of A, A_LM, A_P and G_LM: rank, determinant, singular values, whether they depend on the text."""
    _show("inspect", locals())
    if html is not None and not as_json:
        typer.echo(f"report: {html}")


@_verb("certify runs/laptop my-other-book.txt --output runs/certified")
def certify(
    model: Model,
    data: Annotated[list[str], Argument(help="Held-out text: .txt, .jsonl, .parquet files, patterns, hub:NAME.")],
    output: Annotated[Path | None, Option(help="Folder for frozen model and certificate, if certified.")] = None,
    frozen: Annotated[Path | None, Option(help="A frozen or factored form to certify, rather than make one.")] = None,
    passages: Annotated[int, Option(help="Passages to compare on.")] = 32,
    calibration: Annotated[int, Option(help="Further passages, that G_LM is frozen from.")] = 4,
    length: Length = None,
    loss: Annotated[
        float | None, Option(help="Bound on the difference of mean loss, nats per token; 1e-5, factored 1e-4.")
    ] = None,
    agreement: Annotated[float, Option(help="Least fraction of the same greedy tokens.")] = 0.999,
    text_column: TextColumn = "text",
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure whether G_LM may be cached, frozen or factored. Exit code 0: certified, 1: not certified, 2: error."""
    certificate = _show("certify", locals())
    raise typer.Exit(0 if certificate.certified else 1)


@_verb("reproduce caching")
def reproduce(
    claim: Annotated[
        Literal["caching", "fidelity", "sdpa", "invariance", "ablation", "transfer", "handoff", "all"],
        Argument(help="What to look at."),
    ],
    size: Annotated[
        Literal["tiny", "small", "paper"], Option(help="tiny: minutes on a CPU; small: minutes on a GPU.")
    ] = "tiny",
    output: Annotated[Path, Option(help="Folder for pages, pictures, numbers and trained runs.")] = Path("reproduced"),
    train: Annotated[list[str] | None, Option("--train", help="Training text; may be repeated.")] = None,
    validation: Annotated[list[str] | None, Option(help="Held-out text; may be repeated.")] = None,
    tokenizer: Tokenizer = None,
    model: Annotated[
        Path | None, Option(help="Of caching, fidelity, sdpa and transfer; else the one that ships with pldr.")
    ] = None,
    parallel: Annotated[int, Option(help="Runs at once.")] = 1,
    device: Annotated[str, Option(help="Where models are measured.")] = "cpu",
) -> None:
    """Reproduce a claim of the paper: train what it needs, measure, write tables and pictures. Finished runs are kept."""
    command = f"pldr {' '.join(sys.argv[1:])}"
    for finding in _call("reproduce", locals() | {"say": _report}):
        typer.echo(finding.page)


@_verb("eval runs/laptop --tasks piqa --compare", "eval")
def evaluate(
    model: Model,
    files: Annotated[list[Path] | None, Argument(help="Text files, with --perplexity.")] = None,
    tasks: Annotated[list[str] | None, Option(help="Tasks of lm-evaluation-harness, comma-separated.")] = None,
    suite: Annotated[Literal["paper"] | None, Option(help="The paper's eight benchmarks, and their average.")] = None,
    perplexity: Annotated[bool, Option("--perplexity", help="Measure perplexity on the files.")] = False,
    mode: Annotated[
        Literal["frozen", "cached", "learned", "sequential"], Option(help="Where G_LM comes from.")
    ] = "frozen",
    compare: Annotated[bool, Option("--compare", help="Run all three, and compare every answer.")] = False,
    data_dir: Annotated[Path | None, Option(help="Benchmarks' published files, in place of the hub.")] = None,
    limit: Annotated[float | None, Option(help="Questions of each task; below 1, their share.")] = None,
    num_fewshot: Annotated[int | None, Option(help="Examples before each question.")] = None,
    allow_code: Annotated[bool, Option("--allow-code", help="Take YAML task files, which can run code.")] = False,
    batch_size: Annotated[str, Option(help="Sequences of a batch, or auto.")] = "auto",
    window: Annotated[int | None, Option(help="Tokens of the perplexity's window; else the context.")] = None,
    stride: Annotated[int | None, Option(help="Tokens by which it moves; else half of it.")] = None,
    calibration: Annotated[
        list[str] | None, Option(help="Text to freeze G_LM from; else excerpts that ship with pldr.")
    ] = None,
    text_column: Annotated[str, Option(help="Of that text, if it has columns.")] = "text",
    threshold: Annotated[float, Option(help="Nats by which modes may differ without a warning.")] = 0.01,
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    g_lm: OperatorFile = None,
    device: Device = None,
    dtype: Dtype = "float32",
    output: Annotated[Path | None, Option(help="Folder for every answer; what was stopped goes on there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Benchmarks and perplexity of a model, with G_LM frozen, cached or learned from every text."""
    if bool(files) != perplexity:
        raise ValueError("--perplexity: needs text files, and they need it: pldr eval MODEL --perplexity FILE ...")
    del perplexity  # the files say it
    evaluation = _show("evaluate", locals())
    for warning in evaluation.warnings if as_json and _is_first() else ():  # else they are printed
        _report(f"warning: {warning}")


@_verb("serve runs/certified --api-key SECRET")
def serve(
    model: Annotated[Path | None, Argument(help="Model folder or .pth file; our own story model by default.")] = None,
    vllm_arguments: Annotated[list[str] | None, Argument(help="Of vllm serve, behind --.")] = None,
    host: Annotated[str, Option(help="Where to listen; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0 takes a free one.")] = 8000,
    backend: Annotated[
        Literal["auto", "engine", "vllm"], Option(help="Our own engine, or vLLM; auto: vLLM where it is installed.")
    ] = "auto",
    api_key: Annotated[str | None, Option(help="That clients must show; PLDR_API_KEY by default.")] = None,
    served_name: Annotated[str | None, Option(help="As clients call the model; its folder's name by default.")] = None,
    require_certificate: Annotated[
        bool, Option("--require-certificate", help="Refuse a model without one, rather than warn.")
    ] = False,
    allow_origin: Annotated[list[str] | None, Option(help="Web pages that may use it; may be repeated.")] = None,
    max_batch: Annotated[int | None, Option(help="Texts at once; 32 on a CPU, 128 on a GPU.")] = None,
    max_length: Annotated[int | None, Option(help="Tokens of a prompt with its text; else the context.")] = None,
    max_queue: Annotated[int, Option(help="Texts that may wait; others are sent away.")] = 256,
    max_tokens: Annotated[int | None, Option(help="New tokens of a text, at most.")] = None,
    max_body: Annotated[int, Option(help="Bytes of a request.")] = 1 << 20,
    request_timeout: Annotated[float, Option(help="Seconds that a request may take.")] = 300.0,
    shutdown_timeout: Annotated[float, Option(help="Seconds that it may still take after SIGTERM.")] = 30.0,
    log_prompts: Annotated[bool, Option("--log-prompts", help="Write prompts and texts into the log, too.")] = False,
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    g_lm: OperatorFile = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Serve a model over HTTP as OpenAI's interface has it: with vLLM where it is installed, else with our own engine."""
    _call("serve", locals())


@_verb("studio runs/laptop --run runs/laptop")
def studio(
    model: Annotated[Path | None, Argument(help="Model folder or .pth file; our own story model by default.")] = None,
    run: Annotated[list[Path] | None, Option(help="Output folder of pldr train to show; may be repeated.")] = None,
    host: Annotated[str, Option(help="Where to listen; there is no password.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0 takes a free one.")] = 8600,
    allow_host: Annotated[list[str] | None, Option(help="Further name of the server; may be repeated.")] = None,
    allow_frame: Annotated[list[str] | None, Option(help="Origin of pages that may frame it; may be repeated.")] = None,
    open_browser: Annotated[bool, Option("--open-browser/--no-browser", help="Open the page.")] = True,
    tokenizer: Tokenizer = None,
    rope: Rope = None,
    g_lm: OperatorFile = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """See the operator at work in a browser: write, switch operators, certify."""
    try:
        _call("run_studio", locals())
    except KeyboardInterrupt:
        _report("interrupted")
        os._exit(130)  # a thread may be at work in torch, in which the interpreter's own end would abort


@_verb("plot runs/laptop")
def plot(
    run: Annotated[Path, Argument(help="Output folder of pldr train.")],
    output: Annotated[Path | None, Option(help="PNG file; curves.png in the folder by default.")] = None,
) -> None:
    """Draw the curves of a training run."""
    from pldr.plots import plot_run

    typer.echo(plot_run(run, output))


@_verb("demo")
def demo(
    output: Annotated[Path, Option(help="Folder for the model, the picture and the table.")] = Path("demo-output"),
    train: Annotated[bool, Option("--train", help="Also train a small model, and compare that too.")] = False,
    recipe: Annotated[str | None, Option(help="What --train trains; demo-cpu by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Cache and freeze the operator of the model that ships with pldr, and compare; with --train, of a new one too."""
    require("train", "accelerate", "matplotlib")
    _show("run_demo", locals())


# --- running and printing -------------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Run the command line; a mistake is one line on standard error and a non-zero exit code, not a traceback.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. PLDR_TRACEBACK=1 shows the traceback of a failure.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(prog_name="pldr", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _report("interrupted")
        sys.exit(130)
    except typer.TyperException as error:  # wrong usage; an empty message has printed the help by itself
        if message := error.format_message():
            _report(f"{message} See: pldr --help" if not message.startswith("Usage") else message)
        sys.exit(error.exit_code)
    except TrainingInterrupted as error:
        with contextlib.suppress(OSError):  # at SIGHUP the terminal is gone
            _report(str(error))
        sys.exit(128 + error.signal)
    except Exception as error:
        if os.environ.get("PLDR_TRACEBACK"):
            raise
        _report(_as_typed(_described(error)))
        sys.exit(2 if sys.argv[1:2] == ["certify"] else 1)  # whose code 1 is a verdict
    if code == 130:  # typer has made an exit of the interruption
        _report("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _report(message: str) -> None:
    print("pldr:", printable(" ".join(message.split())), file=sys.stderr)  # noqa: T201


def _described(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    kind = "" if isinstance(error, _EXPECTED) else f"unexpected {type(error).__name__} (PLDR_TRACEBACK=1 shows where): "
    return kind + one_line(error, limit=2000)


def _as_typed(message: str) -> str:
    """What the library says of its parameters, of the verb's options: "--max-new-tokens: must be …"."""
    command: Any = typer.main.get_command(app)
    for word in sys.argv[1:3]:
        command = getattr(command, "commands", {}).get(word, command)
    opts = (opt for parameter in command.params for opt in parameter.opts if opt.startswith("--"))
    options = {opt[2:].replace("-", "_"): opt for opt in opts}
    subject, colon, rest = message.partition(":")
    if colon and options.keys() >= set(subject.split(", ")):
        subject = ", ".join(options[name] for name in subject.split(", "))
    # A name of several words is no other word; what is part of a path stays.
    return subject + colon + re.sub(r"(?<![\w/.-])[a-z]+_[a-z_]+(?![\w/.-])", lambda m: options.get(m[0], m[0]), rest)


def _quiet() -> None:
    """Keep the libraries' own bars and notes out of the output; errors stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _call(function: str, options: dict[str, Any]) -> Any:
    """What a public function of `pldr` returns for a verb's options; those that were not given are left to its defaults."""
    _quiet()
    import pldr

    return getattr(pldr, function)(**{name: value for name, value in options.items() if value not in (None, [])})


def _show(function: str, options: dict[str, Any]) -> Any:
    """The same, and print it."""
    as_json = options.pop("as_json")
    result = _call(function, options)
    _print(result, as_json)
    return result


def _is_first() -> bool:
    """Whether this process is the first of torchrun's, or alone."""
    return os.environ.get("RANK", "0") == "0"


def _print(result: "Printable", as_json: bool) -> None:
    """A result of the library: as tables, or as one JSON object. Of several processes, one prints."""
    if not _is_first():
        return
    if as_json:
        typer.echo(to_json(result.to_json()))
        return
    from pldr.tables import show

    show(result)
