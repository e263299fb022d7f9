"""Contract under test: every script in examples/ runs as it is written, says what is true and resumes bit for
bit; every Python snippet of README.md and MIGRATION.md runs, and shell snippets name what is there.
"""

import ast
import importlib.util
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
LIMITS = dict.fromkeys(EXAMPLES, 60) | {"fsdp2.py": 80}
DOCUMENTS = ("README.md", "MIGRATION.md")
pytestmark = [
    # those of the packages that examples and snippets use
    pytest.mark.filterwarnings("ignore::Warning:(torch|transformers|accelerate|trl|peft|lightning).*"),
    # 1 % of so few entries may be none of the norms and biases
    pytest.mark.filterwarnings("ignore:nothing was selected in parameter group:UserWarning"),
]
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "very", "film", "was", "plot", "bad", "good"]


def installed(package):
    return importlib.util.find_spec(package) is not None


def needs(*packages):
    missing = [package for package in packages if not installed(package)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_transformers = needs("transformers", "accelerate", "datasets", "tokenizers")


# --- what the examples read -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A classifier and a language model with their tokenizers, sentences and labels, all of them tiny."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("files")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=64
    )
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        classifier = transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(
                vocab_size=len(vocabulary), dim=16, n_layers=2, n_heads=2, hidden_dim=24,
                max_position_embeddings=64, num_labels=2,
            )
        )  # fmt: skip
        writer = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
                pad_token_id=0, bos_token_id=2, eos_token_id=2,
            )
        )  # fmt: skip
    for name, model in {"classifier": classifier, "writer": writer}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = []
    for i in range(400):
        drawn = torch.randint(len(WORDS) - 2, (4,), generator=generator)
        rows.append({"text": " ".join([*(WORDS[j] for j in drawn), WORDS[-1 - i % 2]]), "label": i % 2})
    for name, count in {"few": 40, "many": 400}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[:count])))
    (folder / "text.txt").write_text("\n".join(row["text"] for row in rows[:40]))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nothing asks a network, and what the packages of others remember is forgotten after each test."""

    def refused(*args):
        raise OSError("an example asked the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refused)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # Lightning sets them
        monkeypatch.setenv(name, "0")
    if installed("datasets"):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.disable_progress_bars()
    if installed("huggingface_hub"):
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield
    if "accelerate" in sys.modules:
        state = sys.modules["accelerate"].state
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture
def run(monkeypatch, capfd):
    """Run an example with these arguments: its variables, and the lines that it printed."""

    def call(name, **arguments):
        given = [(f"--{key}", value) for key, value in arguments.items()]
        words = [str(word) for pair in given for word in pair if word is not True]
        monkeypatch.setattr(sys, "argv", [name, *words])
        torch.manual_seed(99)  # what a run draws must not depend on what was drawn before
        capfd.readouterr()
        variables = runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return SimpleNamespace(**variables, printed=capfd.readouterr().out.splitlines())

    return call


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def loaded(folder, kind, dtype=torch.float32):
    import transformers

    model_class = {
        "classifier": transformers.AutoModelForSequenceClassification,
        "writer": transformers.AutoModelForCausalLM,
    }[kind]
    return weights(model_class.from_pretrained(folder, dtype=dtype))


def only_selected_entries_moved(before, model, optimizer):
    """Everything that the optimizer does not select has its bits, and of the rest most has moved."""
    moved, selected = 0, 0
    for name, p in model.named_parameters():
        mask = optimizer.mask(p)
        assert torch.equal(before[name][~mask], p.detach()[~mask])
        moved += int((before[name] != p)[mask].sum())
        selected += int(mask.sum())
    assert 0.8 * selected < moved < sum(p.numel() for p in model.parameters())


def bytes_of_state(optimizer):
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def numbers(printed):
    """step, loss, density and bytes of every line that speaks of them."""
    pattern = re.compile(r"^(\d+): loss ([\d.]+), density ([\d.]+), (\d+) bytes( a process)?$")
    found = [match.groups()[:4] for match in map(pattern.match, printed) if match]
    return [(int(step), float(loss), float(density), int(size)) for step, loss, density, size in found]


# --- the examples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_shorter_than_60_lines_or_80_and_named_in_the_readme(name):
    assert len((ROOT / "examples" / name).read_text().splitlines()) < LIMITS[name]
    assert f"(examples/{name})" in (ROOT / "README.md").read_text()


@needs_transformers
def test_plain_loop_selects_what_it_says_and_resumes_bit_for_bit(run, files, tmp_path):
    options = {
        "model": files / "writer", "data": files / "text.txt", "length": 8, "batch": 3, "epochs": 2,
        "observe": 2, "save_every": 1, "lr": 1e-2,
    }  # fmt: skip
    whole = run("plain_loop.py", **options, out="whole")
    steps = 2 * whole.per_epoch
    said = numbers(whole.printed)
    assert [step for step, *_ in said] == list(range(1, steps + 1))
    # a language model has no fresh head, so that everything is masked
    entries = sum(p.numel() for p in whole.model.parameters())
    density = round(int(0.3 * entries) / entries, 4)
    assert [density for _, _, density, _ in said] == [0.0] * 2 + [density] * (steps - 2)
    assert said[0][3] >= 4 * entries  # the statistic
    assert said[-1][3] == bytes_of_state(whole.optimizer)
    only_selected_entries_moved(loaded(files / "writer", "writer"), whole.model, whole.optimizer)
    same(weights(whole.model), loaded("whole", "writer"))
    # while observing, at the selection, right after it, within an epoch and at the end of one
    for step in (1, 2, 3, whole.per_epoch, whole.per_epoch + 1):
        resumed = run("plain_loop.py", **options, out="again", resume=f"whole/step_{step}.pt")
        same(weights(whole.model), weights(resumed.model))
        assert numbers(resumed.printed) == said[step:]


@needs_transformers
def test_accelerate_loop_alternates_as_it_says_and_resumes_bit_for_bit(run, files):
    options = {"model": files / "classifier", "data": files / "few.jsonl", "steps": 20, "save_every": 1}
    whole = run("accelerate_loop.py", **options, out="whole")
    said = numbers(whole.printed)
    assert [step for step, *_ in said] == list(range(1, 21))
    # stages of one step: of all weights, then of 70 % of those of the linear layers
    masked = sum(p.numel() for group in whole.ours.param_groups if group["masked"] for p in group["params"])
    everything = sum(p.numel() for p in whole.model.parameters())
    assert [density == 1.0 for _, _, density, _ in said] == [True, False] * 10
    assert said[1][2] == pytest.approx(1 - 0.3 * masked / everything, abs=1e-3)
    assert said[-1][3] == bytes_of_state(whole.ours)
    same(weights(whole.model), loaded("whole", "classifier"))
    # after observing, after training a selection, at the end of an epoch
    for step in (1, 4, whole.per_epoch, 2 * whole.per_epoch):
        resumed = run("accelerate_loop.py", **options, out="again", resume=f"whole/step_{step}")
        same(weights(whole.model), weights(resumed.model))
        assert numbers(resumed.printed) == said[step:]


@needs_transformers
@needs("lightning")
@pytest.mark.parametrize("manual", [0, 1])
def test_lightning_module_drops_layers_by_epoch_and_resumes_bit_for_bit(run, files, manual):
    options = {"model": files / "classifier", "data": files / "few.jsonl", "manual": manual}
    whole = run("lightning_module.py", **options, epochs=3, out="whole")
    said = numbers(whole.printed)
    assert [step for step, *_ in said] == list(range(1, 16))
    densities = [{density for _, _, density, _ in said[i : i + 5]} for i in (0, 5, 10)]
    assert all(len(density) == 1 for density in densities) and densities[0] != densities[1]
    assert said[-1][3] == bytes_of_state(whole.trainer.optimizers[0])
    same(weights(whole.classifier.model), loaded("whole", "classifier"))
    run("lightning_module.py", **options, epochs=1, out="part")
    resumed = run("lightning_module.py", **options, epochs=3, out="again", resume="part/last.ckpt")
    same(weights(whole.classifier.model), weights(resumed.classifier.model))
    assert numbers(resumed.printed) == said[5:]


def under_torchrun(name, processes, **arguments):
    """Run an example in that many processes: the lines that they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    given = [word for key, value in arguments.items() for word in (f"--{key}", value)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in (*command, ROOT / "examples" / name, *given)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout.splitlines()


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun tells a process that is alone."""
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@needs_transformers
def test_fsdp2_goes_on_from_its_last_whole_checkpoint_bit_for_bit_and_on_one_process(
    run, files, tmp_path, one_process
):
    from test_elastic import contents, differences

    options = {
        "model": files / "writer", "data": files / "text.txt", "steps": 8, "batch": 6,
        "lr": 1e-2, "observe": 3, "save_every": 2,
    }  # fmt: skip
    said = numbers(under_torchrun("fsdp2.py", 2, **options, out="whole"))
    assert [step for step, *_ in said] == list(range(1, 9))
    assert [density > 0 for _, _, density, _ in said] == [False] * 3 + [True] * 5
    saved = {step: contents(Path("whole"), step, tmp_path / "tensors") for step in (2, 4, 6, 8)}
    assert differences(saved[6], saved[8])
    # while observing; of a later checkpoint there is all but the list of contents
    for step in (2, 4):
        shutil.copytree(f"whole/{step}", f"again/{step}")
    Path("again/4/.metadata").unlink()
    assert numbers(under_torchrun("fsdp2.py", 2, **options, out="again")) == said[2:]
    for step in (4, 6, 8):
        assert not differences(saved[step], contents(Path("again"), step, tmp_path / "tensors"))
    # the same lines in another number of processes: the same sums, in another order
    shutil.copytree("whole/4", "one/4")
    resumed = numbers(run("fsdp2.py", **options, out="one").printed)
    assert [(step, density) for step, _, density, _ in resumed] == [(n, d) for n, _, d, _ in said[4:]]
    assert [row[1] for row in resumed] == pytest.approx([row[1] for row in said[4:]], abs=2e-4)
    alone = contents(Path("one"), 8, tmp_path / "tensors")
    assert alone.keys() == saved[8].keys()
    for name, value in saved[8].items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(alone[name], value, rtol=1e-3, atol=1e-5), name
            assert value.dtype != torch.uint8 or torch.equal(alone[name], value)
        else:
            assert alone[name] == value, name


def logged(trainer):
    # what a clock or, in TRL, a count since the last start says
    others = "train_runtime train_samples_per_second train_steps_per_second total_flos train_loss num_tokens"
    entries = [{k: v for k, v in e.items() if k not in others.split()} for e in trainer.state.log_history]
    return [entry for entry in entries if entry.keys() - {"step", "epoch"}]


def check_trainer(run, name, options, kind, files, steps, at):
    """Runs a script of Trainer's whole and from a checkpoint, and returns the first."""
    whole = run(name, **options, out="whole")
    ours = whole.trainer.optimizer.optimizer
    before = loaded(files / kind, kind, whole.trainer.model.dtype)
    only_selected_entries_moved(before, whole.trainer.model, ours)
    said = [entry for entry in logged(whole.trainer) if "density" in entry]
    assert sum("'density'" in line and "'optimizer_state_bytes'" in line for line in whole.printed) == steps
    assert [entry["step"] for entry in said] == list(range(1, steps + 1))
    assert {entry["density"] for entry in said} == {ours.density()}
    assert said[-1]["optimizer_state_bytes"] == bytes_of_state(ours)
    same(weights(whole.trainer.model), loaded("whole", kind, whole.trainer.model.dtype))
    shutil.copytree(f"whole/checkpoint-{at}", f"again/checkpoint-{at}")
    resumed = run(name, **options, out="again", resume=True)
    same(weights(whole.trainer.model), weights(resumed.trainer.model))
    assert logged(resumed.trainer) == logged(whole.trainer)
    return whole


@needs_transformers
def test_trainer_selects_what_it_says_and_resumes_bit_for_bit(run, files):
    options = {
        "model": files / "classifier",
        "data": files / "many.jsonl",
        "labels": 2,
        "batch": 2,
        "steps": 5,
    }
    whole = check_trainer(run, "trainer.py", options, "classifier", files, steps=5, at=2)
    ours = whole.trainer.optimizer.optimizer
    masked = [p for group in ours.param_groups if group["masked"] for p in group["params"]]
    selected = sum(int(ours.mask(p).sum()) for p in masked)
    assert selected == int(0.3 * sum(p.numel() for p in masked))


@needs_transformers
@needs("trl")
def test_trl_sft_selects_what_it_says_and_resumes_bit_for_bit(run, files):
    options = {"model": files / "writer", "data": files / "few.jsonl", "steps": 5, "observe": 4}
    whole = check_trainer(run, "trl_sft.py", options, "writer", files, steps=5, at=2)
    ours = whole.trainer.optimizer.optimizer
    assert whole.trainer.model.dtype == torch.bfloat16
    assert ours.release_gradients and ours.max_grad_norm == 1.0
    assert ours.density() == pytest.approx(0.01, rel=0.02)


# --- TRL, beyond its example ------------------------------------------------------------------------------


def fine_tuner(files, folder, name, **changes):
    """SFTTrainer on packed sentences; with `peft_config` what the optimizer masks are adapters."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from sparse_optim import ChildTuningAdamW, DPSAdamW
    from sparse_optim.integrations.transformers import SparseOptimCallback, trainer_optimizer

    args = SFTConfig(
        **{
            "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
            "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "max_length": 12, "packing": True, "max_steps": 6, "save_steps": 1, "logging_steps": 1,
        } | changes
    )  # fmt: skip
    extra, method, options = {}, ChildTuningAdamW, {"variant": "D", "observe_steps": 2}
    if name == "lora":
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear")
        method, options = DPSAdamW, {"variant": "dense", "update_steps": 1}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(files / "writer", dtype=torch.float32),
        args,
        train_dataset=load_dataset("json", data_files=str(files / "few.jsonl"), split="train"),
        optimizer_cls_and_kwargs=trainer_optimizer(method, args, **options),
        **extra,
    )
    trainer.add_callback(SparseOptimCallback(trainer))
    return trainer


@needs_transformers
@needs("trl")
@pytest.mark.parametrize("name", ["whole_model", pytest.param("lora", marks=needs("peft"))])
def test_a_resumed_sft_run_is_bit_equal_to_one_that_was_not_interrupted(files, name):
    whole = fine_tuner(files, "whole", name)
    before = weights(whole.model)
    whole.train()
    moved = {key for key, value in weights(whole.model).items() if not torch.equal(value, before[key])}
    assert moved and all("lora" in key for key in moved) == (name == "lora")
    # while observing, at the selection, after it
    for step in (1, 2, 4):
        resumed = fine_tuner(files, f"again_{step}", name)
        resumed.train(resume_from_checkpoint=f"whole/checkpoint-{step}")
        same(weights(whole.model), weights(resumed.model))
        assert logged(whole) == logged(resumed)


# --- README.md and MIGRATION.md ---------------------------------------------------------------------------

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# the paragraph above says of a snippet that it is part of a script
FROM_EXAMPLE = re.compile(r"from\s+\[(examples/\w+\.py)\]\(\1\):\s*\Z", re.IGNORECASE)


def snippets(language):
    """document, section, number in it, text right before, code"""
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for section in re.split(r"^(?=##+ )", text, flags=re.MULTILINE):
            end, name = 0, section.partition("\n")[0].lstrip("# ")
            for number, match in enumerate(FENCE.finditer(section)):
                if match[1] == language:
                    above = section[end : match.start()].strip().rpartition("\n\n")[2]
                    yield pytest.param(document, section, above, match[2], id=f"{document}-{name}-{number}")
                end = match.end()


PYTHON, SHELL = list(snippets("python")), list(snippets("sh"))
OF_EXAMPLES = [param for param in PYTHON if FROM_EXAMPLE.search(param.values[2])]
# what others' optimizers are called today is run only where these are installed
PEERS = {"badam", "galore_torch", "peft"}


@pytest.mark.parametrize(("document", "section", "above", "code"), OF_EXAMPLES)
def test_a_snippet_of_an_example_is_in_it(document, section, above, code):
    lines = iter((ROOT / FROM_EXAMPLE.search(above)[1]).read_text().splitlines())
    for wanted in filter(None, map(str.strip, code.splitlines())):
        assert any(wanted == line.strip() for line in lines), wanted


def yours(section, folder):
    """What a snippet does not make itself: a model, batches and what Trainer takes."""
    import transformers
    from torch.nn.parallel import DistributedDataParallel

    sizes = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(3)
    # LoRA, BAdam and GaLore look for the names of a language model's layers
    if re.match(r"## (LoRA|BAdam|GaLore)", section):
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, pad_token_id=0)
        model = transformers.LlamaForSequenceClassification(config)
    else:
        config = transformers.BertConfig(**sizes, num_hidden_layers=1, max_position_embeddings=8)
        model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(3, 20, (16, 6))
    train_dataset = [{"input_ids": row, "labels": int(row[0] > 10)} for row in tokens]
    return {
        "model": model,
        "loader": torch.utils.data.DataLoader(train_dataset, batch_size=4),
        "train_dataset": train_dataset,
        "args": transformers.TrainingArguments(
            str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=6
        ),
        "Trainer": transformers.Trainer,
        "DistributedDataParallel": DistributedDataParallel,
    }


def imports(code):
    return [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Import | ast.ImportFrom)]


@needs_transformers
@pytest.mark.filterwarnings("ignore::Warning:(badam|galore_torch).*")
@pytest.mark.parametrize(
    ("document", "section", "above", "code"), [param for param in PYTHON if param not in OF_EXAMPLES]
)
def test_a_snippet_runs_and_its_optimizer_trains(tmp_path, document, section, above, code):
    """After the snippets of its section before it, and the imports of its document before it."""
    packages = {name for n in imports(code) for name in [getattr(n, "module", None) or n.names[0].name]}
    missing = sorted(p for p in packages & PEERS if not installed(p))
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    names = yours(section, tmp_path / "out")
    text = (ROOT / document).read_text()
    for match in FENCE.finditer(text[: text.index(section)]):
        for node in imports(match[2]) if match[1] == "python" and document == "README.md" else []:
            exec(ast.unparse(node), names)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for match in FENCE.finditer(section):
            if match[1] == "python" and (match[2] == code or document == "README.md"):
                exec(compile(match[2], f"{document}: {above}", "exec"), names)
            if match[2] == code:
                break
        if "trainer" in names:
            names["trainer"].train()
            assert trains(names["trainer"].optimizer.optimizer)
        elif "optimizer" in names or "AdamW" in code:
            trains_for_a_while(names)
    finally:
        torch.distributed.destroy_process_group()


def trains(optimizer):
    return optimizer.density() > 0


def trains_for_a_while(names):
    """Until the optimizer has observed, if it is ours, and moves weights."""
    model, optimizer, before = names["model"], names["optimizer"], weights(names["model"])
    model.train()
    for _ in range(110):
        for batch in names["loader"]:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            after = weights(model)
            if any(not torch.equal(value, before[name]) for name, value in after.items()):
                assert all(value.isfinite().all() for value in after.values())
                return
    raise AssertionError("no weight has moved")


@pytest.mark.parametrize(("document", "section", "above", "code"), SHELL)
def test_a_command_names_what_there_is(document, section, above, code):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code.splitlines():
        program, *words = line.split(" #")[0].split()
        if program == "make":
            assert words and set(words) <= targets
        elif program == "sparse-optim":
            pytest.importorskip("typer")
            pytest.importorskip("rich")
            from typer.main import get_command

            from sparse_optim.cli import app

            command = get_command(app)
            for word in words:
                if not hasattr(command, "commands"):
                    break
                command = command.commands[word]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known
        elif program == "python":
            assert words[0] == "-m" and importlib.util.find_spec(words[1]) is not None
        else:
            raise AssertionError(f"not known how to check {line!r}")


def test_commands_within_sentences_name_what_there_is():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for module in re.findall(r"`python -m ([\w.]+)", text):
            assert importlib.util.find_spec(module) is not None, module
        assert set(re.findall(r"`make (\w+)", text)) <= targets
        for path in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / path).exists(), path
