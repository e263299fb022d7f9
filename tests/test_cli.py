"""Contract under test: `sparse-optim` prints what `estimate_memory` says, reads configs and no weights, and
answers what is wrong with one sentence and exit status 2.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
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

from typer.testing import CliRunner  # noqa: E402

from sparse_optim.__main__ import report  # noqa: E402
from sparse_optim.cli import app, parse_bytes  # noqa: E402

# torch looks up, once, which functions a device context redirects; within a test these are not torch's own
with torch.device("meta"):
    torch.empty(1)


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


@pytest.mark.parametrize("command", [(), ("info",), ("plan",)], ids=["sparse-optim", "info", "plan"])
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    done = call(*command, "--help")
    assert done.exit_code == 0
    assert f"Example: sparse-optim {' '.join(command) or 'plan'}" in done.stdout


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
