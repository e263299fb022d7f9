"""Contract under test: `sparse-optim finetune`, `mask` and `evaluate` train what they say, report the same
digits for the same model, seed and data, go on from a checkpoint as if never stopped, and print results to
stdout and nothing else; wrong input is one sentence and exit status 2.
"""

# the fixtures of test_examples.py are imported by name
# ruff: noqa: F811
import copy
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

for package in ("rich", "typer", "transformers", "accelerate", "datasets", "tokenizers"):
    pytest.importorskip(package)

import datasets  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_examples import files, offline  # noqa: E402, F401
from typer.testing import CliRunner  # noqa: E402

from sparse_optim import finetuning, load_delta  # noqa: E402
from sparse_optim.cli import app  # noqa: E402

# torch looks up, once, which functions a device context redirects; within a test these are not torch's own
with torch.device("meta"):
    torch.empty(1)

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.usefixtures("quiet_logs"),
    pytest.mark.filterwarnings("ignore::Warning:(torch|transformers|accelerate).*"),
    # 1 % of so few entries may be none of the norms and biases
    pytest.mark.filterwarnings("ignore:nothing was selected in parameter group:UserWarning"),
]
ENTRIES = 5554  # of the classifier


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments):
    """The one document on stdout."""
    done = call(*arguments, "--json")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments):
    """The one sentence on stderr."""
    done = call(*arguments)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def encoder(files):
    """A model without a head, which a classifier gets."""
    folder = files / "encoder"
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = transformers.DistilBertConfig.from_pretrained(files / "classifier")
        transformers.DistilBertModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(files / "classifier").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def held_out(files):
    """Sentences that are not in few.jsonl."""
    rows = (files / "many.jsonl").read_text().splitlines()
    few = set((files / "few.jsonl").read_text().splitlines())
    path = files / "held_out.jsonl"
    path.write_text("\n".join([row for row in rows if row not in few][:50]))
    return path


@pytest.fixture(scope="module")
def named(files):
    """few.jsonl with words for labels, in a csv file."""
    rows = [json.loads(row) for row in (files / "few.jsonl").read_text().splitlines()]
    path = files / "named.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([row["text"], ["dull", "fine", "great"][i % 3]] for i, row in enumerate(rows))
    return path


def without_times(document):
    """A document without what a clock says."""
    document = copy.deepcopy(document)
    for run in document["runs"].values():
        assert run.pop("seconds_per_step") is None or True
    return document


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- finetune and evaluate --------------------------------------------------------------------------------

# with the share of the 5,554 entries that it may change: nothing is fresh here, but the head counts as such
HEAD = (272 + 34) / ENTRIES
METHODS = {
    "topk": (("--density", "0.1"), 0.1),
    "child_tuning_f": (("--keep", "0.5"), 1),
    "child_tuning_d": (("--density", "0.1"), 0.1 + HEAD),
    "dps": (("--update-steps", "2"), 1),
    "second_order": (("--density", "0.1", "--observe-batches", "2"), 0.1 + HEAD),
    "grad_drop": (("--keep", "0.5"), 1),
    "adamw": ((), 1),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_its_share_and_what_it_saves_has_the_metrics_that_it_reports(
    method, files, held_out, tmp_path
):
    options, most = METHODS[method]
    found = answer(
        "finetune", files / "classifier", files / "few.jsonl", "--method", method, *options, "--max-steps", 5,
        "--lr", 0.01, "--eval-data", held_out, "--output", "out", "--delta", "delta.safetensors",
    )  # fmt: skip
    run = found["runs"][method]
    assert (run["steps"], run["train_rows"], run["eval_rows"]) == (5, 40, 50)
    assert [step for step, _ in run["losses"]] == [1, 2, 3, 4, 5]
    assert 0.6 * most < run["share_changed"] <= most
    assert run["optimizer_bytes"] > 8 * run["share_changed"] * ENTRIES
    assert run["seconds_per_step"] > 0
    assert json.loads(Path("out/results.json").read_text()) == found
    # the model, and the base with the delta
    saved = answer("evaluate", "out", held_out)
    assert saved == {"metrics": run["metrics"], "rows": 50}
    assert answer("evaluate", files / "classifier", held_out, "--delta", "delta.safetensors") == saved
    assert answer("evaluate", files / "classifier", held_out) != saved
    changed = load_delta("delta.safetensors").info()["changed"]
    assert changed / ENTRIES == pytest.approx(run["share_changed"], abs=2 / ENTRIES)


def test_the_folder_is_that_of_a_model_with_its_tokenizer_and_its_labels(encoder, named, tmp_path):
    answer("finetune", encoder, named, "--max-steps", 2, "--output", "out")
    classify = transformers.pipeline("text-classification", "out", device="cpu")
    assert classify.model.config.id2label == {0: "dull", 1: "fine", 2: "great"}
    assert classify("the cat sat")[0]["label"] in {"dull", "fine", "great"}
    assert not (tmp_path / "cache").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_delta_brings_a_fresh_head_and_its_labels(encoder, named):
    found = answer(
        "finetune", encoder, named, "--max-steps", 3, "--lr", 0.01, "--output", "out",
        "--delta", "d.safetensors",
    )  # fmt: skip
    delta = load_delta("d.safetensors")
    whole = {name for name, part in delta.tensors.items() if part.indices is None}
    head = {f"{layer}.{part}" for layer in ("pre_classifier", "classifier") for part in ("weight", "bias")}
    assert whole == head
    # of data that has two of the three labels, in another order
    rows = list(csv.DictReader(named.read_text().splitlines()))
    few = [row for row in rows if row["label"] != "fine"][::-1]
    Path("few.json").write_text(json.dumps(few))
    saved = answer("evaluate", "out", "few.json")
    # and a folder of its own, config included
    answer("delta", "apply", encoder, "d.safetensors", "-o", "applied")
    assert answer("evaluate", "applied", "few.json") == saved
    assert answer("evaluate", encoder, "few.json", "--delta", "d.safetensors") == saved
    assert found["runs"]["topk"]["metrics"].keys() == saved["metrics"].keys()


def test_a_head_that_knows_the_labels_keeps_its_order(files, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(files / "classifier")
    model.config.id2label, model.config.label2id = {0: "b", 1: "a"}, {"b": 0, "a": 1}
    model.save_pretrained("named")
    transformers.AutoTokenizer.from_pretrained(files / "classifier").save_pretrained("named")
    rows = [json.loads(row) for row in (files / "few.jsonl").read_text().splitlines()]
    Path("d.json").write_text(json.dumps([{**row, "label": "ba"[row["label"]]} for row in rows]))
    options = ("--max-steps", 2, "--output", "out", "--delta", "d.safetensors")
    answer("finetune", "named", "d.json", *options)
    assert json.loads(Path("out/config.json").read_text())["id2label"] == {"0": "b", "1": "a"}
    metrics = answer("evaluate", "out", "d.json")["metrics"]
    assert answer("evaluate", "named", "d.json", "--delta", "d.safetensors")["metrics"] == metrics
    # the same weights and classes by number
    model = transformers.AutoModelForSequenceClassification.from_pretrained("out", num_labels=2)
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    model.save_pretrained("out")
    assert answer("evaluate", "out", files / "few.jsonl")["metrics"] == metrics


def test_a_fresh_head_trains_densely_beside_a_selection(encoder, named):
    found = answer("finetune", encoder, named, "--max-steps", 2, "--lr", 0.01, "--output", "out")
    head = 272 + 3 * 17
    body = ENTRIES - 306
    expected = (int(0.01 * body) + head) / (body + head)
    assert 0.9 * expected < found["runs"]["topk"]["share_changed"] <= expected


def test_two_processes_with_one_seed_draw_the_same_head_and_train_to_the_same_bits(encoder, named, tmp_path):
    options = ("finetune", encoder, named, "--max-steps", "3", "--method", "child_tuning_f", "--lr", "0.01")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sparse_optim", *map(str, options), "--output", "there", "--json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.rand(1234)  # what was drawn before does not matter
    here = answer(*options, "--output", "here")
    assert without_times(json.loads(done.stdout)) == without_times(here)
    same(weights("here"), weights("there"))
    answer(*options, "--output", "other", "--seed", "1")
    assert not torch.equal(weights("here")["classifier.weight"], weights("other")["classifier.weight"])


def test_the_comparison_has_the_same_start_and_the_same_batches(encoder, named, files):
    options = ("--max-steps", 6, "--compare", "adamw", "--lr", 0.01)
    found = answer("finetune", encoder, named, "--density", 1, *options)["runs"]
    # everything selected is AdamW, step for step
    torch.testing.assert_close(torch.tensor(found["topk"]["losses"]), torch.tensor(found["adamw"]["losses"]))
    few = answer("finetune", files / "classifier", files / "few.jsonl", "--density", 0.1, *options)["runs"]
    assert few["topk"]["losses"][0] == few["adamw"]["losses"][0]
    assert few["topk"]["losses"][-1] != few["adamw"]["losses"][-1]
    assert 5 * few["topk"]["optimizer_bytes"] < few["adamw"]["optimizer_bytes"]
    assert few["adamw"]["share_changed"] > 0.9


def test_the_table_has_both_rows_and_logs_go_to_stderr(files):
    done = call(
        "finetune", files / "classifier", files / "few.jsonl", "--max-steps", 2, "--compare", "adamw",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    lines = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines if line and line[0] in ("topk", "adamw")} == {"topk", "adamw"}
    assert "accuracy" in done.stdout and "weights" in done.stdout
    assert "'loss'" in done.stderr and "'loss'" not in done.stdout


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(files, monkeypatch):
    options = (
        "finetune", files / "classifier", files / "few.jsonl", "--max-steps", 7, "--lr", 0.01,
        "--method", "dps", "--update-steps", 1, "--save-steps", 2, "--batch-size", 4,
    )  # fmt: skip
    whole = answer(*options, "--output", "whole")
    begins = finetuning._Clock.on_step_begin
    begun = []

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 5 and begun[0] == 0:
            raise KeyboardInterrupt
        begun.append(state.global_step)
        begins(self, args, state, control, **kwargs)

    monkeypatch.setattr(finetuning._Clock, "on_step_begin", interrupted)
    done = call(*options, "--output", "part", "--json")
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.endswith("interrupted\n")
    assert not Path("part/results.json").exists()
    assert begun == [0, 1, 2, 3, 4]
    begun.clear()
    # anew only where nothing would be lost
    assert refused(*options, "--output", "part").startswith(
        "output must be a new or an empty folder, got 'part'"
    )
    other = refused(*options, "--output", "part", "--resume", "--weight-decay", 0.5)
    assert other.startswith("weight_decay must be 0.01, as in the run that is resumed, got 0.5; ")
    resumed = answer(*options, "--output", "part", "--resume")
    assert begun == [4, 5, 6]
    assert without_times(resumed) == without_times(whole)
    same(weights("whole"), weights("part"))


def test_released_gradients_train_to_the_same_bits(files):
    options = ("--method", "child_tuning_d", "--max-steps", 3, "--lr", 0.01, "--max-grad-norm", 0)
    for name, more in {"whole": (), "released": ("--release-gradients",)}.items():
        answer("finetune", files / "classifier", files / "few.jsonl", *options, *more, "--output", name)
    same(weights("whole"), weights("released"))
    # and are clipped by the optimizer
    clipped = ("--max-grad-norm", 1e-6, "--release-gradients", "--output", "clipped")
    answer("finetune", files / "classifier", files / "few.jsonl", *options[:-2], *clipped)
    assert not torch.equal(weights("whole")["classifier.weight"], weights("clipped")["classifier.weight"])


def test_weights_train_in_the_dtype_that_is_asked_for(files, held_out):
    options = ("--max-steps", 2, "--dtype", "bfloat16", "--eval-data", held_out, "--output", "out")
    found = answer("finetune", files / "classifier", files / "few.jsonl", *options)
    assert {tensor.dtype for tensor in weights("out").values()} == {torch.bfloat16}
    assert answer("evaluate", "out", held_out)["metrics"] == found["runs"]["topk"]["metrics"]


def test_pictures_show_densities_and_costs(files, tmp_path):
    pytest.importorskip("matplotlib")
    found = answer(
        "finetune", files / "classifier", files / "few.jsonl", "--max-steps", 2, "--compare", "adamw",
        "--pictures", "pictures",
    )  # fmt: skip
    for name in ("density", "costs"):
        assert Path(f"pictures/{name}.png").read_bytes().startswith(b"\x89PNG")
    with Path("pictures/costs.csv").open(newline="") as file:
        drawn = {row["name"]: float(row["states"]) for row in csv.DictReader(file)}
    assert drawn == {name: run["optimizer_bytes"] for name, run in found["runs"].items()}


# --- language models --------------------------------------------------------------------------------------


def test_a_language_model_trains_and_is_evaluated_to_the_digit(files, held_out):
    options = ("--task", "causal-lm", "--eval-data", held_out, "--max-steps", 20, "--lr", 0.01)
    found = answer(
        "finetune", files / "writer", files / "few.jsonl", *options, "--density", 0.3, "--output", "out",
        "--delta", "d.safetensors",
    )  # fmt: skip
    metrics = found["runs"]["topk"]["metrics"]
    assert metrics["perplexity"] == math.exp(metrics["loss"])
    language = ("--task", "causal-lm")
    assert answer("evaluate", "out", held_out, *language)["metrics"] == metrics
    assert (
        answer("evaluate", files / "writer", held_out, "--delta", "d.safetensors", *language)["metrics"]
        == metrics
    )
    assert (
        answer("evaluate", files / "writer", held_out, *language)["metrics"]["loss"] > metrics["loss"] + 0.1
    )


def test_the_loss_of_a_language_model_is_the_mean_over_tokens_whatever_is_padded(files):
    texts = ["the cat", "a dog ran on the mat", "cat", "very bad plot"]
    Path("texts.json").write_text(json.dumps([{"text": text} for text in texts]))
    model = transformers.AutoModelForCausalLM.from_pretrained(files / "writer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "writer")
    losses, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            losses += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found = answer("evaluate", files / "writer", "texts.json", "--task", "causal-lm")
    assert found["metrics"]["loss"] == pytest.approx(losses / count, rel=1e-5)


# --- metrics ----------------------------------------------------------------------------------------------


def test_metrics_of_a_classifier_are_those_of_its_predictions(files, held_out):
    rows = [json.loads(row) for row in held_out.read_text().splitlines()]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(files / "classifier").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "classifier")

    def logits_of(model):
        with torch.no_grad():
            return torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])

    logits = logits_of(model)
    # predicts both classes, and not always well
    model.classifier.bias.data[0] -= (logits[:, 0] - logits[:, 1]).median()
    model.save_pretrained("sharp")
    tokenizer.save_pretrained("sharp")
    logits = logits_of(model)
    wanted, said = torch.tensor([row["label"] for row in rows]), logits.argmax(1)
    scores = []
    for label in (0, 1):
        hits = int(((said == label) & (wanted == label)).sum())
        precision, recall = hits / int((said == label).sum()), hits / int((wanted == label).sum())
        scores.append(2 * precision * recall / (precision + recall))
    metrics = answer("evaluate", "sharp", held_out)["metrics"]
    assert metrics["accuracy"] == int((said == wanted).sum()) / len(rows)
    assert metrics["macro_f1"] == pytest.approx(sum(scores) / 2)
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    shown = call("evaluate", "sharp", held_out).stdout
    assert f"{metrics['loss']:.6g}" in shown and "macro f1" in shown


# --- mask -------------------------------------------------------------------------------------------------

RANKINGS = {
    "topk": ("--density", 0.1),
    "child_tuning_d": (),
    "second_order": ("--density", 0.1),
    "dps": ("--observe-batches", 2),
}


@pytest.mark.parametrize("method", RANKINGS)
def test_a_mask_says_what_finetune_trains_and_moves_nothing(method, files, held_out):
    options = (files / "classifier", files / "few.jsonl", "--method", method, *RANKINGS[method])
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    found = answer("mask", *options, "--save-mask", "mask.safetensors")
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before
    masks = read_masks("mask.safetensors")
    assert found["entries"] == ENTRIES
    assert found["selected"] == sum(int(mask.sum()) for mask in masks.values())
    for groups in (found["layers"], found["module_types"]):
        assert sum(group["selected"] for group in groups.values()) == found["selected"]
        assert sum(group["entries"] for group in groups.values()) == ENTRIES
    assert {row["name"]: row["selected"] for row in found["parameters"]} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    if method == "topk":
        assert found["selected"] == int(0.1 * ENTRIES)
    if method == "dps":
        return  # it observes while it trains
    answer("finetune", *options, "--eval-data", held_out, "--max-steps", 3, "--lr", 0.01, "--output", "out")
    start, end = weights(files / "classifier"), weights("out")
    assert any(not torch.equal(start[name], end[name]) for name in start)
    for name, mask in masks.items():
        assert not ((start[name] != end[name]) & ~mask).any(), name


def read_masks(path):
    """The masks that a file holds, as its documentation says."""
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(shape) for name, shape in json.loads(file.metadata()["shapes"]).items()}
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    masks = {}
    for key, tensor in stored.items():
        name, _, form = key.rpartition(".")
        mask = torch.zeros(math.prod(shapes[name]), dtype=torch.bool)
        if form == "indices":
            assert tensor.dtype == torch.int32 and tensor.tolist() == sorted(set(tensor.tolist()))
            assert tensor.nbytes <= -(-mask.numel() // 8)
            mask[tensor.long()] = True
        else:
            assert form == "bits" and tensor.dtype == torch.uint8
            bits = numpy.unpackbits(tensor.numpy(), bitorder="little", count=mask.numel())
            mask = torch.from_numpy(bits).bool()
        masks[name] = mask.view(shapes[name])
    assert masks.keys() == shapes.keys()
    return masks


def test_observing_leaves_a_model_in_memory_as_it_was(files):
    recipe = finetuning.Recipe(str(files / "classifier"), str(files / "few.jsonl"), observe_batches=2)
    _, model = finetuning.observe(recipe, bar=False)
    same(dict(model.state_dict()), weights(files / "classifier"))
    assert all(p.grad is None for p in model.parameters())


def test_few_selected_entries_are_stored_as_a_list(tmp_path):
    masks = {"few": torch.zeros(100, 10, dtype=torch.bool), "odd": torch.ones(3, 3, dtype=torch.bool)}
    masks["few"][7, 3] = True
    finetuning.save_masks(masks, Path("mask.safetensors"), {})
    assert set(load_file("mask.safetensors")) == {"few.indices", "odd.bits"}
    same(read_masks("mask.safetensors"), masks)


def test_more_batches_observed_select_other_entries(files):
    options = ("mask", files / "classifier", files / "many.jsonl", "--density", 0.05)
    few, many = (answer(*options, "--observe-batches", count) for count in (1, 20))
    assert few["selected"] == many["selected"] and few["parameters"] != many["parameters"]


def test_the_tables_of_a_mask_name_layers_and_types_of_modules(files, tmp_path):
    pytest.importorskip("matplotlib")
    done = call("mask", files / "classifier", files / "few.jsonl", "--density", 0.1, "--picture", "m.png")
    assert done.exit_code == 0, done.stderr
    assert "distilbert.transformer.layer.1" in done.stdout and "attention.q_lin" in done.stdout
    assert Path("m.png").read_bytes().startswith(b"\x89PNG")


# --- tables -----------------------------------------------------------------------------------------------


def test_numbers_are_labels_however_they_are_written(tmp_path):
    Path("d.json").write_text(json.dumps([{"n": n} for n in (1, 1.0, "1", True)]))
    assert finetuning.column(finetuning.read_table("d.json"), "n", "label_column", "d.json") == [
        "1",
        "1",
        "1",
        "True",
    ]
    Path("d.jsonl").write_text('{"n": "one\u2028line"}\n\n{"n": "two"}\n')
    assert len(finetuning.read_table("d.jsonl")) == 2
    Path("d.jsonl").write_text('{"n": NaN}')
    with pytest.raises(ValueError, match="'n' must not be empty, got nothing in row 1"):
        finetuning.column(finetuning.read_table("d.jsonl"), "n", "label_column", "d.jsonl")


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_every_type_of_file_trains_alike(kind, files, held_out):
    rows = [json.loads(row) for row in (files / "few.jsonl").read_text().splitlines()]
    table = datasets.Dataset.from_list(rows)
    if kind == "json":
        Path("data.json").write_text(json.dumps(rows))
    else:
        getattr(table, f"to_{kind}")(f"data.{kind}")
    options = ("--max-steps", 2, "--eval-data", held_out)
    expected = answer("finetune", files / "classifier", files / "few.jsonl", *options)
    found = answer("finetune", files / "classifier", f"data.{kind}", *options)
    assert without_times(found)["runs"] == without_times(expected)["runs"]


def test_columns_have_the_names_that_are_given(files, held_out):
    rows = [json.loads(row) for row in (files / "few.jsonl").read_text().splitlines()]
    Path("data.json").write_text(json.dumps([{"said": row["text"], "kind": row["label"]} for row in rows]))
    columns = ("--text-column", "said", "--label-column", "kind")
    found = answer("finetune", files / "classifier", "data.json", *columns, "--max-steps", 1)
    assert found["runs"]["topk"]["train_rows"] + found["runs"]["topk"]["eval_rows"] == 40
    assert answer("evaluate", files / "classifier", "data.json", *columns)["rows"] == 40


def test_a_name_on_the_hub_gives_its_split_and_the_names_of_its_classes(files, monkeypatch):
    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        features = datasets.Features(
            text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
        )
        rows = {
            "text": [f"the cat {'sat' * (i % 2)} {split}" for i in range(8)],
            "label": [i % 2 for i in range(8)],
        }
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    answer(
        "finetune", files / "classifier", "me/texts", "--eval-data", "me/texts:test", "--max-steps", 1,
        "--output", "out",
    )  # fmt: skip
    assert asked == [("me/texts", "train"), ("me/texts", "test")]
    config = json.loads(Path("out/config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}


def test_no_text_is_trained_and_evaluated(files, monkeypatch):
    seen = []
    encode = finetuning.encode

    def recorded(loaded, corpus, max_length, source):
        seen.append(corpus.texts)
        return encode(loaded, corpus, max_length, source)

    monkeypatch.setattr(finetuning, "encode", recorded)
    rows = [json.loads(row) for row in (files / "few.jsonl").read_text().splitlines()]
    Path("twice.json").write_text(json.dumps(rows + rows))
    for seed in (0, 1):
        answer(
            "finetune",
            files / "classifier",
            "twice.json",
            "--eval-share",
            0.25,
            "--max-steps",
            1,
            "--seed",
            seed,
        )
    train, held_out, _, other = seen
    assert len(train) + len(held_out) == 80 and len(held_out) in range(16, 25)
    assert not set(train) & set(held_out)
    assert set(held_out) != set(other)


def test_what_is_trained_and_evaluated_all_the_same_is_said(files):
    done = call(
        "finetune", files / "classifier", files / "few.jsonl", "--eval-data", files / "many.jsonl",
        "--max-steps", 1, "--json",
    )  # fmt: skip
    assert done.exit_code == 0
    assert "are trained as well: metrics may be too good." in done.stderr


# --- what is wrong ----------------------------------------------------------------------------------------


def write(name, text):
    Path(name).write_text(text)
    return name


FEW = '{"text": "the cat", "label": 0}\n{"text": "a dog", "label": 1}\n{"text": "a mat", "label": 1}'
WRONG_DATA = {
    "a missing text column": (
        "d.jsonl",
        FEW,
        ("--text-column", "body"),
        "text_column must be a column of 'd.jsonl'",
    ),
    "a missing label column": (
        "d.csv",
        "text,kind\na,b\n",
        (),
        "label_column must be a column of 'd.csv', got 'label'",
    ),
    "an unknown type": ("d.docx", "text", (), "data must be a file of type .csv, .json, .jsonl, .parquet"),
    "an empty file": ("d.csv", "", (), "data must have at least one row, got 'd.csv'"),
    "a header alone": ("d.csv", "text,label\n", (), "data must have at least one row"),
    "no JSON": ("d.jsonl", "{", (), "data must be a readable .jsonl file, got 'd.jsonl'"),
    "no parquet": ("d.parquet", "text", (), "data must be a readable .parquet file"),
    "rows without columns": ("d.json", "[1, 2]", (), "data must have rows with named columns"),
    "a row without a label": (
        "d.csv",
        "text,label\na,1\nb,\n",
        (),
        "'label' must not be empty, got nothing in row 2",
    ),
    "a list for a text": (
        "d.jsonl",
        '{"text": ["a", "b"], "label": 1}',
        (),
        "'text' must be text or a number, got a list in row 1",
    ),
    "one class": (
        "d.csv",
        "text,label\na,x\nb,x\n",
        ("--eval-share", "0.5"),
        "labels must be of two classes or more",
    ),
    "nothing to evaluate": (
        "d.jsonl",
        FEW,
        ("--eval-share", "0.01"),
        "eval_share must leave texts on both sides",
    ),
    "its own evaluation": (
        "d.jsonl",
        FEW,
        ("--eval-data", "./d.jsonl"),
        "eval_data must not be what is trained",
    ),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data_is_one_sentence_and_status_two(name, files):
    file, text, options, words = WRONG_DATA[name]
    write(file, text)
    sentence = refused("finetune", files / "encoder", file, *options) if name == "one class" else None
    sentence = sentence or refused("finetune", files / "classifier", file, *options)
    assert sentence.startswith(words)


@pytest.fixture(autouse=True)
def _encoder(encoder):
    """It is among the files of every test."""


def test_a_file_or_model_that_is_not_there_is_one_sentence_and_status_two(files):
    few = files / "few.jsonl"
    assert refused("finetune", files / "classifier", "none.csv").startswith(
        "data must be a file that exists, got"
    )
    assert refused("finetune", files / "classifier", "nobody/nothing").startswith(
        "data must be a .csv, .json, "
    )
    for command in ("finetune", "mask", "evaluate"):
        sentence = refused(command, "nobody/nothing", few)
        assert sentence.startswith(
            "model must be a folder or a name on the hub, with weights in safetensors, got "
        )


def test_a_label_that_was_not_trained_is_one_sentence_and_status_two(files):
    write("other.csv", "text,label\nthe cat,7\n")
    words = "labels of 'other.csv' must be among '0', '1', got '7'; "
    options = ("--eval-data", "other.csv", "--max-steps", 1)
    assert refused("finetune", files / "classifier", files / "few.jsonl", *options).startswith(words)
    assert refused("evaluate", files / "classifier", "other.csv").startswith(words)


def test_a_model_without_a_trained_head_is_not_evaluated(files, encoder):
    sentence = refused("evaluate", encoder, files / "few.jsonl")
    assert sentence.startswith("model must have been trained for classification, got ")


def test_a_delta_of_other_weights_is_not_evaluated(files, encoder, named):
    answer(
        "finetune", files / "classifier", files / "few.jsonl", "--max-steps", 1, "--delta", "d.safetensors"
    )
    sentence = refused("evaluate", encoder, files / "few.jsonl", "--delta", "d.safetensors")
    assert sentence.startswith("weights must be the base's (classifier)")


class Opened:
    """A pickle that says so when it is read."""

    def __reduce__(self):
        return (Path("opened").write_text, ("!",))


def test_weights_in_a_pickle_are_refused_and_never_opened(files):
    transformers.AutoConfig.from_pretrained(files / "classifier").save_pretrained("pickled")
    transformers.AutoTokenizer.from_pretrained(files / "classifier").save_pretrained("pickled")
    torch.save(Opened(), "pickled/pytorch_model.bin")
    for command in ("finetune", "evaluate"):
        assert refused(command, "pickled", files / "few.jsonl").startswith("model must be a folder or a name")
    assert not Path("opened").exists()


WRONG_OPTIONS = {
    "density of 2": (("--density", "2"), "density must be in (0, 1], got 2.0; "),
    "density of 0": (("--density", "0"), "density must be in (0, 1], got 0.0; "),
    "density of a method without": (
        ("--method", "adamw", "--density", "0.1"),
        "density must be left out for adamw",
    ),
    "density that is no number": (("--density", "few"), "Invalid value for '--density'"),
    "keep of a list": (("--keep", "0.1"), "keep must be left out for topk, got 0.1; "),
    "no keep": (("--method", "grad_drop"), "keep must be given for grad_drop"),
    "batches of random masks": (
        ("--method", "child_tuning_f", "--observe-batches", "3"),
        "observe_batches must be left out for child_tuning_f",
    ),
    "batches of stages": (
        ("--method", "dps", "--observe-batches", "3"),
        "observe_batches must be left out for dps, which observes while it trains, got 3; ",
    ),
    "more batches than there are": (("--observe-batches", "99"), "observe_batches must be at most the "),
    "released random masks": (
        ("--method", "child_tuning_f", "--release-gradients"),
        "release_gradients needs a method that trains a fixed",
    ),
    "a release that there is not": (
        ("--fidelity", "release"),
        "fidelity must be left out for topk, got 'release'; ",
    ),
    "no epochs": (("--epochs", "0"), "epochs must be positive, got 0.0; "),
    "no batch": (("--batch-size", "0"), "batch_size must be positive, got 0; "),
    "negative decay": (("--weight-decay", "-1"), "weight_decay must be 0 or more, got -1.0; "),
    "a share and a file": (
        ("--eval-share", "0.1", "--eval-data", "x.csv"),
        "eval_share must be left out with eval_data",
    ),
    "a share of all": (("--eval-share", "1"), "eval_share must be in (0, 1), got 1.0; "),
    "a negative seed": (("--seed", "-1"), "seed must be in [0, 2**32), got -1; "),
    "resuming nothing": (("--resume",), "output must be given with resume, got none; "),
    "resuming from nothing": (
        ("--resume", "--output", "new"),
        "output must have checkpoints to resume from, got 'new'",
    ),
    "checkpoints nowhere": (("--save-steps", "3"), "save_steps must be positive, with an output, got 3; "),
    "an unknown task": (("--task", "poetry"), "Invalid value for '--task'"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_wrong_options_are_one_sentence_and_status_two(name, files, tmp_path):
    options, words = WRONG_OPTIONS[name]
    assert refused("finetune", files / "classifier", files / "few.jsonl", *options).startswith(words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["transformers", "datasets"])
def test_without_the_packages_that_train_the_extra_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "sparse_optim.finetuning")
    monkeypatch.delattr("sparse_optim.finetuning")
    for command in ("mask", "finetune", "evaluate"):
        sentence = refused(command, "model", "data.csv")
        assert sentence == (
            f"{command} needs transformers, accelerate and datasets, got no {missing}; "
            "pip install 'sparse_optim[cli,hf]'.\n"
        )


def test_a_delta_of_another_task_does_not_stand_for_a_trained_head(files, held_out, tmp_path):
    path = tmp_path / "delta.safetensors"
    data = files / "few.jsonl"
    answer("finetune", files / "writer", data, "--task", "causal-lm", "--max-steps", 1, "--delta", path)
    words = call("evaluate", files / "writer", held_out, "--delta", path)
    assert words.exit_code == 2
    assert "model must have been trained for classification" in words.stderr


@pytest.mark.parametrize("option", ["--delta", "--pictures"])
def test_where_nothing_can_be_written_is_said_before_training(option, files, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path if option == "--delta" else tmp_path / "file"
    done = call("finetune", files / "classifier", files / "few.jsonl", option, path, "--max-steps", 1)
    assert done.exit_code == 2
    assert "train_runtime" not in done.stderr


def test_a_density_that_selects_nothing_is_one_sentence(files):
    done = call("mask", files / "classifier", files / "few.jsonl", "--density", 1e-9)
    assert done.exit_code == 2
    assert "density must select at least one" in done.stderr


def test_a_file_in_place_of_a_models_folder_is_refused_unopened(files):
    words = refused("finetune", files / "classifier" / "config.json", files / "few.jsonl")
    assert "must be a folder or a name on the hub, got the file" in words
