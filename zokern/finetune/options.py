"""Every setting of a fine-tuning run, declared once, and the checks that need nothing loaded.

The command line and Python share this one class, so that both have the same defaults and the same error messages. The
settings of the methods are theirs (zokern/optim/): they are fields here under the names of the command's options, and None
where the class's own default holds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zokern.finetune import adapters, takers
from zokern.kinds import Choice, Directory, File, Flag, Integer, Kind, Number, Template, Text
from zokern.optim import ENTRIES
from zokern.settings import Setting
from zokern.tasks.metrics import named
from zokern.tasks.presets import PRESETS

FILES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")  # what is read as a file, in any case; but parquet with .gz too
REMEDY = 'install the extra with: pip install "zokern[finetune]"'
DATA, ADAPTER, METHOD, SCHEDULE = "Model and data", "Adapter", "Method", "Schedule"
OF_SOME, EVALUATION, OUTPUT, HARDWARE = "Settings of some methods", "Evaluation", "Output", "Hardware"


class FinetuneError(ValueError):
    """Something the user can mend; the message says what, where and how."""


def option(default: Any, kind: Kind, help: str, panel: str = "", flags: tuple[str, ...] = ()) -> Any:
    """A field of Options; `panel` is where the command's help has it."""
    return dataclasses.field(
        default=default, metadata={"setting": Setting(default, kind, help, flags=flags), "panel": panel}
    )


C = TypeVar("C")


def _of_methods(cls: type[C]) -> type[C]:
    """A dataclass with a field more for each option that methods take: a setting in a method's class (zokern/optim) becomes
    a Taker, a field here, an option (cli/tuning.py), and an argument of the class again (finetune/methods.py)."""
    fields = [
        (name, "Any", dataclasses.field(default=takers.default(name), metadata={"takers": name}))
        for name in takers.TAKERS
    ]
    namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), namespace=namespace)


@_of_methods
@dataclasses.dataclass
class Options:
    """All settings of one run. Units: lr, eps and weight_decay are per step and dimensionless; lengths are tokens."""

    model: str = option(
        default="demo",
        kind=Text(),
        help="What to tune: a directory that save_pretrained wrote, also one with an adapter of PEFT, a name of the "
        "Hugging Face hub, demo, a sentence encoder of 23 million parameters that needs no download, or smollm2, a "
        "language model of 135 million parameters, which is downloaded once (93 MB).",
    )
    data: str = option(
        default="docstrings",
        kind=Text(),
        help="Texts and labels: a .csv, .tsv, .jsonl, .json or .parquet file, a data set of the hub (name, or "
        "name:configuration), a directory that `datasets` reads, docstrings, first sentences of the Python standard "
        "library's docstrings with the topic of their module, or movie-snippets, 10,072 sentences of film reviews, kind or "
        "unkind, which are downloaded once (2 MB).",
    )
    objective: str = option(
        default="auto",
        kind=Choice(("auto", "similarity", "classifier", "prompt", "choices", "answer", "image")),
        help="How the model classifies. similarity: an encoder compares a text with a sentence about each label. "
        "classifier: a classification head. prompt: a language model scores each label's word after the text. "
        "choices: it scores candidates that each row brings. answer: it writes the answer. image: a head "
        "for pictures. auto goes by --choices, --answer, --pair-column and the model's configuration, and says what it "
        "picked.",
        panel=DATA,
    )
    text_column: str = option(default="text", kind=Text(), help="The column that holds the texts.", panel=DATA)
    image_column: str = option(
        default="image",
        kind=Text(),
        help="For image: the column with the pictures, or with their paths, which begin at the file of --data.",
        panel=DATA,
    )
    pair_column: str | None = option(
        default=None,
        kind=Text(),
        help="For classifier: the column with the second text of each pair, which the tokenizer sets after the first with "
        "its own marks between. Default: single texts.",
        panel=DATA,
    )
    label_column: str = option(default="label", kind=Text(), help="The column that holds the labels.", panel=DATA)
    eval_data: str | None = option(
        default=None,
        kind=Text(),
        help="Texts to evaluate on, in any form that --data takes. Default: the validation or test split of a data set "
        "with splits, else 20 % of the data, at most 400 texts, each label in its proportion.",
        panel=DATA,
    )
    task: str | None = option(
        default=None,
        kind=Choice(tuple(PRESETS)),
        help="One of the tasks of the papers: --template, its words, --choices or --answer, --cut, --metric, and --data "
        "from the hub; each can still be given. --data may be the benchmark's own directory or file. "
        + "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
        + ".",
        panel=DATA,
    )
    metric: str | None = option(
        default=None,
        kind=Text(),
        help="What is measured at evaluations: accuracy, macro_f1 or matthews of classes, exact_match or token_f1 of "
        "texts, or your own function of predictions and references, as module:function. Default: accuracy; for answer "
        "token_f1.",
        panel=EVALUATION,
    )
    minimise: str = option(
        default="loss",
        kind=Choice(("loss", "metric")),
        help="What a step makes smaller: the loss, or minus --metric of its batch, which needs no gradient. A metric takes "
        "few values, so it wants large batches and a larger --eps.",
        panel=METHOD,
    )
    split: str | None = option(
        default=None,
        kind=Text(),
        help="The split of a data set to train on. Default: train, else the first; the run says which.",
        panel=DATA,
    )
    eval_split: str | None = option(
        default=None,
        kind=Text(),
        help="The split to evaluate on, of --eval-data where that is given, else of --data. Default: the first with "
        "labels among validation, valid, val, dev, validation_matched, eval, test and their kin; the run says which.",
        panel=DATA,
    )
    unlabelled: str = option(
        default="-1,-",
        kind=Text(),
        help='What stands for a missing label, separated by commas: such texts are left out and counted. "" where all '
        "these are labels of yours.",
        panel=DATA,
    )
    label_order: str | None = option(
        default=None,
        kind=Text(),
        help="All labels, separated by commas, in the order of the model's classes. Default: the order of the model's "
        "own label2id, else of the data set's, else sorted; the run says which.",
        panel=DATA,
    )
    choices: str | None = option(
        default=None,
        kind=Text(),
        help="For choices: the columns with the candidates of each row, separated by commas, or one column with a list "
        "of them. --label-column names the right one by its place (from 0), its text or its column.",
        panel=DATA,
    )
    answer: str | None = option(
        default=None,
        kind=Text(),
        help="For answer: the column with the text to answer, or with a list of texts of which any is right and the first "
        "is learnt.",
        panel=DATA,
    )
    max_answer: int = option(
        default=32,
        kind=Integer(1),
        help="For answer: tokens that an answer may have. Longer ones are cut where they are learnt, and counted; a "
        "generation ends there.",
        panel=DATA,
    )
    chat: bool = option(
        default=False,
        kind=Flag(),
        help="For prompt, choices and answer: --template is what the user says in the tokenizer's chat template, and the "
        "model answers.",
        panel=DATA,
        flags=("--chat",),
    )
    descriptions: Path | None = option(
        default=None,
        kind=File("a JSON file {label: text}"),
        help="For similarity: a JSON file {label: sentence}. Default: the label itself is the sentence.",
        panel=DATA,
    )
    temperature: float = option(
        default=0.05,
        kind=Number(0.0, open_low=True),
        help="For similarity: class logits are cosine similarities divided by this (no unit).",
        panel=DATA,
    )
    template: str = option(
        default="{text} Topic:",
        kind=Template(),
        help="For prompt: what the model reads before the label's word. {text} stands for --text-column, any other {name} "
        "for the column of that name. Braces around anything but a name stay as they are.",
        panel=DATA,
    )
    verbalizers: Path | None = option(
        default=None,
        kind=File("a JSON file {label: text}"),
        help="For prompt: a JSON file {label: word}. Default: the label itself is the word.",
        panel=DATA,
    )
    space: bool = option(
        default=True,
        kind=Flag(),
        help="For prompt: one space between the template and the label's word, however they are written; --no-space for "
        "languages without spaces, and for a template that ends with a line break.",
        panel=DATA,
        flags=("--space/--no-space",),
    )
    max_length: int = option(
        default=64,
        kind=Integer(4),
        help="Longer texts are cut to this many tokens; for prompt, the template is counted in. The run says how many "
        "were cut, and what length they need.",
        panel=DATA,
    )
    cut: str | None = option(
        default=None,
        kind=Text(),
        help="The column whose text gives way where a row is longer than --max-length. Default: the longest texts of the "
        "row, down to the same number of tokens.",
        panel=DATA,
    )
    limit_train: int | None = option(
        default=None,
        kind=Integer(1),
        help="Train on this many texts at most, each label in its proportion. Default: all.",
        panel=DATA,
    )
    limit_eval: int | None = option(
        default=None,
        kind=Integer(1),
        help="Evaluate on this many texts at most, each label in its proportion. Default: all.",
        panel=DATA,
    )
    adapter: str | None = option(
        default=None,
        kind=Choice(tuple(adapters.KINDS)),
        help="Train an adapter of PEFT in place of the model, and save it alone. Default: the whole model is tuned, or, "
        "where --model is an adapter, that is trained on.",
        panel=ADAPTER,
    )
    adapter_rank: int | None = option(
        default=None, kind=Integer(1), help=f"The rank of the matrices. {adapters.defaults('rank')}", panel=ADAPTER
    )
    adapter_alpha: int | None = option(
        default=None,
        kind=Integer(1),
        help=f"What they add is times this over the rank. {adapters.defaults('alpha')}",
        panel=ADAPTER,
    )
    adapter_targets: str | None = option(
        default=None,
        kind=Text(),
        help="The modules that get them: names separated by commas, or all-linear. "
        f"For {adapters.owners('targets')}. Default: as PEFT chooses for the model; mostly queries and values.",
        panel=ADAPTER,
    )
    adapter_tokens: int | None = option(
        default=None,
        kind=Integer(1),
        help=f"Virtual tokens before each text; they take positions of the model's. {adapters.defaults('tokens')}",
        panel=ADAPTER,
    )
    method: str = option(
        default="mezo",
        kind=Choice(tuple(ENTRIES)),
        help="The zeroth-order method. " + "; ".join(f"{name}: {entry.about}" for name, entry in ENTRIES.items()) + ".",
    )
    num_dropped: int | None = option(
        default=None,
        kind=Integer(0),
        help="Blocks that a step leaves out, drawn anew each time, with any method: no pass touches them. Default: "
        "none; for lezo three quarters of the blocks, as published.",
        panel=METHOD,
    )
    steps: int = option(default=500, kind=Integer(1), help="Optimizer steps.")
    batch_size: int = option(
        default=16,
        kind=Integer(1),
        help="Texts a forward. With --parallel data, those of all ranks together: W ranks do what one process does with "
        "--accumulate W and a W-th of the texts.",
    )
    accumulate: int = option(
        default=1,
        kind=Integer(1),
        help="Batches a step, averaged under one perturbation: a larger batch in the same memory.",
        panel=SCHEDULE,
    )
    lr_schedule: str = option(
        default="linear",
        kind=Choice(("constant", "linear", "cosine")),
        help="Course of the learning rate after the warm-up; linear and cosine fall to 0 at the last step.",
        panel=SCHEDULE,
    )
    warmup_steps: int = option(
        default=0, kind=Integer(0), help="Steps over which the learning rate rises to --lr.", panel=SCHEDULE
    )
    eval_every: int = option(
        default=100, kind=Integer(0), help="Steps between evaluations; 0 for before and after only."
    )
    eval_batch_size: int = option(default=64, kind=Integer(1), help="Texts a forward in evaluations.", panel=EVALUATION)
    log_every: int = option(
        default=10,
        kind=Integer(1),
        help="Steps between lines of metrics.jsonl and updates of the display.",
        panel=EVALUATION,
    )
    output: Path = option(
        default=Path("zokern-out"),
        kind=Directory(),
        help="Directory for checkpoint/, metrics.jsonl, curves.png and run.json.",
    )
    force: bool = option(
        default=False,
        kind=Flag(),
        help="Replace an earlier run in a directory that is not empty. Its results stay until the new run is complete; "
        "other files stay for good.",
        panel=OUTPUT,
        flags=("--force",),
    )
    journal: bool = option(
        default=True,
        kind=Flag(),
        help="Write journal.zkj: some twenty bytes a step, from which `zokern replay` makes the tuned model again and "
        "--resume goes on.",
        panel=OUTPUT,
        flags=("--journal/--no-journal",),
    )
    device: str = option(
        default="auto", kind=Text(), help="cpu, cuda or cuda:N. auto is the first GPU, where there is one."
    )
    dtype: str = option(
        default="auto",
        kind=Choice(("auto", "float32", "bfloat16", "float16")),
        help="Number format of the weights. auto is float32 on a CPU and the checkpoint's own on a GPU.",
        panel=HARDWARE,
    )
    packing: str = option(
        default="auto",
        kind=Choice(("auto", "always", "never")),
        help="Whether the texts of a batch lie end to end, without padding, for similarity, prompt, choices and answer; of "
        "an encoder-decoder, whether a text is read once for all that may follow it. The losses are the same to rounding. "
        "auto: on a CPU, where the model is found to take it; the run says where not.",
        panel=HARDWARE,
    )
    threads: int | None = option(
        default=None, kind=Integer(1, 4096), help="CPU threads of torch. Default: as torch chooses.", panel=HARDWARE
    )

    if TYPE_CHECKING:  # those of the methods

        def __init__(self, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        """Paths may be given as strings."""
        self.output = Path(self.output)
        self.descriptions = None if self.descriptions is None else Path(self.descriptions)
        self.verbalizers = None if self.verbalizers is None else Path(self.verbalizers)

    def check(self) -> None:
        """Raise FinetuneError naming the option, its value and what is allowed, before anything is loaded."""
        self.check_each()
        _check_together(self)
        _check_data(self)
        from zokern.finetune import failures, former  # which need FinetuneError

        with failures.telling(f"--output {str(self.output)!r} cannot be used", "give another directory"):
            former.check(self.output, self.force)

    def check_stored(self) -> None:
        """The part of `check` that is needed where no new results are written: all but where they go."""
        self.check_each()
        _check_together(self)
        _check_data(self)

    def check_each(self) -> None:
        """The part of `check` that looks at one setting at a time."""
        for field in dataclasses.fields(type(self)):
            if (declared := field.metadata.get("setting")) is not None:
                _check(field.name, declared.kind, getattr(self, field.name), declared.default)
        for name in takers.TAKERS:
            if (value := getattr(self, name)) is not None:
                kind = takers.kind(name, self.method)
                if kind is None:
                    raise FinetuneError(
                        f"{flag(name)} is not a setting of --method {self.method}; it belongs to "
                        f"{', '.join(takers.methods(name))}"
                    )
                _check(name, kind, value, None)

    @classmethod
    def load(cls, directory: Path) -> Options:
        """The options of the run in a directory, for it to go on there."""
        from zokern.finetune import identity  # which needs this class

        return identity.load(directory).options

    def changed(self, name: str) -> bool:
        """Whether a setting has another value than its default."""
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)

    def as_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def _check(name: str, kind: Kind, value: Any, default: Any) -> None:
    if value is None and default is None:
        return
    try:
        kind.check(kind.parse(value), flag(name))
    except (TypeError, ValueError) as error:
        allowed = f"{flag(name)} is {value!r}; allowed: {kind.allowed}" if kind.allowed else str(error)
        raise FinetuneError(allowed) from error
    except OSError as error:  # a path that the system does not take, or does not let anybody look at
        raise FinetuneError(f"{flag(name)} is {str(value)!r}, which cannot be used ({error.strerror})") from error


def _check_together(options: Options) -> None:
    if said := adapters.wrong(options):
        raise FinetuneError(said)
    if options.pipelined and options.placement == "inplace":
        raise FinetuneError(
            "--pipelined writes perturbed weights into copies, and --placement inplace has none; "
            "take --placement shadow or stream"
        )
    if options.prefetch and options.placement not in ("auto", "stream"):
        raise FinetuneError(
            "--prefetch writes a block's perturbed weights while the block before runs, and --placement "
            f"{options.placement} does not go block by block; take --placement stream"
        )
    if options.scale == "released":
        if options.method in ("mezo", "lezo") and options.update != "adamezo":
            raise FinetuneError(
                f"--scale released is for --update adamezo; other updates of --method {options.method} have the released "
                "code's --lr already: leave --scale out"
            )
        if options.lr is None:
            raise FinetuneError(
                "--scale released needs --lr: the default is the paper's; give the released code's learning rate"
            )
    if options.warmup_steps > options.steps:
        raise FinetuneError(
            f"--warmup-steps is {options.warmup_steps}; allowed: at most --steps, which is {options.steps}"
        )
    if not (
        options.device in ("auto", "cpu", "cuda")
        or (options.device.startswith("cuda:") and options.device[5:].isdigit())
    ):
        raise FinetuneError(f"--device is {options.device!r}; allowed: auto, cpu, cuda, cuda:0, cuda:1, ...")
    if options.metric is not None:
        try:
            named(options.metric)
        except ValueError as error:
            raise FinetuneError(f"--metric: {error}") from error
    from zokern.finetune.embedded import TEXTS  # which needs FinetuneError

    if options.eval_data is not None and options.data in TEXTS and options.task is None:
        raise FinetuneError(
            f"--eval-data needs --data of a file or of the hub: the embedded {options.data} bring their own held-out "
            "sentences"
        )
    if options.eval_data in TEXTS:
        raise FinetuneError(
            f"--eval-data is {options.eval_data!r}, an embedded set, which is for --data alone; give a file, or a name of "
            "the hub"
        )


def _check_data(options: Options) -> None:
    for name in ("data", "eval_data"):
        value = getattr(options, name)
        if value is not None and names_a_file(value):
            try:
                found = Path(value).exists()
            except OSError as error:
                raise FinetuneError(f"{flag(name)} is {value!r}, which cannot be read ({error.strerror})") from error
            if not found:
                raise FinetuneError(f"{flag(name)} is {value!r}, which is not a file here ({Path.cwd()})")


def names_a_file(name: str) -> bool:
    """Whether --data is spelled as a file of texts."""
    return name.lower().removesuffix(".gz").endswith(FILES)


def flag(name: str) -> str:
    """The command-line spelling of a field: eval_every -> --eval-every."""
    return "--" + name.replace("_", "-")
