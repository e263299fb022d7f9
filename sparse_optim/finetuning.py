"""What the commands `finetune`, `mask` and `evaluate` share: tables, models, Trainer, metrics.

Needs transformers, accelerate and datasets. Weights are read from safetensors only, and no code that comes
with a model is run.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import inspect
import json
import math
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from sparse_optim import (
    ChildTuningAdamW,
    Delta,
    DPSAdamW,
    GradDropAdamW,
    MaskedAdamW,
    Schedule,
    SecondOrderAdamW,
    TopK,
    __version__,
    apply_delta,
    extract_delta,
    load_delta,
    param_groups,
    save_delta,
)
from sparse_optim.checkpoints import Kind, replacing, write_safetensors
from sparse_optim.integrations.transformers import SparseOptimCallback, trainer_optimizer

# of evaluation: another size pads other sentences together, and the last digits of a metric change
EVAL_BATCH = 16
# what the release of the second order method observes
RELEASED_BATCHES = 599
OBSERVES = ("topk", "child_tuning_d", "second_order")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """All that decides what a run computes; the commands document each field as an option."""

    model: str
    data: str
    task: str = "classification"
    text_column: str = "text"
    label_column: str = "label"
    eval_data: str | None = None
    eval_share: float | None = None
    method: str = "topk"
    fidelity: str = "paper"
    density: float | None = None
    keep: float | None = None
    observe_batches: int | None = None
    update_steps: int | None = None
    release_gradients: bool = False
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    lr: float = 5e-5
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 128
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        positive: dict[str, float | None] = {
            "epochs": self.epochs, "max_steps": self.max_steps, "batch_size": self.batch_size, "lr": self.lr,
            "max_length": self.max_length, "observe_batches": self.observe_batches,
            "update_steps": self.update_steps,
        }  # fmt: skip
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value!r}; give a larger number.")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)!r}; 0 switches it off.")
        if self.fidelity == "release" and self.method in ("topk", "grad_drop", "adamw"):
            raise ValueError(
                f"fidelity must be left out for {self.method}, got 'release'; no code was released for it."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed!r}; use any number in that range.")
        if self.eval_data is not None and self.eval_share is not None:
            raise ValueError(
                f"eval_share must be left out with eval_data, got {self.eval_share!r} and "
                f"{self.eval_data!r}; give one of them."
            )
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise ValueError(
                f"eval_share must be in (0, 1), got {self.eval_share!r}; 0.1 keeps a tenth for evaluation."
            )
        takes = {
            "density": (*OBSERVES, "dps"), "keep": ("child_tuning_f", "grad_drop"),
            "observe_batches": (*OBSERVES, "dps"), "update_steps": ("dps",),
        }  # fmt: skip
        for name, methods in takes.items():
            if getattr(self, name) is not None and self.method not in methods:
                raise ValueError(
                    f"{name} must be left out for {self.method}, got {getattr(self, name)!r}; it is for "
                    f"{', '.join(methods)}."
                )
        if self.method == "grad_drop" and self.keep is None:
            raise ValueError(
                "keep must be given for grad_drop, whose paper leaves it open, got none; 0.5 drops half."
            )
        if self.release_gradients and self.method not in OBSERVES:
            raise ValueError(
                f"release_gradients needs a method that trains a fixed list, got {self.method!r}; use one of "
                f"{', '.join(OBSERVES)}."
            )


# --- tables -----------------------------------------------------------------------------------------------


def read_table(source: str) -> Rows:
    """The rows of a csv, json, jsonl or parquet file, or of a data set on the Hugging Face hub.

    Files are read into memory, and nothing is left in a cache. A name on the hub may end in a colon and a
    split; without, it is that for training.

    Raises:
        ValueError: for a file that is missing, empty, broken or of another type, and an unknown name.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "data.csv")
        ...     _ = path.write_text("text,label\\ngood film,1\\n")
        ...     read_table(str(path))
        [{'text': 'good film', 'label': '1'}]
    """
    path = Path(source)
    kind = path.suffix.lower()
    readers = {".csv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
    if not path.exists() and kind not in readers:
        return _from_hub(source)
    if not path.is_file():
        raise ValueError(f"data must be a file that exists, got {source!r}; check the path.")
    if kind not in readers:
        raise ValueError(
            f"data must be a file of type {', '.join(readers)}, got {source!r}; convert it to one of them."
        )
    try:
        rows = readers[kind](path)
    except (ValueError, csv.Error, OSError) as error:
        raise ValueError(
            f"data must be a readable {kind} file, got {source!r} ({_first_line(error)}); mend it."
        ) from error
    if not rows:
        raise ValueError(f"data must have at least one row, got {source!r} without any; give another file.")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"data must have rows with named columns, got {source!r} with others; write objects such as "
            '{"text": "a sentence", "label": 1}.'
        )
    return rows


def _csv(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file, strict=True))


def _json(path: Path) -> Rows:
    found = json.loads(path.read_text("utf-8") or "[]")
    return found if isinstance(found, list) else [found]


def _jsonl(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet

    rows: Rows = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def _from_hub(source: str) -> Rows:
    name, _, split = source.partition(":")
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise ValueError(
            "data must be a .csv, .json, .jsonl or .parquet file or a data set on the hub, got "
            f"{source!r} ({_first_line(error)}); give the path of a file, or a name that can be reached."
        ) from error
    features = table.features
    # the names of classes, where the data set has them
    named = {key: f.int2str for key, f in features.items() if isinstance(f, datasets.ClassLabel)}
    return [{k: named[k](v) if k in named and v >= 0 else v for k, v in row.items()} for row in table]


def column(rows: Rows, name: str, option: str, source: str) -> list[str]:
    """One column as text; whole numbers are written without a point.

    Raises:
        ValueError: where it is missing, or in a row empty, a list or an object.
    """
    if not any(name in row for row in rows):
        listed = ", ".join(repr(str(key)) for key in rows[0]) or "none"
        raise ValueError(f"{option} must be a column of {source!r}, got {name!r}; it has {listed}.")
    values = [row.get(name) for row in rows]
    for number, value in enumerate(values, 1):
        if isinstance(value, list | dict):
            raise ValueError(
                f"{name!r} must be text or a number, got a {type(value).__name__} in row {number} of "
                f"{source!r}; write it as one text."
            )
        # missing values of other programs are no numbers
        if value is None or value != value or not str(value).strip():
            raise ValueError(
                f"{name!r} must not be empty, got nothing in row {number} of {source!r}; fill it, or leave "
                "the row out."
            )
    return [str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values]


def split(texts: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Which rows train, and which evaluate: equal texts are never on both sides.

    Raises:
        ValueError: where one side would be empty.

    Example:
        >>> train, held_out = split(["a", "b", "b", "c", "a", "d"], 0.5, seed=0)
        >>> len({"abbcad"[i] for i in train} & {"abbcad"[i] for i in held_out})
        0
    """
    distinct = list(dict.fromkeys(texts))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {distinct[i] for i in order[: round(share * len(distinct))]}
    if not 0 < len(held_out) < len(distinct):
        raise ValueError(
            f"eval_share must leave texts on both sides, got {share!r} of {len(distinct)} different ones; "
            "give another share, or a file with eval_data."
        )
    sides: tuple[list[int], list[int]] = ([], [])
    for i, text in enumerate(texts):
        sides[text in held_out].append(i)
    return sides


class Corpus(NamedTuple):
    """Texts, and their labels where there are any."""

    texts: list[str]
    labels: list[str] | None


def read_corpus(recipe: Recipe, source: str) -> Corpus:
    """What the recipe needs of a table."""
    rows = read_table(source)
    texts = column(rows, recipe.text_column, "text_column", source)
    if recipe.task == "causal-lm":
        return Corpus(texts, None)
    return Corpus(texts, column(rows, recipe.label_column, "label_column", source))


def read_both(recipe: Recipe) -> tuple[Corpus, Corpus]:
    """What trains, and what evaluates."""
    data = read_corpus(recipe, recipe.data)
    if recipe.eval_data is None:
        sides = split(data.texts, 0.1 if recipe.eval_share is None else recipe.eval_share, recipe.seed)
        train, held_out = (
            Corpus([data.texts[i] for i in s], data.labels and [data.labels[i] for i in s]) for s in sides
        )
        return train, held_out
    paths = Path(recipe.data), Path(recipe.eval_data)
    if recipe.data == recipe.eval_data or (all(p.exists() for p in paths) and paths[0].samefile(paths[1])):
        raise ValueError(
            f"eval_data must not be what is trained, got {recipe.eval_data!r} for both; give another file, "
            "or eval_share."
        )
    held_out = read_corpus(recipe, recipe.eval_data)
    shared = len(set(data.texts) & set(held_out.texts))
    if shared:
        note(f"{shared} of the texts of {recipe.eval_data!r} are trained as well: metrics may be too good.")
    return data, held_out


# --- models -----------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """A model as it was read, and what goes with it."""

    model: Any
    tokenizer: Any
    # names of parameters that the checkpoint does not have
    fresh: list[str]


def label_names(config: Any, found: Sequence[str] | None) -> list[str]:
    """The classes in the order of the model's outputs: its own where it has a head that knows all of them.

    Args:
        config: of the model.
        found: the classes that occur; None: those that the model knows.
    """
    own = [_bare(config.id2label[i]) for i in range(config.num_labels)]
    has_head = any("ForSequenceClassification" in name for name in config.architectures or ())
    if found is None or (has_head and set(found) <= set(own)):
        return own
    if len(set(found)) < 2:
        raise ValueError(
            f"labels must be of two classes or more, got {found[0]!r} alone; give data with others."
        )
    return sorted(set(found), key=lambda name: (0, int(name), name) if _is_int(name) else (1, 0, name))


def load(name: str, task: str, *, labels: Sequence[str] | None, seed: int, dtype: str | None) -> Loaded:
    """A model and its tokenizer; a fresh head is drawn from `seed` alone, before anything else draws.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        task: "classification" or "causal-lm".
        labels: the classes that occur; None: those that the model knows.

    Raises:
        ValueError: for classes that are no choice, and for a model that cannot be loaded from safetensors.
    """
    if Path(name).is_file():
        # of which transformers would unpickle the weights
        raise ValueError(
            f"model must be a folder or a name on the hub, got the file {name!r}; name its folder."
        )
    given: Any = {"trust_remote_code": False}
    with _loading(name):
        config = AutoConfig.from_pretrained(name, **given)
        tokenizer = AutoTokenizer.from_pretrained(name, **given)
    kind: Any = AutoModelForCausalLM
    if task == "classification":
        kind = AutoModelForSequenceClassification
        names = label_names(config, labels)
        given["problem_type"] = "single_label_classification"
        given["id2label"] = dict(enumerate(names))
        given["label2id"] = {label: i for i, label in enumerate(names)}
    with _loading(name):
        set_seed(seed)
        model, loading = kind.from_pretrained(
            name, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            dtype="auto" if dtype is None else getattr(torch, dtype), **given,
        )  # fmt: skip
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model must have a tokenizer that can pad, got {name!r} without a pad or end token; set "
                "pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    # names alone, or names with both shapes
    mismatched = [key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]]
    fresh = {*loading["missing_keys"], *mismatched}
    parameters = [key for key, _ in model.named_parameters()]
    return Loaded(model, tokenizer, [key for key in parameters if key in fresh])


def load_base(recipe: Recipe, delta: Delta | None, labels: Sequence[str] | None) -> Loaded:
    """The model that a delta is for, with the head that it has after it."""
    names = delta.config["tuned"].get("id2label") if delta is not None and delta.config else None
    if names and recipe.task == "classification":
        labels = [_bare(label) for label in names.values()]
    return load(recipe.model, recipe.task, labels=labels, seed=recipe.seed, dtype=recipe.dtype)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"model must be a folder or a name on the hub, with weights in safetensors, got {name!r} "
            f"({_first_line(error)}); give the path of such a folder."
        ) from error


def encode(loaded: Loaded, corpus: Corpus, max_length: int, source: str) -> list[dict[str, Any]]:
    """Token ids, cut to `max_length`, with the number of each label.

    Raises:
        ValueError: for a label that the model does not have, and texts without a token.
    """
    model, tokenizer, _ = loaded
    positions = getattr(model.config, "max_position_embeddings", max_length)
    limit = min(max_length, tokenizer.model_max_length, positions)
    if corpus.labels is None:
        # a text may be shorter than it was written, but it ends
        encoded = tokenizer(corpus.texts, truncation=True, max_length=limit - 1)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [row if row[-1:] == end else row + end for row in encoded["input_ids"]]
        examples: list[dict[str, Any]] = [{"input_ids": row} for row in ids if len(row) > 1]
        if len(examples) < len(ids):
            note(f"{len(ids) - len(examples)} texts of {source!r} have less than two tokens: left out.")
        if not examples:
            raise ValueError(
                f"texts must have two tokens or more, got {source!r} without one; give a longer max_length, "
                "or another file."
            )
        return examples
    known = {str(label): number for number, label in model.config.id2label.items()}
    unknown = sorted(set(corpus.labels) - known.keys())
    if unknown:
        raise ValueError(
            f"labels of {source!r} must be among {', '.join(map(repr, known))}, got {unknown[0]!r}; train "
            "on data that has it, or leave its rows out."
        )
    encoded = tokenizer(corpus.texts, truncation=True, max_length=limit)
    taken = [key for key in encoded if key != "token_type_ids" or _takes(model, key)]
    empty = next((i for i, row in enumerate(encoded["input_ids"]) if not row), None)
    if empty is not None:
        raise ValueError(
            f"texts must have tokens, got none in row {empty + 1} of {source!r}; leave the row out."
        )
    return [
        {key: encoded[key][i] for key in taken} | {"labels": known[label]}
        for i, label in enumerate(corpus.labels)
    ]


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


class Collate:
    """Pads examples to the longest; of a language model the labels are the tokens."""

    def __init__(self, tokenizer: Any, task: str) -> None:
        self._pad, self._task = DataCollatorWithPadding(tokenizer), task

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        batch = self._pad(list(examples))
        if self._task == "causal-lm":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch


# --- metrics ----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: Any, examples: Sequence[dict[str, Any]], collate: Collate, task: str, *, bar: bool
) -> dict[str, float | None]:
    """Metrics of a model, always in the same batches: a model that was saved and read has the same digits.

    Of a classifier loss (the mean over examples), accuracy and macro-F1 (over the classes that occur or are
    predicted); of a language model loss (the mean over tokens) and perplexity.
    """
    was, device = model.training, next(model.parameters()).device
    model.eval()
    loss, count = 0.0, 0
    wanted: list[int] = []
    predicted: list[int] = []
    for start in tqdm(range(0, len(examples), EVAL_BATCH), desc="evaluating", disable=not bar, delay=2):
        batch = {
            key: value.to(device) for key, value in collate(examples[start : start + EVAL_BATCH]).items()
        }
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if task == "causal-lm":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss += float(nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
        count += int((labels >= 0).sum())
        if task == "classification":
            wanted += labels.tolist()
            predicted += logits.argmax(-1).tolist()
    model.train(was)
    loss /= count
    if task == "causal-lm":
        return {"loss": _finite(loss), "perplexity": _finite(math.exp(min(loss, 700.0)))}
    right = sum(w == p for w, p in zip(wanted, predicted, strict=True))
    return {"accuracy": right / count, "macro_f1": macro_f1(wanted, predicted), "loss": _finite(loss)}


def macro_f1(wanted: Sequence[int], predicted: Sequence[int]) -> float:
    """The mean F1 of the classes that occur or are predicted.

    Example:
        >>> macro_f1([0, 0, 1], [0, 1, 1])
        0.6666666666666666
    """
    hits = Counter(w for w, p in zip(wanted, predicted, strict=True) if w == p)
    occurs, said = Counter(wanted), Counter(predicted)
    classes = occurs.keys() | said.keys()
    return sum(2 * hits[c] / (occurs[c] + said[c]) for c in sorted(classes)) / len(classes)


# --- optimizers and Trainer -------------------------------------------------------------------------------


def make_trainer(
    recipe: Recipe, loaded: Loaded, examples: Sequence[dict[str, Any]], folder: Path, *, bar: bool,
    save_steps: int | None = None, saves: bool = False, observe_only: bool = False,
) -> tuple[Trainer, SparseOptimCallback | None, _Clock]:  # fmt: skip
    """Trainer with the optimizer of the recipe, and the callbacks that it needs."""
    per_epoch = -(-len(examples) // recipe.batch_size)
    steps = math.ceil(per_epoch * recipe.epochs) if recipe.max_steps is None else recipe.max_steps
    args = TrainingArguments(
        str(folder), num_train_epochs=recipe.epochs, max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size, learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay, seed=recipe.seed, report_to="none", disable_tqdm=not bar,
        # released gradients are clipped by the optimizer
        max_grad_norm=0.0 if recipe.release_gradients else recipe.max_grad_norm,
        logging_steps=max(1, steps // 20), logging_first_step=True, remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(), save_total_limit=1,
        save_strategy="no" if not saves else "epoch" if save_steps is None else "steps",
        save_steps=save_steps or 500,
    )  # fmt: skip
    more: dict[str, Any] = {}
    if recipe.method != "adamw":
        more["optimizer_cls_and_kwargs"] = _optimizer(recipe, loaded, args, steps, observe_only)
    trainer = Trainer(
        loaded.model, args, train_dataset=examples, data_collator=Collate(loaded.tokenizer, recipe.task),
        **more,
    )  # fmt: skip
    clock = _Clock()
    trainer.add_callback(clock)
    if recipe.method == "adamw":
        return trainer, None, clock
    ours = SparseOptimCallback(trainer, observe_batches=_observed(recipe, per_epoch, observe_only))
    trainer.add_callback(ours)
    return trainer, ours, clock


def _observed(recipe: Recipe, batches: int, observe_only: bool) -> int | None:
    """How many batches are observed before training; None: all of them, once."""
    if recipe.method not in OBSERVES and not observe_only:
        if recipe.observe_batches is not None:
            raise ValueError(
                "observe_batches must be left out for dps, which observes while it trains, got "
                f"{recipe.observe_batches!r}; give update_steps, which is the length of a stage."
            )
        return None
    if recipe.observe_batches is None:
        everything = recipe.method == "child_tuning_d" or recipe.density == 1
        return None if everything else min(RELEASED_BATCHES, batches)
    return recipe.observe_batches


def _optimizer(
    recipe: Recipe, loaded: Loaded, args: TrainingArguments, steps: int, observe_only: bool
) -> tuple[Any, dict[str, Any]]:
    """What Trainer takes: the method with the defaults of its paper, or of its release."""
    options: dict[str, Any] = {}
    if recipe.release_gradients:
        options = {"release_gradients": True, "max_grad_norm": recipe.max_grad_norm or None}
    share: dict[str, Any] = {} if recipe.density is None else {"density": recipe.density}
    if recipe.method == "topk" or observe_only:
        policy = TopK(0.01 if recipe.density is None else recipe.density)
        groups = param_groups(loaded.model, exempt=[_only(name) for name in loaded.fresh])
        if recipe.method != "topk":
            # what it selects by, and what it exempts, without its stages
            made = _example(recipe, share)
            policy = replace(made.policy, schedule=Schedule())
            groups = param_groups(loaded.model, method=recipe.method, fidelity=_fidelity(recipe))
        exempt = [_only(name) for group in groups if not group["masked"] for name, _ in group["params"]]
        return trainer_optimizer(MaskedAdamW, args, exempt=exempt, policy=policy, **options)
    if recipe.method == "child_tuning_f":
        return trainer_optimizer(
            ChildTuningAdamW, args, variant="F", keep=recipe.keep, fidelity=recipe.fidelity
        )
    if recipe.method == "child_tuning_d":
        return trainer_optimizer(
            ChildTuningAdamW, args, variant="D", observe_steps=None, fidelity=recipe.fidelity, **share,
            **options,
        )  # fmt: skip
    if recipe.method == "dps":
        # the released scripts' share of a run
        stage = recipe.update_steps or max(1, int(0.05 * steps))
        return trainer_optimizer(
            DPSAdamW, args, variant="dense", update_steps=stage, fidelity=recipe.fidelity, **share
        )
    if recipe.method == "second_order":
        return trainer_optimizer(
            SecondOrderAdamW, args, observe_steps=None, fidelity=recipe.fidelity, **share, **options
        )
    return trainer_optimizer(GradDropAdamW, args, keep=recipe.keep)


def _example(recipe: Recipe, share: dict[str, Any]) -> Any:
    """The method's optimizer on nothing of interest: its policy is what is wanted."""
    params, fidelity = [nn.Parameter(torch.zeros(1))], _fidelity(recipe)
    if recipe.method == "child_tuning_d":
        return ChildTuningAdamW(params, variant="D", observe_steps=None, fidelity=fidelity, **share)
    if recipe.method == "second_order":
        return SecondOrderAdamW(params, observe_steps=None, fidelity=fidelity, **share)
    return DPSAdamW(params, variant="dense", update_steps=1, fidelity=fidelity, **share)


def _fidelity(recipe: Recipe) -> Any:
    return recipe.fidelity


def _only(name: str) -> str:
    return rf"^{re.escape(name)}$"


class _Clock(TrainerCallback):
    """Seconds of steps, and what the optimizer holds after the last."""

    def __init__(self) -> None:
        self._began = 0.0
        self._steps: dict[bool, list[float]] = {False: [], True: []}
        self.optimizer_bytes = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """What Trainer calls before a step."""
        self._began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What Trainer calls after a step; those that are logged measure norms, too."""
        self._steps[control.should_log].append(self._now() - self._began)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """What Trainer calls after the last step."""
        values = [v for state in kwargs["optimizer"].state.values() for v in state.values()]
        self.optimizer_bytes = sum(v.nbytes for v in values if isinstance(v, Tensor))

    def seconds_per_step(self) -> float | None:
        """The median of the steps that were not logged, or of all where there are no others."""
        steps = self._steps[False] or self._steps[True]
        return statistics.median(steps) if steps else None

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


# --- what the commands do ---------------------------------------------------------------------------------


def observe(recipe: Recipe, *, bar: bool) -> tuple[dict[str, Tensor], Any]:
    """What `finetune` would train after the same batches: bool masks by name, in the parameters' shapes.

    The model comes with them; nothing in it has moved.
    """
    data = read_corpus(recipe, recipe.data)
    loaded = load(recipe.model, recipe.task, labels=data.labels, seed=recipe.seed, dtype=recipe.dtype)
    examples = encode(loaded, data, recipe.max_length, recipe.data)
    with tempfile.TemporaryDirectory() as folder:
        trainer, ours, _ = make_trainer(recipe, loaded, examples, Path(folder), bar=bar, observe_only=True)
        assert ours is not None
        optimizer: Any = trainer.create_optimizer()
        ours.on_train_begin(
            trainer.args, trainer.state, trainer.control, train_dataloader=trainer.get_train_dataloader()
        )
    masks = {
        name: optimizer.mask(p, upcoming=True).cpu()
        for name, p in loaded.model.named_parameters()
        if p.requires_grad
    }
    return masks, loaded.model


def save_masks(masks: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write bool masks as safetensors, in whichever form is smaller for each parameter.

    `<name>.indices` are the flat indices of what is selected, ascending: [nnz] int32, or int64 when the
    parameter has more than 2**31 - 1 entries. `<name>.bits` has one bit an entry, lowest bit first, uint8.
    The metadata holds the shapes, as JSON.
    """
    tensors: dict[str, Tensor] = {}
    for name, mask in masks.items():
        flat = mask.flatten()
        indices = flat.nonzero().flatten().to(torch.int32 if flat.numel() < 1 << 31 else torch.int64)
        if indices.nbytes <= -(-flat.numel() // 8):
            tensors[f"{name}.indices"] = indices
        else:
            tensors[f"{name}.bits"] = torch.from_numpy(numpy.packbits(flat.numpy(), bitorder="little"))
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {name: Kind(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing(path) as file:
        write_safetensors(file, kinds, tensors.__getitem__, {**metadata, "shapes": shapes})


class Run(NamedTuple):
    """A run that is over."""

    model: Any
    start: Any  # as it was loaded
    tokenizer: Any
    fresh: list[str]
    record: dict[str, Any]

    def changed(self) -> dict[str, Tensor]:
        """Which entries of each parameter have other values than at the start."""
        before = dict(self.start.named_parameters())
        return {name: before[name] != p.detach().cpu() for name, p in self.model.named_parameters()}


def finetune(
    recipe: Recipe, data: tuple[Corpus, Corpus], folder: Path | None, *, bar: bool, resume: bool = False,
    save_steps: int | None = None,
) -> Run:  # fmt: skip
    """Train by a recipe, and evaluate; checkpoints go to `folder`, and nowhere without one."""
    train, held_out = data
    loaded = load(recipe.model, recipe.task, labels=train.labels, seed=recipe.seed, dtype=recipe.dtype)
    start = copy.deepcopy(loaded.model)
    examples = encode(loaded, train, recipe.max_length, recipe.data)
    others = encode(loaded, held_out, recipe.max_length, recipe.eval_data or recipe.data)
    with contextlib.ExitStack() as stack:
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainer, _, clock = make_trainer(
            recipe, loaded, examples, where, bar=bar, save_steps=save_steps, saves=folder is not None
        )
        if folder is not None:
            keep_recipe(recipe, folder, resume=resume)
        trainer.train(resume_from_checkpoint=resume or None)
    log = trainer.state.log_history
    seconds = clock.seconds_per_step()
    record = {
        "metrics": evaluate(
            loaded.model, others, Collate(loaded.tokenizer, recipe.task), recipe.task, bar=bar
        ),
        "steps": trainer.state.global_step,
        "seconds_per_step": seconds,
        "optimizer_bytes": clock.optimizer_bytes,
        "losses": [[entry["step"], _finite(float(entry["loss"]))] for entry in log if "loss" in entry],
        "train_rows": len(examples),
        "eval_rows": len(others),
    }
    run = Run(loaded.model, start, loaded.tokenizer, loaded.fresh, record)
    changed = run.changed().values()
    record["share_changed"] = sum(int(c.sum()) for c in changed) / sum(c.numel() for c in changed)
    return run


def save_model(run: Run, folder: Path) -> None:
    """What `from_pretrained` reads: weights, config and tokenizer."""
    run.model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def save_difference(run: Run, recipe: Recipe, path: Path) -> None:
    """A delta from the model as it was loaded; what its checkpoint did not have, a fresh head, is whole."""
    base = {name: t for name, t in run.start.state_dict().items() if name not in run.fresh}
    name = Path(recipe.model).resolve().name if Path(recipe.model).exists() else recipe.model
    delta = extract_delta(base, run.model, base_model=name)
    run.model.config.architectures = [type(run.model).__name__]
    config = json.loads(Path(str(cached_file(recipe.model, "config.json"))).read_text("utf-8"))
    configs = {"base": config, "tuned": json.loads(run.model.config.to_json_string())}
    path.parent.mkdir(parents=True, exist_ok=True)
    # a checkpoint of the body alone has names without it
    prefix = f"{run.model.base_model_prefix}." if run.fresh else ""
    save_delta(replace(delta, config=configs, prefix=prefix), path)


def evaluate_saved(recipe: Recipe, delta_file: Path | None, *, bar: bool) -> dict[str, Any]:
    """Metrics of a saved model, or of a base with a delta, which is applied in memory.

    Raises:
        ValueError: for a model without a trained head, and for a delta of another model.
    """
    data = read_corpus(recipe, recipe.data)
    delta = None if delta_file is None else load_delta(delta_file)
    loaded = load_base(recipe, delta, None if delta is None else data.labels)
    known = () if delta is None else {*delta.tensors, *delta.aliases}
    untrained = [name for name in loaded.fresh if name not in known]
    if untrained:
        raise ValueError(
            f"model must have been trained for {recipe.task}, got {recipe.model!r} without "
            f"{untrained[0]!r}; give what finetune saved, or a delta of this task."
        )
    if delta is not None:
        apply_delta(loaded.model, delta)
    examples = encode(loaded, data, recipe.max_length, recipe.data)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    metrics = evaluate(loaded.model, examples, Collate(loaded.tokenizer, recipe.task), recipe.task, bar=bar)
    return {"metrics": metrics, "rows": len(examples)}


def keep_recipe(recipe: Recipe, folder: Path, *, resume: bool) -> None:
    """Write the recipe beside the checkpoints, or compare it with the one that made them.

    Raises:
        ValueError: for a resumed run that would be another.
    """
    path, mine = folder / "recipe.json", asdict(recipe)
    if resume and path.is_file():
        made = json.loads(path.read_text("utf-8"))
        for name, value in mine.items():
            if name in made and made[name] != value:
                raise ValueError(
                    f"{name} must be {made[name]!r}, as in the run that is resumed, got {value!r}; give the "
                    "same options, or another output without resume."
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write_text(json.dumps(mine, indent=2) + "\n")


def as_adamw(recipe: Recipe) -> Recipe:
    """The same start, the same batches, and torch's AdamW."""
    return replace(
        recipe, method="adamw", fidelity="paper", density=None, keep=None, observe_batches=None,
        update_steps=None, release_gradients=False,
    )  # fmt: skip


def document(recipe: Recipe, runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What `results.json` holds: the whole configuration, versions, and what came out of each run."""
    packages = ("torch", "transformers", "accelerate", "datasets", "safetensors")
    versions = {"sparse_optim": __version__, "python": platform.python_version()}
    return {
        "configuration": asdict(recipe),
        "versions": versions | {package: version(package) for package in packages},
        "runs": dict(runs),
    }


def hide_bars() -> None:
    """No progress of reading weights and data, either."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()


def note(sentence: str) -> None:
    """What the user should know, beside what the program prints."""
    print(sentence, file=sys.stderr)


def _finite(value: float) -> float | None:
    # JSON has no other numbers
    return value if math.isfinite(value) else None


def _bare(label: Any) -> str:
    """The number that transformers calls a class by that has no name."""
    return str(label).removeprefix("LABEL_")


def _is_int(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name) is not None


def _first_line(error: BaseException) -> str:
    """What fits into a sentence."""
    return re.split(r"[.;] ", " ".join(str(error).split()))[0].rstrip(".")[:160] or type(error).__name__
