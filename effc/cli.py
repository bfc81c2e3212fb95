"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from effc.backends import TARGETS
from effc.errors import INTERRUPTED, EffcError, UsageError
from effc.progress import Progress, Step, silent
from effc.tasks import TASKS

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

app = typer.Typer(
    name="effc",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_state: dict[str, Any] = {"interrupted": False, "debug": False}


class Terminal(Progress):
    """Draws a bar with the time left for every stage, on stderr, and only where somebody looks."""

    def __init__(self, bar: Bar | None) -> None:
        super().__init__()
        self.bar = bar

    @contextmanager
    def draw(self, name: str) -> Iterator[Step]:
        with self._drawn(name) as step:
            yield step
        if _state["interrupted"]:  # and somebody's code took it for an error of its own
            raise _Interrupted

    @contextmanager
    def _drawn(self, name: str) -> Iterator[Step]:
        if self.bar is None:
            yield silent
            return
        task = self.bar.add_task(name, total=None)

        def step(done: int, total: int | None) -> None:
            assert self.bar is not None
            label = name if total is not None else f"{name} {done}"
            self.bar.update(task, completed=done, total=total, description=label)

        try:
            yield step
        finally:
            self.bar.remove_task(task)


@contextmanager
def terminal() -> Iterator[Terminal]:
    if not sys.stderr.isatty():
        yield Terminal(None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    # libraries that write past Python are kept from stderr, and the bar is not
    own = os.fdopen(os.dup(2), "w", encoding="utf-8")
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with own, Bar(*columns, console=Console(file=own), transient=True) as bar:
        yield Terminal(bar)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"effc {version('effc')}")
        raise typer.Exit


def _debug(value: bool) -> bool:
    _state["debug"] = _state["debug"] or value
    return value


def _verbose(value: bool) -> bool:
    if value:
        logging.getLogger("effc").setLevel(logging.INFO)
    return value


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_debug, is_eager=True, help="Show the whole traceback of an error."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=_verbose, is_eager=True, help="Say what each step did."
    ),
]


@app.callback()
def options(
    debug: Debug = False,
    verbose: Verbose = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say which effc."),
    ] = False,
) -> None:
    """Compile a trained PyTorch model into a smaller, faster engine, and prove what that cost.

    \b
    Example:
      effc compile MODEL_DIR -o OUT --quantize int8 --calib sentences.txt
      effc verify OUT --model MODEL_DIR
      effc bench OUT --model MODEL_DIR
    """

    _state["debug"] = debug
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("effc").setLevel(level)


DECISIONS = "give the decisions.json of an earlier output"
STDOUT = ("-", "/dev/stdout", "/dev/fd/1")


def _json_place(value: str | None) -> str | None:
    return _place("--json", value)


def _report_place(value: str | None) -> str | None:
    return _place("-o", value)


def _html_place(value: str | None) -> str | None:
    return _place("--html", value)


def _drawing_place(value: str | None) -> str | None:
    return _place("--svg", value)


def _place(option: str, value: str | None) -> str | None:
    """Refuse a place that cannot be written before the work, not after it; `-` stands for every name of stdout."""
    if value is None:
        return None
    if value in STDOUT:
        return "-"
    place = value if _is_stream(value) else Path(os.path.realpath(value)).parent
    if Path(value).is_dir() or not os.access(place, os.W_OK):
        raise UsageError(f"{option} {value} cannot be written", hint="name a file in a directory")
    return value


def _is_stream(place: str) -> bool:
    """A device, a pipe or an open file, which is written to and never replaced."""
    is_special = os.path.exists(place) and not os.path.isfile(place)
    return is_special or place.startswith(("/dev/fd/", "/dev/stderr", "/proc/"))


def _outside(json_: str | None, *packages: Path | str, option: str = "--json") -> None:
    """Refuse a place inside a package, which then would not be what its manifest says."""
    for package in packages:
        if json_ not in (None, "-") and Path(os.path.realpath(json_)).is_relative_to(
            os.path.realpath(package)
        ):
            is_picture = str(json_).lower().endswith(".png")
            ending = "png" if is_picture else "json" if option == "--json" else "html"
            raise UsageError(
                f"{option} {json_} lies in {package}, which holds only what its manifest lists",
                hint=f"name a place beside it, e.g. {option} {Path(package).name}.{ending}",
            )


def _size(value: str | None) -> str | None:
    """Refuse what is no size before the work."""
    _size_of(value)
    return value


def _size_of(value: str | None, example: str = "--max-ram 4GB") -> int | None:
    if value is None:
        return None
    from effc.sizes import parse_bytes

    try:
        return parse_bytes(value)
    except ValueError as error:
        raise UsageError(f"{example.split()[0]}: {error}", hint=example) from error


def _seconds(value: str | None) -> str | None:
    """Refuse what is no time before the work."""
    _seconds_of(value)
    return value


def _seconds_of(value: str | None) -> float | None:
    """`90`, `90s`, `20m` or `2h` in seconds. Raises UsageError for anything else."""
    if value is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600}
    unit = units.get(value[-1:].lower(), 0)
    number = value[:-1] if unit else value
    try:
        found = float(number) * (unit or 1)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e9:
        raise UsageError(f"{value!r} is no time", hint="--time-budget 90s, 20m or 2h")
    return found


Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=_json_place,
        help="Write the result as JSON; - is stdout.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="The model it was made from: directory, model.onnx or module:factory."
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Without --model, run the factory that the package remembers, with its options.",
    ),
]
METRIC_NAMES = (
    "sts",
    "spearman_cosine",
    "accuracy",
    "f1",
    "entity_f1",
    "recall@1",
    "perplexity",
    *TASKS,
)
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME:FILE",
        help=f"Task metric, such as sts:stsb.csv: {', '.join(METRIC_NAMES)} or file.py:function.",
    ),
]
QUANTIZE_NAMES = (
    "none",
    "int8",
    "w8a8",
    "w8a16",
    "w4a16",
    "w4a16-gptq",
    "w4a16-awq",
    "w4a8",
    "w6a6",
    "fp8",
    "fp16",
    "bf16",
)
Calib = Annotated[
    str | None,
    typer.Option("--calib", metavar="FILE", help="Samples: .txt, .csv#column, .npz, folder."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="DIR",
        help="What makes inputs of texts for an ONNX file, where it is not beside it.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Cores that an engine may use.")
]


MaxRam = Annotated[
    str | None,
    typer.Option(
        "--max-ram",
        metavar="SIZE",
        callback=_size,
        help="What calibration and verification stay within: 4GB. They take fewer rows at a time.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="Where files of a recipe are looked for first.",
    ),
]
Tuned = Annotated[
    Path | None,
    typer.Option("--tuned", help="A checkpoint of effc tune, in the place of training."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change the recipe: passes.0.bits=6."),
]


@app.command()
def compile(
    model: Annotated[
        str, typer.Argument(help="Model directory, model.onnx, module:factory, or recipe.yaml.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help=f"One of {', '.join(TARGETS)}; may be given again [default: ort].",
        ),
    ] = None,
    quantize: Annotated[
        str, typer.Option("--quantize", help=f"One of {', '.join(QUANTIZE_NAMES)}.")
    ] = "none",
    kv_cache: Annotated[
        str,
        typer.Option(
            "--kv-cache",
            metavar="WORD",
            help="What a language model's cache of keys and values is: float32 or int8.",
        ),
    ] = "float32",
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", help="Prune that part of every group of units, between 0 and 1."),
    ] = None,
    latency_budget: Annotated[
        float | None,
        typer.Option(
            "--latency-budget",
            metavar="SHARE",
            help="Prune until the graph takes that share of its time on the target, such as 0.7.",
        ),
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(
            "--align",
            metavar="N|auto",
            help="Round what pruning leaves to multiples of N, or to sizes that are measured to be faster.",
        ),
    ] = None,
    calib: Calib = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="How many samples to calibrate on [default: 128]."),
    ] = None,
    metric: Metric = None,
    tokenizer: Tokenizer = None,
    decisions: Annotated[
        Path | None, typer.Option("--decisions", help="Replay the ranges of an earlier compile.")
    ] = None,
    bench: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Time the engine against the model.")
    ] = True,
    threads: Threads = None,
    allow_worse: Annotated[
        bool,
        typer.Option(
            "--allow-worse", help="Write an engine that does not meet its gate, and say so."
        ),
    ] = False,
    time_budget: Annotated[
        str | None,
        typer.Option(
            "--time-budget",
            metavar="TIME",
            callback=_seconds,
            help="How long to search for what to take back where the gate is not met: 90s, 20m.",
        ),
    ] = None,
    max_ram: MaxRam = None,
    plan_: Annotated[
        bool, typer.Option("--plan", help="Say what every stage will take, and do nothing.")
    ] = False,
    set_: Set = None,
    json_: Json = None,
    debug: Debug = False,
    tuned: Tuned = None,
    data_place: Data = None,
    verbose: Verbose = False,
) -> None:
    """Compile a model into a verified, timed, packaged engine.

    \b
    Examples:
      effc compile MODEL_DIR -o OUT --quantize int8 --calib sentences.txt
      effc compile model.onnx -o OUT --quantize int8 --calib sentences.txt --tokenizer DIR
      effc compile model.py:build -o OUT --quantize w4a16 --no-bench
      effc compile recipe.yaml -o OUT --set passes.0.bits=6
    """
    _outside(json_, out)
    from effc import compiler, recipe

    if model.endswith((".yaml", ".yml")):
        if (
            quantize != "none"
            or kv_cache != "float32"
            or (ratio, latency_budget, align) != (None, None, None)
            or calib
            or metric
            or target
            or samples is not None
            or tokenizer
        ):
            raise UsageError(
                "a recipe says itself what to do; flags like --quantize do not go with it",
                hint="change the recipe with --set, e.g. --set targets.0=onnx",
            )
        made = recipe.read(
            Path(model), set_ or (), replayed=decisions is not None, data_place=data_place
        )
    else:
        if data_place is not None:
            raise UsageError("--data is for the files of a recipe", hint="name them one by one")
        data = compiler.from_flags(
            model, target=target or "ort", quantize=quantize, kv_cache=kv_cache, ratio=ratio,
            latency_budget=latency_budget, align=align, calib=calib, metric=metric, samples=samples or 128,
            tokenizer=tokenizer,
        )  # fmt: skip
        made = recipe.build(data, overrides=set_ or (), replayed=decisions is not None)
    if not bench:
        made = recipe.without_bench(made)
    recorded = _read_json(decisions) if decisions else None
    if plan_:
        from effc import plan

        with terminal() as progress:
            predicted = plan.plan(
                made, out, progress=progress, threads=threads, decisions=recorded,
                max_ram_bytes=_size_of(max_ram),
            )  # fmt: skip
        for line in plan.lines(predicted):
            _say(line, json_)
        _write_json(json_, predicted)
        return
    with terminal() as progress:
        result = compiler.run(
            made, out, threads=threads, decisions=recorded, progress=progress,
            allow_worse=allow_worse, time_budget_s=_seconds_of(time_budget),
            max_ram_bytes=_size_of(max_ram), tuned=tuned,
        )  # fmt: skip
    _say(result.text(), json_)
    _say(f"{out} is ready", json_)
    _write_json(json_, result.report)


Processes = Annotated[
    int | None,
    typer.Option(
        "--processes", min=1, max=256, help="Processes of this machine that share the work."
    ),
]


def _without(words: list[str], option: str) -> list[str]:
    """A command line without an option and its value."""
    made, is_value = [], False
    for word in words:
        if is_value or word == option:
            is_value = word == option and not is_value
        elif not word.startswith(f"{option}="):
            made.append(word)
    return made


@app.command()
def tune(
    recipe_: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe that trains.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Checkpoint to write.")],
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            metavar="DIR",
            help="What the model of a task is made over: source.encoder.",
        ),
    ] = None,
    data_place: Data = None,
    set_: Set = None,
    max_ram: MaxRam = None,
    processes: Processes = None,
    json_: Json = None,
    verbose: Verbose = False,
) -> None:
    """Run a recipe up to its last pass that trains, and keep what was trained; a killed run goes on where it was.

    Several processes share the batches of a step (`accumulate`); `accelerate launch -m effc tune …` starts them too.

    \b
    Examples:
      effc tune recipe.yaml -o CKPT
      effc tune recipe.yaml -o CKPT --processes 2 --set passes.1.accumulate=2
      effc compile recipe.yaml --tuned CKPT -o OUT
      effc tune task.yaml --data DIR --encoder DIR -o CKPT
    """
    _outside(json_, out)
    from effc import many

    if processes is not None and processes > 1:
        from effc.machine import default_threads

        threads = max(1, default_threads() // processes)
        raise typer.Exit(many.launch(_without(sys.argv[1:], "--processes"), processes, threads))
    many.start()
    from effc import compiler, recipe
    from effc.report_numbers import curve_words

    typed = os.path.abspath(encoder) if encoder is not None and os.path.exists(encoder) else encoder
    chosen = [f"source.encoder={json.dumps(typed)}"] if typed is not None else []
    made = recipe.read(recipe_, [*chosen, *(set_ or ())], data_place=data_place)
    with terminal() as progress:
        found = compiler.tune(made, out, progress=progress, max_ram_bytes=_size_of(max_ram))
    if many.rank():
        return
    for step, curve in found["curves"].items():
        _say(f"step {step}: {curve_words(curve)}", json_)
    _say(f"{out} is ready", json_)
    _write_json(json_, found)


@app.command()
def verify(
    out: Annotated[
        Path, typer.Argument(help="A directory that effc compile wrote, or anybody's ONNX file.")
    ],
    model: Model = None,
    trust_code: TrustCode = False,
    calib: Calib = None,
    metric: Metric = None,
    tokenizer: Tokenizer = None,
    threads: Threads = None,
    json_: Json = None,
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:
    """Check that a package is whole; with --model, that it does what the model does.

    Of an ONNX file it says what it is, quantised or not, and with --model what it is worth beside that.

    \b
    Examples:
      effc verify OUT --model MODEL_DIR --metric sts:stsb.csv
      effc verify quantised.onnx --model MODEL_DIR --metric sts:stsb.csv
    """
    _outside(json_, out)
    from effc import compared, inspection

    if compared.is_file(out):
        with terminal() as progress:
            found = compared.verify(
                out, model=model, tokenizer=tokenizer, calib=calib, metric=metric, threads=threads,
                progress=progress,
            )  # fmt: skip
        for line in compared.lines(found):
            _say(line, json_)
        _write_json(json_, found)
        return
    if tokenizer is not None:
        raise UsageError(
            "--tokenizer is for an ONNX file, and a package has its own", hint="leave it out"
        )
    with terminal() as progress:
        found = inspection.verify(
            out, model=model, calib=calib, metric=metric, threads=threads, progress=progress,
            trust_code=trust_code,
        )  # fmt: skip
    for line in inspection.verify_lines(found):
        _say(line, json_)
    _write_json(json_, found)


@app.command()
def bench(
    out: Annotated[Path, typer.Argument(help="A directory that effc compile wrote.")],
    model: Model = None,
    trust_code: TrustCode = False,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Whose engine to time [default: the first of the package]."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="Another package or .onnx file to time too."),
    ] = None,
    calib: Calib = None,
    metric: Metric = None,
    shapes: Annotated[
        str,
        typer.Option(
            "--shapes",
            help="BATCHxLENGTH, or BATCHxLENGTH+PAST with a filled cache, comma separated.",
        ),
    ] = "1x16,1x128,8x128,1x1+128",
    budget: Annotated[
        float, typer.Option("--budget", min=0.1, help="Seconds a shape may take.")
    ] = 9.5,
    threads: Threads = None,
    streams: Annotated[
        int, typer.Option("--streams", min=1, max=256, help="Callers that use an engine at once.")
    ] = 1,
    json_: Json = None,
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:
    """Time an engine against the model it was made from, with an interval for every ratio.

    \b
    Example:
      effc bench OUT --model MODEL_DIR --json bench.json
    """
    _outside(json_, out, *(against or ()))
    from effc import inspection, report

    with terminal() as progress:
        found = inspection.bench(
            out, model=model, against=against or (), calib=calib, metric=metric,
            shapes=inspection.parse_shapes(shapes), budget_s=budget, threads=threads,
            streams=streams, progress=progress, target=target, trust_code=trust_code,
        )  # fmt: skip
    for line in report.bench_lines(found):
        _say(line, json_)
    _write_json(json_, found)


@app.command()
def run(
    out: Annotated[
        Path,
        typer.Argument(help="A directory that effc compile wrote."),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", help="What to go on from, to paint or to classify; may be given again."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="A file with a prompt a line.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="How many tokens a reply may have.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", min=0, max=1, help="Draw from the likeliest that hold this share."),
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="What is drawn.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="A text that ends a reply; may be given again."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE.png", help="Where a picture is written."),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Steps from noise to a picture.")
    ] = 50,
    count: Annotated[
        int, typer.Option("--count", min=1, max=1024, help="Pictures, of seeds one behind another.")
    ] = 1,
    negative: Annotated[
        str | None, typer.Option("--negative", help="What is not wanted in a picture.")
    ] = None,
    label: Annotated[
        int | None, typer.Option("--label", min=0, help="The class of a picture.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", min=0, max=1000, help="How much prompt or class count."),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", help="Another sampler than the package's own."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help=f"What the package of a task does: one of {', '.join(TASKS)}."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="Samples of a task, in its own format."),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            "--html",
            metavar="FILE",
            callback=_html_place,
            help="Write what was found as one page that loads nothing.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Whose engine [default: the first of the package]."),
    ] = None,
    threads: Threads = None,
    json_: Json = None,
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:
    """Write text with a causal language model as it comes, pictures with a diffusion pipeline, or answers to texts.

    \b
    Examples:
      effc run OUT --prompt "Once upon a time"
      effc run OUT --prompts lines.txt --temperature 0.8 --top-p 0.9 --json replies.json
      effc run OUT --steps 20 --seed 7 -o image.png
      effc run OUT --prompt "a red shoe" --count 4 -o shoe.png
      effc run OUT --task diaasq --file dialogues.json --html found.html
      effc run OUT --prompt "a warm film"
    """
    _outside(json_, out)
    _outside(html, out, option="--html")
    from effc import lean

    lean.without_torch()
    if (task, file) != (None, None) or html is not None:
        if task is None or file is None:
            raise UsageError(
                "a task is done on a file: --task and --file go together",
                hint=f"effc run OUT --task {next(iter(TASKS))} --file FILE",
            )
        from effc import solving

        with terminal() as progress:
            solved = solving.solve(
                out, file, task, target=target, threads=threads, progress=progress
            )
        stream = sys.stderr if json_ == "-" or html == "-" else sys.stdout
        for text in solved.lines(in_colour=stream.isatty()):
            print(text, file=stream)
        print(solved.line(), file=sys.stderr)
        if html is not None:
            _write("--html", html, solved.page())
        _write_json(json_, solved.to_json())
        return
    from effc import writing

    asked = list(prompt or ()) + (writing.read_prompts(prompts) if prompts else [])
    if picture is not None:
        from effc import painting
        from effc.sampling import Wish

        _outside(str(picture), out, option="-o")
        count = max(count, len(asked))
        places = painting.check_places(picture, count)
        wish = Wish(
            prompts=tuple(asked) or None, negative=negative, guidance=guidance,
            labels=None if label is None else (label,),
        )  # fmt: skip
        with terminal() as progress:
            made, painted = painting.paint(
                out, steps=steps, seed=seed, count=count, wish=wish, kind=sampler, target=target,
                threads=threads, progress=progress,
            )  # fmt: skip
        painting.write(places, made)
        for place in places:
            _say(f"{place} is written", json_)
        print(painting.line(painted), file=sys.stderr)
        _write_json(json_, {"pictures": [place.name for place in places], **painted})
        return
    from effc import chain, package

    if package.read(out).kind in chain.KINDS:
        answers = chain.answer(out, asked, target=target, threads=threads)
        for text in chain.lines(asked, answers):
            _say(text, json_)
        _write_json(json_, answers)
        return
    from effc.generate import Sampling

    stream = sys.stderr if json_ == "-" else sys.stdout
    if len(asked) == 1:
        print(asked[0], end="\n" if chat else "", file=stream, flush=True)
    sampling = Sampling(
        temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens, stop=tuple(stop or ()),
    )  # fmt: skip
    found = writing.write(
        out, asked, sampling=sampling, chat=chat, target=target, threads=threads,
        show=lambda _, text: print(text, end="", file=stream, flush=True) if len(asked) == 1 else None,
    )  # fmt: skip
    if len(asked) == 1:
        print(file=stream)
    else:
        for text, reply in zip(asked, found["texts"], strict=True):
            _say(f"{text}{reply}\n", json_)
    print(writing.line(found), file=sys.stderr)
    _write_json(json_, found)


LAYOUT_NAMES = (
    "diffusers", "onnxruntime-genai", "ort-model-package", "peft", "sentence-transformers", "transformers.js", "triton",
)  # fmt: skip


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="What to try: sweep.yaml, see docs/sweep.md.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the sweep, new or begun.")],
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Trials at once [default: as many as CPUs allow]."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", help="Head of a Ray cluster, HOST:6379 [default: this machine alone]."
        ),
    ] = None,
    threads: Threads = None,
    json_: Json = None,
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:
    """Try many recipes, and keep those that no other beats in accuracy, time and size.

    The best so far is on disk after every trial; a sweep that was stopped goes on where it was.

    \b
    Example:
      effc sweep sweep.yaml -o DIR --workers 2
    """
    _outside(json_, out)
    from effc.sweep import drive

    settings = drive.Settings(workers=workers, address=address, threads=threads)
    found = drive.run(file, out, settings, lambda line: _say(line, json_))
    for line in drive.lines(found):
        _say(line, json_)
    _write_json(json_, found)


@app.command()
def package(
    out: Annotated[
        Path,
        typer.Argument(help="A package, or for peft a checkpoint of effc tune."),
    ],
    layout: Annotated[str, typer.Option("--layout", help=f"One of {', '.join(LAYOUT_NAMES)}.")],
    place: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Directory to write, new or empty.")
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", help="What Triton serves the model by; else its own name."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Of several targets the one that Triton gets.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", metavar="FILE", help="For Triton, a plan that trtexec built by kit.txt."
        ),
    ] = None,
    json_: Json = None,
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:
    """Write a copy of a package as another tool opens it.

    \b
    Examples:
      effc package OUT --layout onnxruntime-genai -o DIR
      effc package OUT --layout transformers.js -o DIR
      effc package OUT --layout sentence-transformers -o DIR
      effc package OUT --layout triton --name my_model -o REPOSITORY
    """
    _outside(json_, out, place)
    from effc import layout as layouts
    from effc.layout_plan import Asked

    files = layouts.write(out, layout, place, Asked(name=name, target=target, plan=plan))
    for name in files:
        _say(f"    {name}", json_)
    _say(f"{place} is ready for {layout}", json_)
    _write_json(json_, {"layout": layout, "files": files})


@app.command()
def explain(
    out: Annotated[Path, typer.Argument(help="A directory that effc compile wrote.")],
    model: Model = None,
    trust_code: TrustCode = False,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Whose engine [default: the first of the package]."),
    ] = None,
    calib: Calib = None,
    tuned: Tuned = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many layers to show.")] = 5,
    threads: Threads = None,
    json_: Json = None,
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:
    """Say where a package's numbers leave its model's: the step, the node, and what would help.

    \b
    Example:
      effc explain OUT --model MODEL_DIR --calib sentences.txt
    """
    _outside(json_, out)
    from effc import walk

    with terminal() as progress:
        found = walk.walk(
            out, model=model, trust_code=trust_code, calib=calib, target=target, threads=threads,
            top=top, progress=progress, tuned=tuned,
        )  # fmt: skip
    for line in walk.lines(found):
        _say(line, json_)
    _write_json(json_, found)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A package, a model directory, model.onnx, or module:factory.")
    ],
    target: Annotated[str, typer.Option("--target", help="Whose dialect to show.")] = "ort",
    graph: Annotated[
        bool, typer.Option("--graph", help="Print the graph, one line per node.")
    ] = False,
    coupling: Annotated[
        bool,
        typer.Option(
            "--coupling", help="Print which dimensions move together, and what pruning them saves."
        ),
    ] = False,
    svg: Annotated[
        str | None,
        typer.Option(
            "--svg",
            metavar="FILE",
            callback=_drawing_place,
            help="With --coupling: draw who writes and who reads each group.",
        ),
    ] = None,
    json_: Json = None,
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:
    """Say what is in a package, or what effc would see in a model.

    \b
    Examples:
      effc inspect OUT
      effc inspect MODEL_DIR --graph
      effc inspect MODEL_DIR --coupling --svg groups.svg
    """
    from effc import inspection

    if svg is not None and not coupling:
        raise UsageError("--svg draws what --coupling finds", hint="add --coupling")
    if inspection.is_package(model):
        _outside(json_, model)
        if coupling:
            raise UsageError(
                f"{model} is a package, and dimensions are coupled in a model",
                hint="name the model directory or the factory that it was made from",
            )
    found = inspection.inspect(model, target=target, graph=graph, coupling=coupling)
    for line in inspection.inspect_lines(found):
        _say(line, svg if svg == "-" else json_)
    if svg is not None:
        _write("--svg", svg, inspection.drawing(found))
    _write_json(json_, found)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="A directory that effc compile wrote.")],
    place: Annotated[
        str | None,
        typer.Option(
            "-o", "--out", metavar="FILE", callback=_report_place,
            help="Where to write the page; - is stdout [default: OUT/report.html].",
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            "--bench", metavar="FILE",
            help="Join what `effc bench OUT --json FILE` measured on another machine.",
        ),
    ] = None,
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Write the report of a package as one HTML file, anew from its report.json.

    \b
    Examples:
      effc report OUT
      effc report OUT -o report.html
      effc report OUT --bench times-of-the-gpu.json
    """
    from effc import package
    from effc import report as reports

    if bench is not None:
        from effc import bounded, elsewhere

        found = bounded.read_json(bench, UsageError, package.MOST_RECORD_BYTES)
        machine = elsewhere.join(out, found, str(bench))
        _say(f"timings of {machine} are in the report of {out}", place)

    own = out / reports.HTML
    if place is None or os.path.realpath(place) == os.path.realpath(own):
        if bench is None:  # a join has written the page with the rest
            package.replace(out, {reports.HTML: reports.rebuilt(out, beside=True)})
        print(f"{own} is ready")
        return
    _outside(place, out, option="-o")
    _write("-o", place, reports.rebuilt(out, beside=False))
    if place != "-":
        print(f"{place} is ready")


LINT_TARGETS = ("ort", "openvino", "tensorrt")


def _sarif_place(value: str | None) -> str | None:
    return _place("--sarif", value)


@app.command()
def lint(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file, quantised or not.")
    ],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help=f"One of {', '.join(LINT_TARGETS)}; may be given again [default: ort]."
        ),
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Write a file with what can be put right exactly.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE",
            help="Where --fix writes; MODEL.onnx itself is replaced only so [default: MODEL.fixed.onnx].",
        ),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option("--select", metavar="ID", help="Only this rule; may be given again."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="ID", help="Not this rule; may be given again."),
    ] = None,
    sarif: Annotated[
        str | None,
        typer.Option(
            "--sarif", metavar="FILE", callback=_sarif_place,
            help="Write the findings as SARIF 2.1.0, for code review; - is stdout.",
        ),
    ] = None,
    json_: Json = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Say what an ONNX file loses on a runtime, before it runs, and put right what can be; ends with 15 where it does.

    \b
    Examples:
      effc lint model.onnx --target ort
      effc lint model.onnx --target tensorrt --fix -o model.trt.onnx
      effc lint model.onnx --target ort --target openvino --sarif lint.sarif
    """
    from effc.errors import LintError

    if out is not None and not fix:
        raise UsageError("-o says where --fix writes", hint="add --fix, or leave -o out")
    targets = list(dict.fromkeys(target or ["ort"]))
    if fix and len(targets) > 1:
        raise UsageError("what suits one target need not suit another", hint="--fix one at a time")
    from effc import peers
    from effc.lint import run, told
    from effc.package import dump

    rules = {word: run.chosen(word, select or (), ignore or ()) for word in targets}
    stream = "-" if "-" in (json_, sarif) else None
    found: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for word in targets:
        if fix:
            place = out or model.with_name(f"{model.stem}.fixed.onnx")
            repaired = run.repair(model, place, rules[word])
            for one in repaired.done:
                _say(f"{model}: fixed {one.id} {one.op} {one.node} ({one.evidence})", stream)
            if repaired.done:
                _say(f"{place} is written; relative L2 {repaired.gap:.1g} from {model}", stream)
            found[word] = repaired.left
        else:
            found[word] = run.check(model, rules[word])
        others[word] = peers.of_file(model, word) if found[word] else []
        for line in (*told.lines(model, word, found[word]), *peers.lines(others[word])):
            _say(line, stream)
    made = [told.to_json(model, word, found[word], others[word]) for word in targets]
    _write_json(json_, {"runs": made})
    if sarif is not None:
        known = {rule.id: rule for word in targets for rule in rules[word]}
        runs = [(model, word, found[word]) for word in targets]
        _write("--sarif", sarif, dump(told.sarif(runs, list(known.values()))))
    if total := sum(map(len, found.values())):
        raise LintError(
            f"{total} finding{'s' if total > 1 else ''} in {model}",
            hint="docs/lint.md says more of each; --ignore ID leaves one out",
        )


@app.command("migrate-trt")
def migrate_trt(
    line: Annotated[
        str | None,
        typer.Argument(metavar="LINE", help="A command line of trtexec 8 to 10, in quotes; it is not run."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE.onnx", help="What to write [default: NAME.typed.onnx, here]."),
    ] = None,
    flags_file: Annotated[
        Path | None,
        typer.Option("--flags-file", metavar="FILE", help="A file that holds the line, or its flags."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance", min=0,
            help="Relative L2 from float32 that is allowed [default: 0.01 for fp16, 0.05 bf16, 0.1 int8].",
        ),
    ] = None,
    json_: Json = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Make of a trtexec 10 line with --fp16, --int8, --best, --calib an ONNX that says so itself, and the line for 11.

    \b
    Examples:
      effc migrate-trt "trtexec --onnx=model.onnx --fp16 --saveEngine=model.plan" -o model.fp16.onnx
      effc migrate-trt "trtexec --onnx=net.onnx --int8 --fp16 --calib=calib.cache" --json report.json
    """
    if (line is None) == (flags_file is None):
        raise UsageError(
            "one of a LINE in quotes and --flags-file is wanted",
            hint="effc migrate-trt 'trtexec --onnx=model.onnx --fp16'",
        )
    from effc.migrate import run, trtexec

    text = run.flags_of(flags_file) if flags_file is not None else line or ""
    if out is None:
        source = trtexec.parse(trtexec.words_of(text)).onnx
        out = Path(f"{Path(source).stem}.typed.onnx")
    found = run.migrate(text, out, tolerance=tolerance)
    for told in found.lines():
        _say(told, json_)
    _write_json(json_, found.to_json())


SETTINGS_KINDS = ("optimum", "modelopt", "olive", "transformers.js")


@app.command("migrate-config")
def migrate_config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Settings of another tool: JSON or YAML.")],
    out: Annotated[
        str,
        typer.Option(
            "-o", "--out", metavar="FILE", callback=_report_place, help="Recipe to write; - is stdout.",
        ),
    ] = "recipe.yaml",
    kind: Annotated[
        str | None,
        typer.Option("--kind", help=f"Whose they are, {', '.join(SETTINGS_KINDS)} [default: seen from the keys]."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Directory, model.onnx or module:factory, where the settings name none."),
    ] = None,
    calib: Calib = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help=f"One of {', '.join(TARGETS)} [default: what the settings are for]."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="Which of the modes of transformers.js: q8, q4, fp16, …"),
    ] = None,
    json_: Json = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Make a recipe of settings of optimum, ModelOpt, Olive or transformers.js, and name what has no counterpart.

    \b
    Examples:
      effc migrate-config ort_config.json --model MODEL_DIR --calib sentences.txt -o recipe.yaml
      effc migrate-config workflow.json -o recipe.yaml
      effc migrate-config quantize_config.json --mode q4 --model model.onnx -o recipe.yaml
    """
    from effc.settings import run as settings

    if out != "-" and os.path.exists(out) and os.path.exists(file) and os.path.samefile(out, file):
        raise UsageError(f"{out} is the file that is read", hint="name another with -o")
    found = settings.migrate(
        file, kind=kind, model=model, calib=calib, target=target, mode=mode,
        base=Path() if out == "-" else Path(out).parent,
    )  # fmt: skip
    _write("-o", out, found.text)
    stream = "-" if "-" in (json_, out) else None
    for line in found.lines():
        _say(line, stream)
    if out != "-":
        _say(f"{out} is ready", stream)
    _write_json(json_, found.to_json())


@app.command()
def passes(json_: Json = None, debug: Debug = False, verbose: Verbose = False) -> None:
    """List every pass with its options and their defaults."""
    from effc import inspection

    found = inspection.passes()
    for name, entry in found.items():
        _say(f"{name} ({entry['effect']}): {entry['summary']}", json_)
        for option, default in entry["options"].items():
            _say(f"    {option} = {default}", json_)
    _write_json(json_, found)


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="With --for: a model directory, .onnx or .gguf; it is not loaded."
        ),
    ] = None,
    place: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="TARGET", help="Say which tool serves that: ort, gguf, coreml, vllm, …"
        ),
    ] = None,
    json_: Json = None,
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:
    """Say what this machine has: CPU features, versions, targets, how to get what is missing, and what others serve.

    \b
    Examples:
      effc doctor
      effc doctor --model MODEL_DIR --for gguf
    """
    from effc import inspection

    if model is not None and place is None:
        raise UsageError("--model goes with --for", hint="--for ort, or where else it is to run")
    found = inspection.doctor(model, place)
    for line in inspection.doctor_lines(found):
        _say(line, json_)
    _write_json(json_, found)


delta = typer.Typer(
    name="delta",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Send changed weights to devices in few signed bytes, and take them there without a risk.",
)
app.add_typer(delta)
StorePlace = Annotated[Path, typer.Argument(metavar="STORE", help="The store of a device.")]
Certificates = Annotated[
    Path | None,
    typer.Option("--ca", metavar="FILE", help="Certificates to trust for https, in PEM."),
]


def _budget(value: str | None) -> str | None:
    """Refuse what is no size before the work."""
    _size_of(value, "--budget 64KB")
    return value


def _uplink_limit(value: str) -> str:
    """Refuse what is no size before the work."""
    _size_of(value, "--uplink-limit 64MB")
    return value


@delta.command("keygen")
def delta_keygen(
    private: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="Where the private key goes.")
    ],
    debug: Debug = False,
) -> None:
    """Write a pair of keys: FILE signs deltas, FILE.pub is what devices trust.

    \b
    Example:
      effc delta keygen -o release.key
    """
    from effc.delta import packet

    public = private.with_name(f"{private.name}.pub")
    word = packet.keygen(private, public)
    print(f"{private} is the private key: keep it; {public} ({word[:12]}…) is for devices")


@delta.command("make")
def delta_make(
    old: Annotated[Path, typer.Argument(help="The package that devices hold.")],
    new: Annotated[
        Path, typer.Argument(help="The same, compiled of new weights with --decisions.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Delta to write.")],
    key: Annotated[Path, typer.Option("--key", help="Private key to sign with.")],
    counter: Annotated[
        int, typer.Option("--release", min=1, help="Number of the release, above all before.")
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SIZE",
            callback=_budget,
            help="Most bytes of the file, such as 64KB.",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error", help="Share of the change that may be left out [default: 0, lossless]."
        ),
    ] = None,
    self_test: Annotated[
        Path | None,
        typer.Option(
            "--self-test",
            metavar="FILE",
            help=".safetensors with an array for each input, to test with.",
        ),
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(
            "--importance",
            metavar="FILE",
            help=".safetensors with what an error of each weight costs, by initialiser.",
        ),
    ] = None,
    mirror: Annotated[
        Path | None,
        typer.Option("--mirror", metavar="DIR", help="Write what devices will hold: the next OLD."),
    ] = None,
    anchor: Annotated[
        bool,
        typer.Option(
            "--anchor", help="All of NEW, for every device of that graph, whatever it holds."
        ),
    ] = False,
    json_: Json = None,
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:
    """Write a signed delta from one package to another.

    \b
    Examples:
      effc delta make OLD NEW --release 1 --key release.key -o up.effd
      effc delta make OLD NEW --release 2 --key release.key --budget 64KB --mirror HELD -o up.effd
      effc delta make HELD HELD --release 2 --key release.key --anchor -o anchor.effd
    """
    _outside(json_, old, new)
    _outside(str(out), old, new, option="-o")
    from effc.delta import make

    made = make.make(
        old, new, key=key, counter=counter, budget=_size_of(budget), max_error=max_error,
        inputs=make.arrays_of(self_test) if self_test else None,
        importance=make.arrays_of(importance) if importance else None, mirror=mirror,
        anchor=anchor,
    )  # fmt: skip
    _write("-o", str(out), made.content)
    for line in make.lines(made):
        _say(line, json_)
    _say(f"{out} is ready", json_)
    _write_json(json_, made.numbers)


@delta.command("refit")
def delta_refit(
    old: Annotated[Path, typer.Argument(help="The package whose engine takes other weights.")],
    new: Annotated[
        Path, typer.Argument(help="The same, compiled of new weights with --decisions.")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="Weights to write (.safetensors).")
    ],
    key: Annotated[Path, typer.Option("--key", help="Private key to sign with.")],
    release: Annotated[
        int, typer.Option("--release", min=1, help="Number of the release, above all before.")
    ],
    json_: Json = None,
    debug: Debug = False,
) -> None:
    """Write the weights that changed of a TensorRT engine that was built with `weights: refittable`.

    \b
    Example:
      effc delta refit OLD NEW --release 1 --key release.key -o weights.safetensors
    """
    _outside(json_, old, new)
    _outside(str(out), old, new, option="-o")
    from effc.delta import refit

    made = refit.made(old, new, release=release)
    told = refit.told(old, made)
    _write("-o", str(out), refit.written(made, key))
    for line in refit.lines(told):
        _say(line, json_)
    _say(f"{out} is ready", json_)
    _write_json(json_, told)


@delta.command("init")
def delta_init(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Directory to make.")],
    out: Annotated[Path, typer.Argument(help="A package that effc compile wrote.")],
    key: Annotated[
        list[Path], typer.Option("--key", help="Public key to trust; may be given again.")
    ],
    json_: Json = None,
    debug: Debug = False,
) -> None:
    """Make the store of a device: two slots, the first with a copy of a package, and the keys that it trusts.

    \b
    Example:
      effc delta init STORE OUT --key release.key.pub
    """
    from effc.delta import device, packet

    _tell(device.init(store, out, [packet.public_word(file) for file in key]), json_)


@delta.command("apply")
def delta_apply(
    store: StorePlace,
    file: Annotated[Path, typer.Argument(metavar="DELTA", help="A file of effc delta make.")],
    json_: Json = None,
    debug: Debug = False,
) -> None:
    """Check a delta, build its package in the other slot, test it there, and let it serve; or leave all as it is."""
    from effc.delta import device

    _tell(device.apply(store, file), json_)


@delta.command("confirm")
def delta_confirm(store: StorePlace, json_: Json = None, debug: Debug = False) -> None:
    """Say that the release that serves has proved itself."""
    from effc.delta import device

    _tell(device.confirm(store), json_)


@delta.command("rollback")
def delta_rollback(store: StorePlace, json_: Json = None, debug: Debug = False) -> None:
    """Let the package in the other slot serve again."""
    from effc.delta import device

    _tell(device.rollback(store), json_)


@delta.command("status")
def delta_status(store: StorePlace, json_: Json = None, debug: Debug = False) -> None:
    """Say what a store holds, after a look at every byte of it."""
    from effc.delta import device

    found = device.status(store)
    _say(device.line(device.record_of(store)), json_)
    for slot, word in found["slots"].items():
        _say(f"    slot {slot}: {word}", json_)
    _write_json(json_, found)


@delta.command("inspect")
def delta_inspect(
    file: Annotated[Path, typer.Argument(metavar="DELTA", help="A file of effc delta make.")],
    key: Annotated[
        Path | None, typer.Option("--key", help="Public key that it must be signed by.")
    ] = None,
    json_: Json = None,
    debug: Debug = False,
) -> None:
    """Say what is in a delta; without --key nobody has looked at who signed it."""
    from effc.delta import device, packet

    content = packet.read(file, device.MOST_INSPECTED)
    if key is not None:
        packet.check_signature(content, [packet.public_word(key)])
    found = {
        **packet.show(packet.parsed(content)),
        "bytes": len(content),
        "signed": key is not None,
    }
    for line in packet.show_lines(found):
        _say(line, json_)
    _write_json(json_, found)


@delta.command("serve")
def delta_serve(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Directory of deltas.", exists=True, file_okay=False),
    ],
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on; only this machine reaches 127.0.0.1."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 is any free one.")
    ] = 8423,
    cert: Annotated[
        Path | None, typer.Option("--cert", metavar="FILE", help="Certificate for https, in PEM.")
    ] = None,
    cert_key: Annotated[
        Path | None, typer.Option("--cert-key", metavar="FILE", help="Its private key.")
    ] = None,
    uplink: Annotated[
        Path | None,
        typer.Option(
            "--uplink",
            metavar="INBOX",
            help="Directory where tokens from devices go; none without.",
        ),
    ] = None,
    uplink_limit: Annotated[
        str,
        typer.Option(
            "--uplink-limit",
            metavar="SIZE",
            callback=_uplink_limit,
            help="Most bytes that come in a day, and that lie in INBOX.",
        ),
    ] = "256MB",
    debug: Debug = False,
    verbose: Verbose = False,
) -> None:
    """Serve the deltas of a directory to devices, each to those that hold its base, else an anchor, until Ctrl-C.

    \b
    Examples:
      effc delta serve releases
      effc delta serve releases --uplink inbox --uplink-limit 64MB
    """
    from effc.delta import serve

    inbox = _inbox(uplink, uplink_limit) if uplink else None
    taken = serve.listening(host, port)
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if cert else "http"
    known = len(serve.releases(directory))
    told = f"{known} releases at {scheme}://{shown}:{taken.getsockname()[1]}, Ctrl-C ends"
    serve.serve(
        directory, taken, inbox=inbox, cert=cert, cert_key=cert_key,
        ready=lambda: print(told, flush=True),
    )  # fmt: skip


def _inbox(place: Path, limit: str) -> Any:
    """An inbox that knows whose tokens it takes. Raises DeltaError for one that does not."""
    from effc.delta.inbox import Inbox
    from effc.delta.uplink import Limits
    from effc.errors import DeltaError

    size = _size_of(limit) or 0
    made = Inbox(place, limits=Limits(bytes_a_day=size, bytes_waiting=size))
    if made.expected() is None:
        raise DeltaError(
            f"{place} does not say whose tokens it takes",
            hint="effc.delta.inbox.Inbox(PLACE).expect({'engine': SHA256, …}) writes that",
        )
    return made


@delta.command("pull")
def delta_pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where effc delta serve listens.")],
    store: StorePlace,
    ca: Certificates = None,
    json_: Json = None,
    debug: Debug = False,
) -> None:
    """Fetch the delta behind what a store serves, in as many attempts as it takes, and apply it.

    \b
    Example:
      effc delta pull http://127.0.0.1:8423 STORE
    """
    from effc.delta import channel, device

    found = channel.pull(url, store, ca=ca)
    if found is None:
        _say("there is no release behind what serves", json_)
    _tell(found or device.record_of(store), json_)


@delta.command("push")
def delta_push(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Where effc delta serve --uplink listens.")
    ],
    queue: Annotated[
        Path, typer.Argument(metavar="QUEUE", help="Directory of payloads that wait on a device.")
    ],
    ca: Certificates = None,
    json_: Json = None,
    debug: Debug = False,
) -> None:
    """Send up the tokens that wait in a device's queue, as far as its owner and the day allow.

    \b
    Example:
      effc delta push http://127.0.0.1:8423 QUEUE
    """
    from effc.delta import push
    from effc.delta.uplink import Queue

    found = push.push(url, Queue(queue), ca=ca)
    _say(
        f"payloads: {found.taken} taken, {len(found.refused)} refused, {found.waiting} waiting",
        json_,
    )
    for why in dict.fromkeys(found.refused):
        _say(f"    refused: {why}", json_)
    _write_json(json_, found)


def _tell(record: Any, json_: str | None) -> None:
    from effc.delta import device

    _say(device.line(record), json_)
    _write_json(json_, record)


def _say(text: str, json_: str | None) -> None:
    """Print for a person; to stderr where stdout carries the JSON."""
    print(text, file=sys.stderr if json_ == "-" else sys.stdout, flush=True)


def _write_json(json_: str | None, value: Any) -> None:
    if json_ is None:
        return
    from effc.package import dump

    _write("--json", json_, dump(value))


def _write(option: str, place: str, text: str | bytes) -> None:
    """Text to stdout, into a stream, or into a file that is exchanged as a whole."""
    content = text.encode() if isinstance(text, str) else text
    if place == "-":
        sys.stdout.flush()
        sys.stdout.write(text) if isinstance(text, str) else sys.stdout.buffer.write(text)
        return
    try:
        if _is_stream(place):
            with open(place, "ab") as stream:
                stream.write(content)
            return
        path = Path(os.path.realpath(place))
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"{option} {place} cannot be written: {error.strerror}",
            hint="name a file that can be written",
        ) from error


def _read_json(path: Path) -> Any:
    from effc import bounded, package

    found = bounded.read_json(path, UsageError, package.MOST_RECORD_BYTES)
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise UsageError(f"{path} holds no decisions", hint=DECISIONS)
    return found


def main() -> NoReturn:
    """Run the command line; every effc error ends with its message and its own exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache) / "effc" / "torch"))
    _state["interrupted"] = False
    try:
        code = _run()
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        code = INTERRUPTED
    finally:
        logging.disable(logging.NOTSET)
    sys.exit(code)


def _run() -> int:
    """The exit code of a command. Raises KeyboardInterrupt where a signal ended it, whatever came of the signal."""
    try:
        code = app(prog_name="effc", standalone_mode=False) or 0
    except EffcError as error:
        _refuse_interrupted()
        code = _fail(error)
    except typer.Exit as stop:
        code = stop.exit_code
    except typer.Abort:
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        _refuse_interrupted()
        code = _fail(_plain(error))
    except Exception as error:
        _refuse_interrupted()
        code = _usage(error)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return int(code)


def _refuse_interrupted() -> None:
    """Raise KeyboardInterrupt where an error is only what somebody's code made of a signal."""
    if _state["interrupted"]:
        raise KeyboardInterrupt


class _Interrupted(KeyboardInterrupt):
    """Not the built-in itself: Python ends by the signal, not our code, where that passes an `exec` of text."""


def _interrupt(*_: Any) -> None:
    _state["interrupted"] = True
    logging.disable(logging.CRITICAL)  # torch logs what flies through it
    raise _Interrupted


def _fail(error: EffcError) -> int:
    if _state["debug"]:
        import traceback

        traceback.print_exception(error)
    first, *rest = str(error).splitlines()
    name = type(error).__name__ if type(error) is not EffcError else "error"
    print(f"{name}: {first}", file=sys.stderr)
    for line in rest:
        print(f"    {line}", file=sys.stderr)
    return error.exit_code


def _plain(error: OSError) -> EffcError:
    """A file that the system refused, as a letter; --debug shows where that was."""
    reason = error.strerror or str(error) or type(error).__name__
    what = reason if error.filename is None else f"{error.filename}: {reason}"
    letter = EffcError(what, hint="--debug shows where this came from")
    letter.__cause__ = error
    return letter


def _usage(error: Exception) -> int:
    """A wrong call, as typer's own parser sees it; anything else is our bug and shows itself whole."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show()
    return 2
