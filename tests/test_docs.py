"""Contract under test: what the pages in docs/ show runs as it is written, and comes out as they say."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "deltas.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "very", "film", "was", "plot", "bad", "good"]


def blocks(language):
    return [match[2] for match in FENCE.finditer(PAGE) if match[1] == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pre-trained model without a head in `base`, and tables of labelled sentences."""
    transformers = pytest.importorskip("transformers", minversion="5")
    for package in ("accelerate", "datasets", "rich", "typer"):
        pytest.importorskip(package)
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("docs")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder / "base")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)
        transformers.BertModel(config).save_pretrained(folder / "base")
        for name, rows in (("train", 96), ("test", 40)):
            picks = torch.randint(0, len(WORDS), (rows, 6)).tolist()
            lines = [" ".join(WORDS[i] for i in pick) for pick in picks]
            labels = ["yes" if sum(pick) > 33 else "no" for pick in picks]
            table = "".join(f"{line},{label}\n" for line, label in zip(lines, labels, strict=True))
            (folder / f"{name}.csv").write_text("text,label\n" + table)
    return folder


def weights(folder):
    return {
        name: tensor.view(torch.uint8) for name, tensor in load_file(folder / "model.safetensors").items()
    }


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_whole_path_on_the_command_line_gives_the_same_metric_to_the_last_digit(folder):
    """Each command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    said = []
    (script,) = blocks("sh")
    for line in script.splitlines():
        if not line or line.startswith("#"):
            continue
        program, *arguments = shlex.split(line)
        assert program == "sparse-optim"
        done = subprocess.run(
            [sys.executable, "-m", "sparse_optim", *arguments],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if "--json" in arguments:
            said.append(json.loads(done.stdout))
    results = json.loads((folder / "tuned" / "results.json").read_text())
    metrics = results["runs"]["topk"]["metrics"]
    assert len(said) == 2 and {"accuracy", "macro_f1", "loss"} <= metrics.keys()
    for each in said:
        assert {name: each["metrics"][name] for name in metrics} == metrics
    assert same(weights(folder / "tuned"), weights(folder / "elsewhere"))
    assert same(weights(folder / "base"), weights(folder / "again"))
    # something was learned, and little was changed
    assert not same(weights(folder / "tuned"), weights(folder / "base"))
    size = (folder / "task.safetensors").stat().st_size
    assert size < (folder / "tuned" / "model.safetensors").stat().st_size / 2


@pytest.mark.filterwarnings("ignore::Warning:(torch|transformers).*")
def test_the_snippets_run_one_after_the_other(folder, tmp_path, monkeypatch):
    from transformers import BertModel

    monkeypatch.chdir(tmp_path)

    def train(model):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.view(-1)[i::50] += 1

    model = BertModel.from_pretrained(folder / "base")
    other_model = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    train(other_model)
    names = {"model": model, "other_model": other_model, "train": train}
    for code in blocks("python"):
        exec(compile(code, "docs/deltas.md", "exec"), names)
    base = names["base"].state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in start.items())
    assert not all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in start.items())
    assert names["merged"].conflicts > 0


def test_every_path_that_the_page_links_to_is_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / path).exists(), path
