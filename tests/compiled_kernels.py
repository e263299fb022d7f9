"""Compiles every Triton kernel ahead of time, for a GPU that need not be there, and prints what came out.

`python tests/compiled_kernels.py 90` writes one JSON object: per variant of a kernel its registers, bytes of
stack, shared memory, and how often each instruction occurs in the machine code; with `table` instead of the
architecture, the table of CONTRIBUTING.md. A process of its own, because the tests themselves run in Triton's
interpreter, which is chosen when kernels are defined.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_optim.backends import triton_kernels as kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
F64, F32, BF16, F16, I32, I16 = tl.float64, tl.float32, tl.bfloat16, tl.float16, tl.int32, tl.int16
TABLE = {"table_ptr": "*i64", "owner_ptr": "*i32"}
GRADS = TABLE | {"grads_ptr": "*i64"}
EVERYTHING, BITS, SEEDED, SCORES = range(4)


def adamw(param=F32, state=F32, mask=EVERYTHING, unselected=0, *, clock=False, **changed):
    pointers = dict(GRADS)
    constants = {
        "numbers_ptr": None, "grad_scale_ptr": None, "found_inf_ptr": None, "statistic_scales_ptr": None,
        "clock_ptr": None, "PARAM": param, "GRAD": param, "EXP_AVG": state, "EXP_AVG_SQ": state,
        "MAX_EXP_AVG_SQ": state,
        "STATISTIC": F32, "SCORE": I32 if mask == SCORES else tl.uint8,
        "ARITHMETIC": F64 if param == F64 else F32, "MASK": mask, "UNSELECTED": unselected,
        "RESCALED": False, "AMSGRAD": False, "ROUNDED": False, "KIND": None, "NUMBERS": False,
    }  # fmt: skip
    if clock:
        del constants["clock_ptr"]
        pointers["clock_ptr"] = "*i64"
    cuts = ("cut_keys_ptr", "last_ties_ptr")
    if mask == SCORES:
        pointers |= dict.fromkeys(cuts, "*i64")
    else:
        constants |= dict.fromkeys(cuts)
    return kernels._adamw_kernel, pointers, constants | changed, 4


def indexed(param=F32, **changed):
    constants = {
        "numbers_ptr": None, "grad_scale_ptr": None, "found_inf_ptr": None, "PARAM": param, "GRAD": param,
        "INDEX": I32, "EXP_AVG": F32, "EXP_AVG_SQ": F32, "MAX_EXP_AVG_SQ": None, "MASTER": None, "AGE": None,
        "ARITHMETIC": F32, "COMPACT": False, "NUMBERS": False,
    }  # fmt: skip
    return kernels._adamw_indexed_kernel, GRADS, constants | changed, 4


def histogram(score=I32, shift=21, kind=None):
    constants = {
        "scales_ptr": None, "ties_ptr": None, "SCORE": score, "STATISTIC": F32 if score == I32 else BF16,
        "GRAD": F32, "KIND": kind, "SHIFT": shift, "WIDTH": 11, "PER_TENSOR": False, "ABSOLUTE": False,
    }  # fmt: skip
    pointers = (TABLE if kind is None else GRADS) | {"counts_ptr": "*i64", "prefixes_ptr": "*i64"}
    return kernels._histogram_kernel, pointers, constants | ({"grads_ptr": None} if kind is None else {}), 8


def compact(form):
    pointers = TABLE | {"cut_keys_ptr": "*i64", "last_ties_ptr": "*i64"}
    rest = {"tile_counts_ptr": "*i32", "tile_ends_ptr": "*i64", "results_ptr": "*i64"}
    used = {"count": ["tile_counts_ptr"], "list": list(rest), "bits": ["results_ptr"]}[form]
    constants = {"SCORE": I32, "ABSOLUTE": False, "RESULT": I32, "LISTING": form != "bits"}
    unused = dict.fromkeys(name for name in rest if name not in used)
    return kernels._compact_kernel, pointers | {name: rest[name] for name in used}, constants | unused, 4


def accumulate(statistic, grad, kind=0, rounded=False):
    constants = {"scales_ptr": None, "STATISTIC": statistic, "GRAD": grad, "KIND": kind, "ROUNDED": rounded}
    return kernels._accumulate_kernel, GRADS, constants, 4


def norm(mask=EVERYTHING, index=None):
    constants = {"clock_ptr": None, "GRAD": F32, "MASK": mask, "INDEX": index}
    return kernels._norm_kernel, GRADS | {"sums_ptr": "*fp64"}, constants, 4


VARIANTS = {
    "adamw_ float32": adamw(),
    "adamw_ bfloat16, float32 moments": adamw(BF16),
    "adamw_ bfloat16": adamw(BF16, BF16),
    "adamw_ float16": adamw(F16, F16),
    "adamw_ float64": adamw(F64, F64),
    "adamw_ amsgrad": adamw(AMSGRAD=True),
    "adamw_ bits, frozen": adamw(mask=BITS),
    "adamw_ seeded, frozen": adamw(mask=SEEDED),
    "adamw_ seeded, zero_grad": adamw(mask=SEEDED, unselected=1),
    "adamw_ seeded, track": adamw(mask=SEEDED, unselected=2),
    "adamw_ seeded by a clock": adamw(mask=SEEDED, unselected=1, clock=True),
    "adamw_ scores, frozen": adamw(mask=SCORES),
    "adamw_ rounded": adamw(BF16, BF16, ROUNDED=True),
    "adamw_ and squares": adamw(KIND=0),
    "adamw_indexed_ float32": indexed(),
    "adamw_indexed_ bfloat16, masters": indexed(BF16, MASTER=F32),
    "adamw_indexed_ ages": indexed(AGE=I32),
    "accumulate_ squares": accumulate(F32, F32),
    "accumulate_ squares, bfloat16": accumulate(BF16, BF16),
    "accumulate_ rounded": accumulate(BF16, BF16, rounded=True),
    "accumulate_ rounded, float32 grads": accumulate(BF16, F32, rounded=True),
    "histogram first round": histogram(),
    "histogram later round": histogram(shift=10),
    "histogram bfloat16": histogram(I16, 5),
    "accumulate_ and histogram": histogram(kind=0),
    "compact count": compact("count"),
    "compact list": compact("list"),
    "compact bits": compact("bits"),
    "norm": norm(),
    "norm seeded": norm(SEEDED),
    "norm of a list": norm(index=I32),
    "remap_": (kernels._remap_kernel, TABLE, {"INDEX": I32, "VALUE": I32}, 4),
    "gather_": (
        kernels._gather_kernel,
        TABLE | {"tensors_ptr": "*i64"},
        {"BUFFER": F32, "VALUE": BF16, "INDEX": I32},
        4,
    ),
    "apply_delta_": (kernels._apply_delta_kernel, TABLE, {"VALUE": I16, "INDEX": I32, "MODE": 2}, 4),
    "clock": (
        kernels._clock_kernel,
        {"table_ptr": "*i64", "numbers_ptr": "*fp64", "lr_ptr": "*fp32"},
        {"found_inf_ptr": None, "beta1_ptr": None, "beta2_ptr": None, "STEP": F32, "AGES": False},
        1,
    ),
}


def disassembled(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return [
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        ]


def report(capability, kernel, pointers, constants, warps):
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
        elif parameter.name in pointers:
            signature[parameter.name] = pointers[parameter.name]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type or "i32"
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    usage, machine_code = disassembled(compiled.asm["cubin"])
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", machine_code)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "instructions": Counter(instructions),
        "philox": "D2511F53" in machine_code.upper() or "2D0EE0AD" in machine_code.upper(),
        "fused": "fma.rn.f32" in compiled.asm["ptx"],
    }


def print_table():
    """Registers for every architecture, and what is alike on all of them."""
    capabilities = (80, 90, 100)
    print("| kernel | " + " | ".join(f"sm_{c}" for c in capabilities) + " | wide loads and stores |")
    print("| --- " * (len(capabilities) + 2) + "|")
    for name, variant in VARIANTS.items():
        found = [report(capability, *variant) for capability in capabilities]
        registers = " | ".join(str(f["registers"]) for f in found)
        wide = [found[1]["instructions"][op] for op in ("LDG.E.128", "STG.E.128")]
        print(f"| {name} | {registers} | {wide[0]}, {wide[1]} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print_table()
    else:
        chosen = sys.argv[2:] or VARIANTS
        json.dump({name: report(int(sys.argv[1]), *VARIANTS[name]) for name in chosen}, sys.stdout)
