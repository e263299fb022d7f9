"""Contract under test: `sparse-optim` prints what `estimate_memory` says, reads configs and no weights,
measures steps, carries deltas from file to file, and answers what is wrong with one sentence and exit
status 2.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_optim import (
    ChildTuningAdamW,
    DPSAdamW,
    Schedule,
    SecondOrderAdamW,
    TopK,
    estimate_memory,
    param_groups,
)
from sparse_optim.planning import model_on_meta

ROOT = Path(__file__).parent.parent
pytest.importorskip("rich")
pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from typer.main import get_command  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from sparse_optim import cli  # noqa: E402
from sparse_optim.__main__ import report  # noqa: E402
from sparse_optim.cli import app, parse_bytes  # noqa: E402

# torch looks up, once, which functions a device context redirects; within a test these are not torch's own
with torch.device("meta"):
    torch.empty(1)

pytestmark = pytest.mark.usefixtures("quiet_logs")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    done = call("plan", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def bert(folder: Path, auto_class: str | None = None) -> Any:
    return model_on_meta(transformers.AutoConfig.from_pretrained(folder), auto_class)


@pytest.mark.parametrize("arguments", [(), ("info",)], ids=["none", "info"])
def test_the_report_is_the_default(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert (done.exit_code, done.stdout) == (0, report() + "\n")


def test_the_module_and_the_script_are_one_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparse_optim", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: sparse-optim ")
    try:
        scripts = importlib.metadata.distribution("sparse_optim").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("sparse_optim runs from its source and is not installed")
    for script in scripts.select(group="console_scripts"):
        assert (script.name, script.value) == ("sparse-optim", "sparse_optim.__main__:main")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_there_is_the_report_and_the_rest_names_the_extra(missing: str) -> None:
    program = f"""
import runpy, sys
sys.modules[{missing!r}] = None
runpy.run_module("sparse_optim", run_name="__main__")
"""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    bare = run()
    assert (bare.returncode, bare.stderr) == (0, "")
    *facts, last = bare.stdout.splitlines()
    assert "\n".join(facts) == report()
    assert last.endswith("missing: pip install 'sparse_optim[cli]'")
    asked = run("plan", "gpt2")
    assert (asked.returncode, asked.stdout) == (2, "")
    assert asked.stderr == f"plan needs typer and rich, got no {missing}; pip install 'sparse_optim[cli]'.\n"


def commands(group: Any = None, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words, groups included."""
    group = get_command(app) if group is None else group
    yield names, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*names, name))


COMMANDS = dict(commands())
LEAVES = [names for names, command in COMMANDS.items() if not hasattr(command, "commands")]


def test_the_commands_are_these() -> None:
    top = ["info", "plan", "mask", "finetune", "evaluate", "bench", "delta"]
    deltas = ["extract", "apply", "revert", "merge", "show", "to-peft", "push"]
    assert set(COMMANDS) == {(), *((name,) for name in top), *(("delta", name) for name in deltas)}


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_help_has_an_example_of_options_that_there_are(names: tuple[str, ...]) -> None:
    done = call(*names, "--help")
    assert done.exit_code == 0
    # a terminal is narrow
    (example,) = re.findall(r"Example: sparse-optim (.*?)(?:\n\n|$)", done.stdout, re.DOTALL)
    words = example.split()
    assert tuple(words[: len(names)]) == names
    while not names or hasattr(COMMANDS[names], "commands"):
        names = (*names, words[len(names)])
    known = {option for parameter in COMMANDS[names].params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("names", LEAVES, ids=" ".join)
def test_every_command_speaks_json(names: tuple[str, ...]) -> None:
    assert "--json" in {option for parameter in COMMANDS[names].params for option in parameter.opts}


def test_info_in_json_has_the_facts_of_the_report() -> None:
    found = json.loads(call("info", "--json").stdout)
    assert [f"{name:<19}{fact}" for name, fact in found.items()] == report().splitlines()


def test_completion_is_a_script_that_asks_the_command(monkeypatch: Any) -> None:
    # which shell runs the tests is nobody's business
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = call("--show-completion", "bash")
    assert done.exit_code == 0
    assert "_SPARSE_OPTIM_COMPLETE=complete_bash" in done.stdout
    assert "complete -o default" in done.stdout
    asked = CliRunner().invoke(
        app,
        [],
        env={
            "_SPARSE_OPTIM_COMPLETE": "complete_bash",
            "COMP_WORDS": "sparse-optim fine",
            "COMP_CWORD": "1",
        },
    )
    assert asked.stdout.split() == ["finetune"]


def test_an_import_of_the_commands_imports_no_training_code() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import sparse_optim.cli; "
        "slow = {'transformers', 'datasets', 'accelerate', 'matplotlib'}; "
        "print(sorted(slow & (set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# --- exit statuses ----------------------------------------------------------------------------------------


def test_an_interrupt_is_a_word_and_status_130(monkeypatch: Any) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "report", interrupted)
    done = call("info")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_accident_is_status_one_and_keeps_its_trace(monkeypatch: Any) -> None:
    def fails() -> str:
        return [][1]

    def refuses() -> str:
        # in the words of wrong input, but not this package's
        raise ValueError("size must be 1, got 2; use 1.")

    for accident, kind in ((fails, IndexError), (refuses, ValueError)):
        monkeypatch.setattr(cli, "report", accident)
        done = call("info")
        assert done.exit_code == 1
        assert isinstance(done.exception, kind)


MISTAKES = {
    "no such command": (("fly",), "No such command 'fly'; see sparse-optim --help.\n"),
    "no command": (("delta",), "Missing command; see sparse-optim delta --help.\n"),
    "no argument": (("delta", "show"), "Missing argument 'file'; see sparse-optim delta show --help.\n"),
    "no number": (("bench", "--density", "much"), ", got 'much'; see sparse-optim bench --help.\n"),
    "no choice": (("plan", "x", "--policy=all"), "got 'all'; see sparse-optim plan --help.\n"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_line_that_is_no_command_is_one_sentence_and_status_two(name: str) -> None:
    arguments, ending = MISTAKES[name]
    done = call(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    # click of other versions writes names in capitals
    assert done.stderr.lower().endswith(ending.lower())
    assert done.stderr.count("\n") == 1


def test_a_plan_is_the_estimate(folder: Path) -> None:
    policy = TopK(0.01, schedule=Schedule(observe=1))
    expected = estimate_memory(bert(folder), policy=policy, dtype=torch.bfloat16, release_gradients=True)
    asked = ("--dtype", "bfloat16", "--release-gradients")
    assert answer(folder, *asked)["between_steps"] == expected.between_steps
    assert answer(folder / "config.json", *asked, "--density", 0.01)["peak"] == expected.peak
    assert answer(folder, *asked, "--density", 0.1)["masks"] > 9 * expected.masks


OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "policy none": (("--policy", "none"), {"policy": None}),
    "states": (("--policy", "none", "--state-dtype", "float32"), {"state_dtype": torch.float32}),
    "unselected": (("--unselected", "track"), {"unselected": "track"}),
    "statistic dtype": (("--statistic-dtype", "bfloat16"), {"statistic_dtype": torch.bfloat16}),
    "statistic device": (("--statistic-device", "cpu"), {"statistic_device": "cpu"}),
    "unit": (
        ("--release-gradients", "--observe-unit", "microbatch"),
        {"release_gradients": True, "observe_unit": "microbatch"},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_the_estimate(name: str, folder: Path) -> None:
    arguments, settings = OPTIONS[name]
    policy = None if "none" in arguments else TopK(0.01, schedule=Schedule(observe=1))
    expected = estimate_memory(bert(folder), dtype=torch.bfloat16, **({"policy": policy} | settings))
    found = answer(folder, "--dtype", "bfloat16", *arguments)
    assert {key: found[key] for key in found if hasattr(expected, key)} == {
        key: getattr(expected, key) for key in found if hasattr(expected, key)
    }


def test_a_method_brings_its_policy_and_its_exemptions(folder: Path) -> None:
    head = "AutoModelForSequenceClassification"
    model = bert(folder, head)
    made = {
        "child_tuning_d": ChildTuningAdamW(model.parameters(), variant="D", observe_steps=1),
        "dps": DPSAdamW(model.parameters(), variant="dense", update_steps=1),
        "second_order": SecondOrderAdamW(model.parameters(), observe_steps=1),
    }
    for method, optimizer in made.items():
        groups = param_groups(model, method=method)
        expected = estimate_memory(groups, policy=optimizer.policy, unselected=optimizer.unselected)
        found = answer(folder, "--method", method, "--auto-class", head)
        assert (found["peak"], found["states"]) == (expected.peak, expected.states)
    dense = estimate_memory(model).between_steps
    for method in ("child_tuning_f", "grad_drop"):
        assert answer(folder, "--method", method, "--auto-class", head)["between_steps"] == dense
    released = answer(folder, "--method", "child_tuning_d", "--fidelity", "release", "--auto-class", head)
    assert released["moments"] == estimate_memory(model).moments


def test_the_comparison_has_other_optimizers_and_ours(folder: Path) -> None:
    rows = answer(folder, "--compare", "--dtype", "bfloat16")
    plain = bert(folder)
    parameters = sum(p.numel() for p in plain.parameters())
    assert rows["AdamW, float32"]["between_steps"] == 16 * parameters
    assert rows["AdamW, bfloat16"]["between_steps"] == 8 * parameters
    eight_bits = estimate_memory(plain, optimizer="adamw_8bit", dtype=torch.bfloat16)
    assert rows["8-bit AdamW, bfloat16"]["between_steps"] == eight_bits.between_steps
    assert {f"TopK, {d} %{r}" for d in ("0.1", "1", "10") for r in ("", ", released")} < rows.keys()
    released = [rows[f"TopK, {d} %, released"]["between_steps"] for d in ("0.1", "1", "10")]
    assert released == sorted(released) and released[1] < rows["TopK, 1 %"]["between_steps"]
    shown = call("plan", folder, "--compare").stdout
    assert all(name in shown for name in rows)


def test_the_table_has_gib_bytes_per_parameter_and_the_advice(tmp_path: Path) -> None:
    transformers.LlamaConfig(dtype="bfloat16").save_pretrained(tmp_path)
    done = call("plan", tmp_path, "--release-gradients", "--budget", "24GB")
    assert done.exit_code == 0, done.output
    cells = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    # a model of seven billion weights, of which no byte exists
    assert "6,738,415,616 parameters" in done.stdout
    assert ["weights", "12.551", "2.000"] in cells
    assert ["between", "steps", "13.806", "2.200"] in cells
    assert "Activations are not estimated." in done.stdout
    assert "does not fit into 24.00 GB; with release_gradients=True, observe_unit='microbatch'" in done.stdout


WRONG = [
    (("--density", "2"), "density must be in (0, 1], got 2.0; "),
    (("--budget", "many"), "budget must be a size such as 24GB or 80GiB, got 'many'; "),
    (
        ("--method", "dps", "--policy", "topk"),
        "policy must be left out with a method, got 'topk' and 'dps'; ",
    ),
    (("--method", "grad_drop", "--density", "0.1"), "density must be left out for grad_drop, got 0.1; "),
    (("--policy", "none", "--release-gradients"), "release_gradients=True needs "),
    (("--statistic-device", "cuda"), "statistic_device must be 'cpu' or None, got 'cuda'; "),
    (("--auto-class", "AutoModelForNothing"), "auto_class must be a class of transformers, got "),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_bad_settings_are_one_sentence_and_status_two(
    arguments: tuple[str, ...], words: str, folder: Path
) -> None:
    done = call("plan", folder, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == 1


def test_what_is_no_model_is_one_sentence_and_status_two(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "broken.json").write_text("{")
    for wrong in (tmp_path, tmp_path / "broken.json", "no such model"):
        done = call("plan", wrong)
        assert (done.exit_code, done.stdout) == (2, ""), done.output
        assert "config.json" in done.stderr and done.stderr.count("\n") == 1
    assert call("plan").exit_code == 2


def test_sizes_are_read_with_decimal_and_binary_units() -> None:
    sizes = {
        "24GB": 24e9,
        "24 gb": 24e9,
        "80GiB": 80 * 2**30,
        "512MiB": 2**29,
        "1e9": 1e9,
        "7 B": 7.0,
        "1.5TB": 1.5e12,
    }
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for wrong in ("", "GB", "-3GB", "0", "12 parsecs"):
        with pytest.raises(ValueError, match="budget must be a size"):
            parse_bytes(wrong)


# --- bench ------------------------------------------------------------------------------------------------


def bench(*arguments: object) -> Any:
    done = call("bench", "--rounds", 2, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_bench_compares_time_and_state_with_torchs_adamw() -> None:
    found = bench("--parameters", 2e4, "--density", 0.01, "--density", 0.5)
    torchs, dense, drawn, few, half = found["rows"]
    assert torchs.startswith("torch AdamW")
    assert [dense, drawn, few, half] == ["dense", "Bernoulli, 30 %", "TopK, 1 %", "TopK, 50 %"]
    sizes = {name: row["optimizer_bytes"] for name, row in found["rows"].items()}
    assert 8 * found["parameters"] <= sizes[torchs] < 8.1 * found["parameters"] + 8 * found["tensors"]
    # two moments and an index an entry, and a few numbers a tensor
    assert 0 <= sizes[few] - 12 * int(0.01 * found["parameters"]) <= 64 * found["tensors"]
    assert sizes[half] > 5 * sizes[few]
    assert found["rows"][torchs]["times_as_fast"] == 1
    for row in found["rows"].values():
        assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
    shown = call("bench", "--rounds", 2, "--parameters", 2e4).stdout
    assert "times as fast" in shown and "TopK, 10 %" in shown


def test_bench_takes_the_shapes_of_a_config(folder: Path) -> None:
    tensors = list(bert(folder).parameters())
    found = bench(folder, "--density", 0.1)
    assert (found["tensors"], found["parameters"]) == (len(tensors), sum(p.numel() for p in tensors))
    done = call("bench", folder, "--parameters", 1e4)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("parameters must be left out with a model, got 10000.0; ")


def test_bench_measures_nothing_where_a_frozen_entry_moves(monkeypatch: Any) -> None:
    step = cli.MaskedAdamW.step

    def careless(self: Any, closure: Any = None) -> Any:
        step(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] += 1

    monkeypatch.setattr(cli.MaskedAdamW, "step", careless)
    done = call("bench", "--parameters", 2e4, "--density", 0.001, "--rounds", 1)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "TopK, 0.1 % has moved weights that it must not" in str(done.exception)


def test_bench_draws_what_it_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = bench("--parameters", 2e4, "--picture", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "bench.csv").open(newline="") as file:
        drawn = {row["name"]: float(row["ms"]) for row in csv.DictReader(file)}
    assert drawn == pytest.approx({name: row["ms"] for name, row in found["rows"].items()})


WRONG_BENCH = [
    (("--keep", "2"), "keep must be in (0, 1], got 2.0; "),
    (("--density", "0"), "density must be in (0, 1], got 0.0; "),
    (("--rounds", "0"), "rounds must be positive, got 0; "),
    (("--parameters", "3"), "parameters must be in [1e3, 1e11], got 3.0; "),
    (("--device", "abacus"), "device must be cpu"),
    (("--picture", "bench.jpg"), "picture must be a .png file, got 'bench.jpg'; "),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG_BENCH, ids=[" ".join(a) for a, _ in WRONG_BENCH])
def test_what_cannot_be_measured_is_one_sentence_and_status_two(
    arguments: tuple[str, ...], words: str
) -> None:
    done = call("bench", "--parameters", 2e4, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(words) and done.stderr.count("\n") == 1


# --- delta ------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A folder with a base, two models tuned from it, and the deltas of both."""
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(20, 10, generator=generator) for name in ("one.weight", "two.weight")}
    for number, name in enumerate(base):
        changed = base[name].clone()
        changed[number] += 1
        save_file(base | {name: changed}, tmp_path / f"tuned_{number}.safetensors")
    save_file(base, tmp_path / "base.safetensors")
    for number in range(2):
        delta(
            "extract", tmp_path / "base.safetensors", tmp_path / f"tuned_{number}.safetensors",
            "-o", tmp_path / f"delta_{number}.safetensors",
        )  # fmt: skip
    return tmp_path


def delta(*arguments: object) -> Any:
    done = call("delta", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def same_file(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_delta_applies_and_reverts_to_the_bit(tuned: Path) -> None:
    base, file = tuned / "base.safetensors", tuned / "delta_0.safetensors"
    made = delta("apply", base, file, "-o", tuned / "made.safetensors")
    assert (made["changed"], made["entries"], made["mode"]) == (10, 400, "xor")
    assert same_file(tuned / "made.safetensors", tuned / "tuned_0.safetensors")
    delta("revert", tuned / "made.safetensors", file, "-o", tuned / "back.safetensors")
    assert same_file(tuned / "back.safetensors", base)


def test_extracting_takes_a_mode_a_name_and_what_to_ignore(tuned: Path) -> None:
    base, other = tuned / "base.safetensors", tuned / "tuned_1.safetensors"
    options = ("--mode", "add", "--base-model", "ours", "--ignore", "one.*")
    found = delta("extract", base, other, "-o", tuned / "d.safetensors", *options)
    assert (found["mode"], found["base_model"], found["tensors"]) == ("add", "ours", 1)
    words = call("delta", "extract", base, other, "-o", tuned / "d.safetensors").stdout
    assert words.endswith(": 10 changed entries (2.5000%), 0 tensors whole\n")


def test_deltas_of_one_base_merge(tuned: Path) -> None:
    files = [tuned / f"delta_{number}.safetensors" for number in range(2)]
    both = delta("merge", *files, "-o", tuned / "both.safetensors")
    assert (both["changed"], both["conflicts"]) == (20, 0)
    one = delta("merge", *files, "-o", tuned / "one.safetensors", "--without", "two.*")
    assert (one["tensors"], one["changed"]) == (both["tensors"] - 1, 10)
    weighted = ("--how", "sum", "--base", tuned / "base.safetensors", "--weights", "0.5,2")
    delta("merge", *files, "-o", tuned / "sum.safetensors", *weighted)
    delta("apply", tuned / "base.safetensors", tuned / "sum.safetensors", "-o", tuned / "merged.safetensors")
    base, merged = load_file(tuned / "base.safetensors"), load_file(tuned / "merged.safetensors")
    torch.testing.assert_close(merged["one.weight"][0], base["one.weight"][0] + 0.5)
    torch.testing.assert_close(merged["two.weight"][1], base["two.weight"][1] + 2)


def test_a_delta_is_shown_by_tensor(tuned: Path) -> None:
    file = tuned / "delta_1.safetensors"
    found = delta("show", file)
    assert found["per_tensor"]["two.weight"]["changed"] == found["changed"] == 10
    shown = call("delta", "show", file, "--top", 1)
    assert "two.weight" in shown.stdout and "one.weight" not in shown.stdout
    pytest.importorskip("matplotlib")
    assert call("delta", "show", file, "--picture", tuned / "delta.png").exit_code == 0
    assert (tuned / "delta.png").read_bytes().startswith(b"\x89PNG")


def test_pushing_hands_over_the_repository_and_prints_the_address(tuned: Path, monkeypatch: Any) -> None:
    asked = []

    def push(found: Any, repository: str, *, private: bool | None) -> str:
        asked.append((found.info()["changed"], repository, private))
        print("uploading")
        return "https://hub/me/it"

    monkeypatch.setattr("sparse_optim.push_delta", push)
    done = call("delta", "push", tuned / "delta_0.safetensors", "me/it", "--private")
    assert (done.stdout, done.stderr) == ("https://hub/me/it\n", "uploading\n")
    found = delta("push", tuned / "delta_0.safetensors", "me/it")
    assert found == {"url": "https://hub/me/it"}
    assert asked == [(10, "me/it", True), (10, "me/it", None)]


def test_a_repository_that_cannot_be_written_is_one_sentence_and_status_two(
    tuned: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("me/it", "a name/that/is none"):
        done = call("delta", "push", tuned / "delta_0.safetensors", name)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"repository must be one that can be written, got {name!r} (" in done.stderr
        assert done.stderr.count("\n") == 1


WRONG_DELTA = {
    "weights of another base": ("apply", "tuned_1", "delta_0", "weights must be the base's"),
    "no delta": ("apply", "base", "tuned_0", " got "),
    "a file that is not there": ("apply", "base", "delta_9", " got "),
    "a base that is not there": ("apply", "basis", "delta_0", " got "),
}


@pytest.mark.parametrize("name", WRONG_DELTA)
def test_what_is_no_delta_of_a_model_is_one_sentence_and_status_two(
    name: str, tuned: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command, model, file, words = WRONG_DELTA[name]
    output = tuned / "out.safetensors"
    done = call("delta", command, tuned / f"{model}.safetensors", tuned / f"{file}.safetensors", "-o", output)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not output.exists()


def test_weights_of_a_merge_that_are_no_numbers_are_one_sentence_and_status_two(tuned: Path) -> None:
    files = [tuned / f"delta_{number}.safetensors" for number in range(2)]
    done = call("delta", "merge", *files, "-o", tuned / "m.safetensors", "--weights", "1,x")
    assert (done.exit_code, done.stderr) == (2, "weights must be numbers, got '1,x'; write 0.5,0.5.\n")


def test_a_place_that_cannot_be_written_is_one_sentence_and_status_two(tuned: Path) -> None:
    done = call(
        "delta", "extract", tuned / "base.safetensors", tuned / "tuned_0.safetensors",
        "-o", tuned / "no" / "such" / "d.safetensors",
    )  # fmt: skip
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.count("\n") == 1


@pytest.mark.filterwarnings("ignore::Warning:(torch|transformers|accelerate|peft).*")
@pytest.mark.parametrize("kind", ["shira", "supertuning"])
def test_an_adapter_is_loaded_by_peft_and_merges_to_the_tuned_weights(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("datasets")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    words(["[PAD]", "a"]).save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] += 1
    model.save_pretrained(tmp_path / "tuned")
    delta("extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "d.safetensors")
    delta("to-peft", tmp_path / "d.safetensors", tmp_path / "base", "-o", tmp_path / "a", "--kind", kind)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload()
    for name, p in model.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), p)


def words(vocabulary: list[str]) -> Any:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, vocabulary[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=vocabulary[0])
