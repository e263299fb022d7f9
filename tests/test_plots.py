"""Contract under test: a picture and the numbers in it are two files, both or neither, and the numbers are
those that counting by hand gives.
"""

from __future__ import annotations

import csv
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_optim import (
    Bernoulli,
    Delta,
    DPSAdamW,
    GradualUnfreezing,
    MaskedAdamW,
    Schedule,
    TensorDelta,
    TopK,
    estimate_memory,
)
from sparse_optim.plots import (
    Churn,
    Cost,
    MaskHistory,
    TensorDensity,
    density_rows,
    draw_churn,
    draw_costs,
    draw_density,
    draw_overlap,
    draw_overlap_by_layer,
    overlap_rows,
)
from sparse_optim.policies import layer_of

matplotlib_image = pytest.importorskip("matplotlib.image")
ROOT = Path(__file__).parent.parent


def change(tensors: Mapping[str, tuple[tuple[int, ...], Tensor | None]]) -> Delta:
    """A delta of tensors of these shapes, and the entries that have changed."""
    parts = {
        name: TensorDelta(
            shape, torch.float32, indices, torch.ones(shape if indices is None else indices.shape)
        )
        for name, (shape, indices) in tensors.items()
    }
    return Delta(parts, "replace")


def bits(text: str, *shape: int) -> Tensor:
    return torch.tensor([bit == "1" for bit in text], dtype=torch.bool).view(shape or (len(text),))


MASKS = {
    "encoder.layer.0.attention.query.weight": bits("110000", 2, 3),
    "encoder.layer.0.attention.query.bias": bits("10"),
    "encoder.layer.1.attention.query.weight": bits("000001", 2, 3),
    "encoder.layer.1.attention.query.bias": bits("11"),
    "classifier.weight": bits("0000"),
}


def drawn(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV file, once the picture beside it is seen not to be blank."""
    picture = matplotlib_image.imread(path)
    assert picture.ndim == 3 and picture[..., :3].std() > 0.02
    with path.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> tuple[int, int]:
    return matplotlib_image.imread(path).shape[:2]


def columns(rows: list[dict[str, str]], *names: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


def stepped(optimizer: MaskedAdamW, *grads: float) -> MaskedAdamW:
    """One step for each gradient's factor; entry e of a tensor has a gradient that grows with e."""
    for grad in grads:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = grad * torch.arange(1.0, p.numel() + 1).view(p.shape)
        optimizer.step()
    return optimizer


def weight(entries: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(entries))


# density


@pytest.mark.parametrize(
    ("name", "module_type"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", "attention.self.query"),
        ("bert.encoder.layer.3.attention.output.LayerNorm.weight", "attention.output.LayerNorm"),
        ("bert.encoder.layer.3.output.dense.bias", "bias"),
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings"),
        ("model.layers.11.mlp.gate_proj.weight", "mlp.gate_proj"),
        ("model.layers.11.input_layernorm.weight", "input_layernorm"),
        ("model.layers.11.mlp.experts.7.w1.weight", "mlp.experts.w1"),
        ("layers.2.self_attn.in_proj_weight", "self_attn.in_proj_weight"),
        ("layers.2.self_attn.in_proj_bias", "bias"),
        ("lm_head.weight", "lm_head"),
        ("0.weight", "weight"),
        ("scales.4", "scales"),
        ("4", "4"),
    ],
)
def test_names_of_bert_and_llama_have_layers_and_module_types(name, module_type):
    (row,) = density_rows({name: bits("1")})
    # the layers are those that a policy draws
    assert (row.layer, row.module_type) == (layer_of(name), module_type)


def test_the_density_file_has_what_counting_by_hand_gives(tmp_path):
    path = tmp_path / "density.png"
    returned = draw_density(MASKS, path)
    rows = columns(drawn(path), "by", "name", "entries", "selected", "density")
    assert rows == [
        ("layer", "encoder.layer.0", "8", "3", "0.375"),
        ("layer", "encoder.layer.1", "8", "3", "0.375"),
        ("layer", "classifier", "4", "0", "0.0"),
        ("module type", "attention.query", "12", "3", "0.25"),
        ("module type", "bias", "4", "3", "0.75"),
        ("module type", "classifier", "4", "0", "0.0"),
    ]
    assert [tuple(map(str, row)) for row in returned] == rows


def test_masks_and_a_delta_that_select_the_same_have_the_same_rows():
    tensors = {
        name: (tuple(mask.shape), mask.flatten().nonzero().flatten().int()) for name, mask in MASKS.items()
    }
    # where all has changed there is no list
    tensors["encoder.layer.1.attention.query.bias"] = ((2,), None)
    assert density_rows(change(tensors)) == density_rows(MASKS)


def test_an_optimizer_has_the_rows_of_its_masks():
    small, large = weight(4), weight(10)
    policy = TopK(0.5, schedule=Schedule(observe=1))
    optimizer = MaskedAdamW([("a.0.w", small), ("a.1.w", large)], policy=policy)
    stepped(optimizer, 1.0)
    # what was observed has trained nothing; next are the seven largest, 4 of the first and 5 to 10
    assert [row.selected for row in density_rows(optimizer)] == [0, 0]
    assert [row.selected for row in density_rows(optimizer, upcoming=True)] == [1, 6]
    stepped(optimizer, 1.0)
    masks = {"a.0.w": optimizer.mask(small), "a.1.w": optimizer.mask(large)}
    assert density_rows(optimizer) == density_rows(masks)
    assert density_rows(optimizer)[1] == TensorDensity("a.1.w", "a.1", "w", 10, 6, 0.6)


def test_nothing_is_selected_of_parameters_that_the_optimizer_does_not_have():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = stepped(MaskedAdamW(model[1].parameters()), 1.0)
    rows = density_rows(optimizer, model.named_parameters())
    assert [(row.name, row.density) for row in rows] == [
        ("0.weight", 0.0),
        ("0.bias", 0.0),
        ("1.weight", 1.0),
        ("1.bias", 1.0),
    ]


def test_a_share_of_nothing_is_an_empty_cell(tmp_path):
    path = tmp_path / "density.png"
    draw_density({"a.w": bits(""), "b.w": bits("1")}, path)
    assert columns(drawn(path), "name", "density")[:2] == [("a", ""), ("b", "1.0")]
    assert math.isnan(density_rows({"a.w": bits("")})[0].density)


def test_many_layers_with_long_names_make_the_picture_longer_not_wider(tmp_path):
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    draw_density({f"layer.{i}.w.weight": bits("10") for i in range(2)}, few)
    long = "a_model_of_somebody.with_long_names.encoder.layer"
    draw_density({f"{long}.{i}.attention.weight": bits("10") for i in range(24)}, many)
    assert len(drawn(many)) == 25
    assert pixels(many)[1] == pixels(few)[1]
    # 22 bars more, none of them thinner than a line of text
    assert pixels(many)[0] - pixels(few)[0] > 22 * 25


# overlap


def test_overlap_and_chance_are_what_counting_by_hand_gives(tmp_path):
    path = tmp_path / "overlap.png"
    first = {"a.0.w": bits("11110000"), "a.1.w": bits("11")}
    second = {"a.0.w": bits("00111100"), "a.1.w": bits("11")}
    returned = draw_overlap({"first": first, "second": second}, path)
    row = returned[1]
    assert row[:8] == ("", "first", "second", 10, 6, 6, 4, 8)
    assert row.overlap == 0.5
    # of two times 6 in 10 entries 3.6 meet by chance; of 4 in 8 and 2 in 2 it is 2 + 2
    assert row.chance == pytest.approx(3.6 / (12 - 3.6), rel=1e-15)
    assert row.chance_by_tensor == 4 / 8
    rows = drawn(path)
    pairs = [("first", "first"), ("first", "second"), ("second", "second")]
    assert columns(rows, "first", "second") == pairs
    assert columns(rows, "overlap", "chance") == [(str(r.overlap), str(r.chance)) for r in returned]
    assert [row.overlap for row in returned] == [1.0, 0.5, 1.0]


def test_overlap_by_layer_counts_each_layer_for_itself(tmp_path):
    path = tmp_path / "layers.png"
    first = {"a.0.w": bits("1100"), "a.0.v": bits("10"), "a.1.w": bits("0000"), "b.w": bits("10")}
    second = {"a.0.w": bits("0110"), "a.0.v": bits("10"), "a.1.w": bits("0000"), "b.w": bits("01")}
    draw_overlap_by_layer({"first": first, "second": second}, path)
    wanted = ("layer", "entries", "selected_first", "selected_second", "intersection", "union", "overlap")
    assert columns(drawn(path), *wanted) == [
        ("a.0", "6", "3", "3", "2", "4", "0.5"),
        # nothing is selected there by either
        ("a.1", "4", "0", "0", "0", "0", ""),
        ("b", "2", "1", "1", "0", "2", "0.0"),
    ]


def test_random_masks_overlap_as_chance_says():
    masks = {str(seed): {"w": torch.rand(200_000) < share} for seed, share in enumerate((0.3, 0.1))}
    row = overlap_rows(masks)[1]
    assert row.overlap == pytest.approx(row.chance, rel=0.03)
    assert row.chance == pytest.approx(0.03 / 0.37, rel=0.03)


def test_optimizers_masks_and_deltas_are_compared_with_each_other():
    p = weight(8)
    optimizer = MaskedAdamW([("w", p)], policy=TopK(0.5, schedule=Schedule(observe=1)))
    stepped(optimizer, 1.0, 1.0)
    delta = change({"w": ((8,), torch.tensor([6, 7], dtype=torch.int32))})
    rows = overlap_rows({"mask": optimizer, "changed": delta, "all": {"w": torch.ones(8, dtype=torch.bool)}})
    overlaps = {(row.first, row.second): row.overlap for row in rows}
    assert overlaps["mask", "changed"] == 0.5
    assert overlaps["mask", "all"] == 0.5
    assert overlaps["changed", "all"] == 0.25


def test_a_tensor_without_a_selected_entry_may_be_in_one_selection_alone():
    # a delta lists buffers too, which an optimizer does not have
    changed = {"buffer": bits("000"), "w": bits("10")}
    assert overlap_rows({"mask": {"w": bits("11")}, "changed": changed})[1][3:8] == (2, 2, 1, 1, 2)
    changed["buffer"] = bits("001")
    with pytest.raises(ValueError, match="got 'buffer' in 'changed' but not in 'mask'; name"):
        overlap_rows({"mask": {"w": bits("11")}, "changed": changed})


# churn


def recorded(optimizer: MaskedAdamW, steps: int) -> MaskHistory:
    history = MaskHistory()
    for step in range(steps):
        history.record(stepped(optimizer, 1.0 + step), step)
    return history


def same(rows: list[Churn], *wanted: tuple[float, ...]) -> bool:
    pairs = zip(rows, wanted, strict=True)
    return all(list(row) == pytest.approx(list(other), nan_ok=True) for row, other in pairs)


def test_bernoulli_masks_churn_as_their_masks_say():
    optimizer, history, masks = MaskedAdamW([weight(1001)], policy=Bernoulli(0.5)), MaskHistory(), []
    for step in range(4):
        stepped(optimizer, 1.0)
        masks.append(optimizer.mask(optimizer.param_groups[0]["params"][0]))
        row = history.record(optimizer, 10 * step)
        assert (row.step, row.density) == (10 * step, optimizer.density())
        if step:
            new = (masks[-1] & ~masks[-2]).sum() / masks[-1].sum()
            with_first = (masks[-1] & masks[0]).sum() / (masks[-1] | masks[0]).sum()
            assert row.entered == pytest.approx(new.item())
            assert row.overlap_with_first == pytest.approx(with_first.item())
    assert history.rows[-1] == row and len(history.rows) == 4


def test_a_schedule_that_trains_nothing_while_observing_has_no_ratios_then():
    policy = TopK(0.5, schedule=Schedule(observe=2))
    history = recorded(MaskedAdamW([weight(4)], policy=policy), 4)
    nan = math.nan
    assert same(history.rows, (0, 0, nan, nan), (1, 0, nan, nan), (2, 0.5, 1, 1), (3, 0.5, 0, 1))


def test_dps_alternates_between_everything_and_its_selection():
    history = recorded(DPSAdamW([weight(10)], variant="dense", update_steps=1, density=0.2), 4)
    assert same(history.rows, (0, 1, math.nan, 1), (1, 0.2, 0, 0.2), (2, 1, 0.8, 1), (3, 0.2, 0, 0.2))


def test_gradual_unfreezing_keeps_what_it_has():
    params = [("layer.0.w", weight(5)), ("layer.1.w", weight(3)), ("head.w", weight(2))]
    history = recorded(MaskedAdamW(params, policy=GradualUnfreezing(every=1)), 3)
    assert same(history.rows, (0, 0.2, math.nan, 1), (1, 0.5, 0.6, 0.4), (2, 1, 0.5, 0.2))


def test_a_history_keeps_two_bits_for_each_entry_however_long_it_is():
    history = MaskHistory()
    optimizer = MaskedAdamW([weight(80_000)], policy=Bernoulli(0.5))
    for step in range(5):
        history.record(stepped(optimizer, 1.0), step)
    assert len(pickle.dumps(history)) < 2 * 80_000 / 8 + 2000


def test_the_churn_file_has_every_record_of_every_history(tmp_path):
    policy = TopK(0.5, schedule=Schedule(observe=1))
    once = recorded(MaskedAdamW([weight(4)], policy=policy), 2)
    dps = recorded(DPSAdamW([weight(10)], variant="dense", update_steps=1, density=0.2), 2)
    draw_churn({"once": once, "dps": dps}, tmp_path / "churn.png")
    wanted = ("history", "step", "density", "entered", "overlap_with_first")
    assert columns(drawn(tmp_path / "churn.png"), *wanted) == [
        ("once", "0", "0.0", "", ""),
        ("once", "1", "0.5", "1.0", "1.0"),
        ("dps", "0", "1.0", "", "1.0"),
        ("dps", "1", "0.2", "0.0", "0.2"),
    ]
    draw_churn(once, tmp_path / "one.png")
    assert columns(drawn(tmp_path / "one.png"), "history") == [("",), ("",)]


@pytest.mark.parametrize("step", [3, 2, -1, True, 4.0], ids=str)
def test_a_step_that_is_not_later_is_refused_and_not_recorded(step):
    history, optimizer = MaskHistory(), stepped(MaskedAdamW([weight(2)]), 1.0)
    history.record(optimizer, 3)
    with pytest.raises(ValueError, match="step must be an integer above 3, got "):
        history.record(optimizer, step)
    with pytest.raises(
        ValueError, match="the optimizer must have the 1 parameters of the record before, got 2"
    ):
        history.record(MaskedAdamW([weight(2), weight(3)]), 4)
    with pytest.raises(TypeError, match="optimizer must be one of sparse_optim, got AdamW; "):
        history.record(torch.optim.AdamW([weight(2)]), 4)
    assert [row.step for row in history.rows] == [3]


# costs


def test_the_file_of_costs_has_bytes_by_kind_and_multiples_of_adamws(tmp_path):
    path = tmp_path / "costs.png"
    costs = [
        ("TopK", {"weights": 400, "states": 100, "masks": 0}, 3.0),
        ("AdamW", {"weights": 400, "gradients": 400, "states": 800.0}, 4.0),
        Cost("LoRA", {"weights": 800}),
    ]
    returned = draw_costs(costs, path)
    rows = drawn(path)
    # nobody has masks here
    kinds = ["weights", "states", "gradients"]
    multiples = ["times_the_bytes", "times_the_ms"]
    assert list(rows[0]) == ["name", "is_adamw", *kinds, "total", "peak", "ms", *multiples]
    assert [list(row.values()) for row in rows] == [
        ["TopK", "False", "400", "100", "0", "500", "", "3.0", "0.3125", "0.75"],
        ["AdamW", "True", "400", "800.0", "400", "1600.0", "", "4.0", "1.0", "1.0"],
        ["LoRA", "False", "800", "0", "0", "800", "", "", "0.5", ""],
    ]
    assert [row["ms"] for row in returned] == [3.0, 4.0, None]


def test_estimates_are_drawn_with_what_lives_between_steps_and_their_peak(tmp_path):
    path = tmp_path / "costs.png"
    model, policy = nn.Linear(100, 100), TopK(0.01, schedule=Schedule(observe=1))
    dense, sparse = estimate_memory(model, optimizer="adamw_fused"), estimate_memory(model, policy=policy)
    draw_costs([Cost("theirs", dense), Cost("ours", sparse)], path, adamw="theirs")
    rows = drawn(path)
    assert columns(rows, "total", "peak") == [
        (str(dense.between_steps), str(dense.peak)),
        (str(sparse.between_steps), str(sparse.peak)),
    ]
    assert columns(rows, "states", "is_adamw")[0] == (str(dense.states), "True")


# files


def keep_old(folder: Path) -> tuple[Path, dict[str, bytes]]:
    path = folder / "density.png"
    draw_density(MASKS, path)
    old = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert old.keys() == {"density.png", "density.csv"}
    return path, old


@pytest.mark.parametrize("fails", ["picture", "numbers", "disk"])
def test_a_failure_while_writing_leaves_both_old_files_and_nothing_else(tmp_path, monkeypatch, fails):
    path, old = keep_old(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    where = {
        "picture": "matplotlib.figure.Figure.savefig",
        "numbers": "csv.writer",
        "disk": "os.replace",
    }
    monkeypatch.setattr(where[fails], fail)
    with pytest.raises(OSError, match="no space left"):
        draw_density({"other": bits("111")}, path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


def test_a_process_killed_while_writing_leaves_both_old_files(tmp_path):
    path, old = keep_old(tmp_path)
    # killed with a part of the picture written
    program = f"""
import os, signal, torch
from matplotlib.figure import Figure
from sparse_optim.plots import draw_density

def half(figure, place, **options):
    with open(place, "wb") as file:
        file.write(b"half a picture")
    os.kill(os.getpid(), signal.SIGKILL)

Figure.savefig = half
draw_density({{"other": torch.ones(3, dtype=torch.bool)}}, {str(path)!r})
"""
    died = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert died.returncode == -9, died.stderr
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {name: left[name] for name in old} == old


def test_files_get_the_permissions_that_new_files_have(tmp_path):
    path, _ = keep_old(tmp_path)
    (tmp_path / "new").touch()
    mode = (tmp_path / "new").stat().st_mode
    assert [path.stat().st_mode, path.with_suffix(".csv").stat().st_mode] == [mode, mode]


def test_drawing_needs_no_display_and_leaves_pyplot_alone(tmp_path):
    program = f"""
import sys, torch
from sparse_optim.plots import draw_density
assert "matplotlib" not in sys.modules
draw_density({{"w": torch.ones(3, dtype=torch.bool)}}, {str(tmp_path / "density.png")!r})
print("matplotlib.pyplot" in sys.modules)
"""
    clean = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    # a backend that would need a display
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=clean | {"MPLBACKEND": "TkAgg"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("False\n", "")


# what is refused


DRAWN = {
    "density": lambda path: draw_density(MASKS, path),
    "overlap": lambda path: draw_overlap({"a": MASKS, "b": MASKS}, path),
    "overlap_by_layer": lambda path: draw_overlap_by_layer({"a": MASKS, "b": MASKS}, path),
    "churn": lambda path: draw_churn(recorded(MaskedAdamW([weight(2)]), 1), path),
    "costs": lambda path: draw_costs([("AdamW", {"states": 8})], path),
}


@pytest.mark.parametrize("name", DRAWN)
def test_without_matplotlib_one_sentence_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match=rf"draw_{name} needs matplotlib, got none .*'sparse_optim\[plots\]'\.$"
    ):
        DRAWN[name](tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", DRAWN)
def test_bad_paths_are_refused(tmp_path, name):
    (tmp_path / "taken.csv").mkdir()
    bad = {
        "picture.pdf": "must end in .png, got ",
        "missing/picture.png": "must be in a folder that exists, got ",
        "taken.png": "must not be taken by a folder, got ",
    }
    for path, reason in bad.items():
        with pytest.raises(ValueError, match=f"^path {reason}.*; .*\\.$"):
            DRAWN[name](tmp_path / path)
    assert [file.name for file in tmp_path.iterdir()] == ["taken.csv"]


def unnamed() -> MaskedAdamW:
    return MaskedAdamW([weight(2)])


ADAMW = ("AdamW", {"states": 8})
BAD = {
    "a_tensor": (lambda: density_rows(bits("1")), TypeError, "selection must be an optimizer .*got Tensor; "),
    "torchs_optimizer": (
        lambda: density_rows(torch.optim.AdamW([weight(1)])),
        TypeError,
        "selection must be an optimizer of sparse_optim, masks by name or a delta, got AdamW; ",
    ),
    "a_number_as_mask": (lambda: density_rows({"w": 3}), TypeError, "tensors by name, got int for 'w'; "),
    "a_float_mask": (
        lambda: density_rows({"w": torch.ones(2)}),
        ValueError,
        "masks must be bool, got torch.float32 for 'w'; write mask != 0",
    ),
    "no_masks": (lambda: density_rows({}), ValueError, "at least one tensor, got none; "),
    "no_tensors_in_a_delta": (
        lambda: density_rows(change({})),
        ValueError,
        "at least one tensor, got none; ",
    ),
    "an_optimizer_without_names": (
        lambda: density_rows(unnamed()),
        ValueError,
        "must know its parameters' names, got one that was made without; pass model.named_parameters",
    ),
    "names_of_another_model": (
        lambda: density_rows(unnamed(), nn.Linear(1, 1).named_parameters()),
        ValueError,
        r"got 1 fewer, the first of shape \(2,\); ",
    ),
    "parameters_without_names": (
        lambda: density_rows(unnamed(), [weight(2)]),
        TypeError,
        "pairs of name and tensor, got Parameter; ",
    ),
    "names_beside_masks": (
        lambda: density_rows(MASKS, [("w", weight(2))]),
        ValueError,
        "must be left out unless an optimizer is given, got them with dict; ",
    ),
    "one_selection": (lambda: overlap_rows({"a": MASKS}), ValueError, r"two or more by name, got \['a'\]; "),
    "selections_in_a_list": (lambda: overlap_rows([MASKS, MASKS]), ValueError, "by name, got list; "),
    "other_sizes": (
        lambda: overlap_rows({"a": {"w": bits("11")}, "b": {"w": bits("110")}}),
        ValueError,
        "same size in every selection, got 2 entries in 'a' and 3 in 'b'; ",
    ),
    "nothing_in_common": (
        lambda: overlap_rows({"a": {"w": bits("0")}, "b": {"v": bits("0")}}),
        ValueError,
        "a tensor in common, got none for 'a', 'b'; ",
    ),
    "three_by_layer": (
        lambda: draw_overlap_by_layer(dict.fromkeys("abc", MASKS), "x.png"),
        ValueError,
        "must be two for an overlap by layer, got 3; draw_overlap takes more",
    ),
    "no_record": (lambda: draw_churn({"a": MaskHistory()}, "x.png"), ValueError, "got none in 'a'; "),
    "no_history": (lambda: draw_churn({}, "x.png"), ValueError, "got none in no history; "),
    "rows_as_history": (lambda: draw_churn([], "x.png"), TypeError, "must be a MaskHistory .*got list; "),
    "no_adamw": (
        lambda: draw_costs([("TopK", {"states": 8})], "x.png"),
        ValueError,
        r"adamw must be the name of one of the costs, got 'AdamW' beside \['TopK'\]; ",
    ),
    "a_name_twice": (lambda: draw_costs([ADAMW, ADAMW], "x.png"), ValueError, "got 'AdamW' twice; "),
    "negative_bytes": (
        lambda: draw_costs([("AdamW", {"states": -8})], "x.png"),
        ValueError,
        "bytes of 'states' of 'AdamW' must be a finite number from 0 on, got -8; ",
    ),
    "endless_time": (
        lambda: draw_costs([(*ADAMW, math.inf)], "x.png"),
        ValueError,
        "ms of 'AdamW' must be a finite number from 0 on, got inf; ",
    ),
    "a_kind_named_total": (
        lambda: draw_costs([("AdamW", {"total": 8})], "x.png"),
        ValueError,
        "kinds of 'AdamW' must not be called 'total'",
    ),
    "bytes_without_kinds": (
        lambda: draw_costs([("AdamW", 8)], "x.png"),
        TypeError,
        "sizes of 'AdamW' must be bytes by kind or what estimate_memory returns, got int; ",
    ),
    "a_name_alone": (
        lambda: draw_costs(["AdamW"], "x.png"),
        TypeError,
        "Cost.name, sizes, ms., got 'AdamW'; ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_no_file(tmp_path, monkeypatch, name):
    call, error, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as raised:
        call()
    text = str(raised.value)
    assert text.endswith(".") and text.count("; ") == 1 and "\n" not in text
    assert list(tmp_path.iterdir()) == []
