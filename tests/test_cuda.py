"""The CUDA library without a GPU: what nvcc made of it, and what its kernels do on an emulated one. That they
keep the promises of the verbs is tested in test_backends.py.
"""

import random
import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import test_native
import torch

import sparse_optim
from sparse_optim.backends import native, reference
from sparse_optim.backends.reference import BEYOND_ALL_KEYS, EVERY_TIE, Cuts, Draws

ROOT = Path(sparse_optim.__file__).parent.parent
LIBRARY = sorted(Path(sparse_optim.__file__).parent.glob("_cuda*.so"))
# those that `make test` builds for
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
HYPER = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

needs_library = pytest.mark.skipif(not LIBRARY, reason="sparse_optim/_cuda is not built: it needs nvcc")
needs_compiler = pytest.mark.skipif(bool(emulated.why_not()), reason=emulated.why_not())


def nvcc():
    """Where setup.py would find it."""
    program = "import sys; sys.argv = ['setup.py', '--version']; import setup; print(setup.find_nvcc())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines()[-1] if done.returncode == 0 else "None"


def cuobjdump(*arguments):
    """What CUDA's disassembler says of the library; Triton has a copy of it."""
    triton = pytest.importorskip("triton")
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(program), *arguments, str(LIBRARY[0])]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
def test_where_there_is_a_cuda_compiler_there_is_the_library():
    if nvcc() == "None":
        pytest.skip("no nvcc")
    assert LIBRARY, "nvcc is there, but not sparse_optim/_cuda: `python setup.py build_ext` says why"


@needs_library
def test_the_library_loads_without_a_gpu_and_says_what_it_lacks():
    program = f"""
import torch, sparse_optim
from sparse_optim.backends import native
assert not native._UNUSABLE
torch.ops.load_library({str(LIBRARY[0])!r})
print(torch.ops.sparse_optim.gpu_problem(0))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert done.stdout.strip()
    if torch.version.cuda is None:
        assert done.stdout.strip() == "torch is not a CUDA build"
        assert native.why_not(torch.device("cuda")) == "this torch is not a CUDA build"


@needs_library
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_keeps_registers_in_memory(architecture):
    """Registers that do not fit, and arrays with unknown places, end up in a stack or in local memory."""
    said = cuobjdump("-res-usage", "-arch", architecture)
    if "Function" not in said:
        pytest.skip(f"the library was not built for {architecture}")
    found = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    kernels = {name: tuple(map(int, numbers)) for name, *numbers in found}
    for needed in (
        "update_dense", "update_listed", "accumulate_tiles", "RoundedRow", "count_tiles", "norm_of_selected",
        "norm_of_listed",
    ):  # fmt: skip
        assert any(needed in name for name in kernels), (needed, said[:2000])
    for name, (_, stack, shared, local) in kernels.items():
        assert stack == 0 and local == 0, f"{name}: {stack} bytes of stack, {local} of local memory"
        assert shared <= 48 * 1024, f"{name}: {shared} bytes of shared memory"


@needs_library
def test_full_tiles_are_read_and_written_sixteen_bytes_at_a_time():
    said = cuobjdump("-sass", "-arch", "sm_90")
    if "Function" not in said:
        pytest.skip("the library was not built for sm_90")
    functions = re.split(r"\n\s*Function : ", said)[1:]
    dense = [text for text in functions if "update_dense" in text.partition("\n")[0]]
    fast = [text for text in dense if "3AnyE" not in text.partition("\n")[0]]
    assert len(fast) == 8  # float32, bfloat16 twice and float16, with and without random words
    for text in fast:
        # weight, gradient and two moments at the least; all but the gradient are written
        assert len(re.findall(r"LDG\.E\.128", text)) >= 4, text.partition("\n")[0]
        assert len(re.findall(r"STG\.E\.128", text)) >= 3, text.partition("\n")[0]
    rounded = [text for text in functions if "RoundedRow" in text.partition("\n")[0]]
    fast = [text for text in rounded if "3AnyE" not in text.partition("\n")[0]]
    assert len(fast) == 4  # bfloat16 statistics of bfloat16 and float32 gradients, counted or not
    for text in fast:
        # a thread has as many neighbours as the gradient has in 16 bytes; four are 8 bytes of the statistic
        of_float32 = "DtypeE1EfE" in text.partition("\n")[0]
        wide = 64 if of_float32 else 128
        assert len(re.findall(r"LDG\.E\.128", text)) >= (1 if of_float32 else 2), text.partition("\n")[0]
        assert len(re.findall(rf"STG\.E\.{wide}", text)) >= 1, text.partition("\n")[0]


@needs_library
def test_nothing_is_contracted_into_a_fused_multiplication_and_addition():
    """FFMA is left for divisions and square roots alone, which nvcc builds of it; statistics have neither."""
    said = cuobjdump("-sass", "-arch", "sm_90")
    functions = re.split(r"\n\s*Function : ", said)[1:]
    statistics = [text for text in functions if "accumulate_tiles" in text.partition("\n")[0]]
    if not statistics:
        pytest.skip("the library was not built for sm_90")
    for text in statistics:
        if "3AnyE" not in text.partition("\n")[0]:
            assert "FFMA" not in text, text.partition("\n")[0]
            assert "FMUL" in text and "FADD" in text


def many(count, seed=0):
    """Tensors of many lengths, in more rows than a launch has room for."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + 37 * i % 700 for i in range(count)] + [0, 4096, 9000]
    return [torch.randn(length, generator=generator) for length in lengths]


def clones(tensors):
    return [t.clone() for t in tensors]


def assert_equal(got, want):
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w), (g - w).abs().max()


@needs_compiler
@pytest.mark.parametrize("there", [False, True], ids=["steps_on_the_host", "steps_on_the_gpu"])
def test_a_list_that_needs_several_launches_is_updated_as_a_whole(there):
    cuda = emulated.load()
    params, grads = many(150), many(150, seed=1)
    lr = torch.tensor(0.1, dtype=torch.float64) if there else 0.1
    results = []
    for backend in (cuda, reference):
        new, first, second = clones(params), [torch.zeros_like(p) for p in params], clones(params)
        second = [s.square() for s in second]
        steps = [torch.tensor(float(i)) for i in range(len(params))]
        for _ in range(2):
            backend.adamw_(
                new, grads, first, second, [], steps, **(HYPER | {"lr": lr}),
                seeded=Draws(5, 1, 1 << 31, [*range(len(params))]), unselected="track",
            )  # fmt: skip
        results.append((new, first, second, steps))
    for got, want in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for i in (1, 2):
        for got, want in zip(results[0][i], results[1][i], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert_equal(results[0][3], results[1][3])


@needs_compiler
@pytest.mark.parametrize("counted", [False, True], ids=["plain", "counted"])
def test_rounded_statistics_over_several_launches(counted):
    cuda, results = emulated.load(), []
    for backend in (cuda, reference):
        statistics = [s.bfloat16() for s in many(150)]
        keys, flags = [*range(len(statistics))], [torch.tensor(False) for _ in statistics]
        geometries = [(512 * i, 700, 1000) if i % 2 else (0, 10_000, 10_000) for i in keys]
        counts = torch.zeros(len(keys), 2048, dtype=torch.int64)
        backend.accumulate_(
            statistics, many(150, seed=1), flags, kind="squares", first_counts=counts if counted else None,
            rounding=Draws(5, 2 << 28, 0, keys), geometries=geometries,
        )  # fmt: skip
        results.append([*statistics, *flags, counts])
    assert_equal(*results)
    assert bool(results[0][-1].any()) == counted


@needs_compiler
def test_selection_over_several_launches_is_exact():
    cuda = emulated.load()
    scores = [s.abs().round(decimals=1) for s in many(120)]
    tensors, results = len(scores), []
    cuts = Cuts(torch.full((tensors,), (1 << 31) + 0x3F800000), torch.arange(tensors) * 3)
    cuts.keys[7] = BEYOND_ALL_KEYS
    cuts.last_ties[8] = EVERY_TIE
    for backend in (cuda, reference):
        nothing = torch.zeros(tensors, dtype=torch.int64)
        results.append(
            [
                backend.histogram(scores, shift=21, width=11, prefixes=nothing, per_tensor=True),
                backend.histogram(scores, shift=21, width=11, prefixes=nothing, per_tensor=False),
                *backend.compact(scores, cuts=cuts, as_bits=True),
                *backend.compact(scores, cuts=cuts, as_bits=False),
            ]
        )
    assert_equal(*results)


@needs_compiler
def test_the_list_of_a_large_tensor_is_complete():
    """Places of tiles are added up 4096 at a time; this has one more, and then some entries."""
    scores = torch.zeros(4096 * 4097 + 77, dtype=torch.bfloat16)
    ends = (0, 5, 70_000, 4096**2 - 1, 4096**2, 4096**2 + 3, scores.numel() - 1)
    selected = torch.cat([torch.tensor(ends), torch.arange(4096 * 3000, 4096 * 3010)]).unique()
    scores[selected] = 1
    cuts = Cuts(torch.tensor([0xBF80, 0xBF80]), torch.tensor([EVERY_TIE, EVERY_TIE]))
    both = emulated.load().compact([scores, scores[:5000]], cuts=cuts, as_bits=False)
    assert_equal([listed.long() for listed in both], [selected, selected[:2]])


@needs_compiler
def test_lists_of_entries_over_several_launches():
    cuda = emulated.load()
    tensors = many(120)
    indices = [torch.arange(0, t.numel(), 3, dtype=torch.int32) for t in tensors]
    buffers, deltas = [], []
    for backend in (cuda, reference):
        buffer = [torch.ones(len(i)) for i in indices]
        backend.gather_(buffer, tensors, indices)
        buffers.append(buffer)
        changed = clones(tensors)
        backend.apply_delta_(changed, indices, buffer, mode="add")
        deltas.append(changed)
    assert_equal(*buffers)
    assert_equal(*deltas)
    torch.testing.assert_close(cuda.norm(tensors, indices=indices), reference.norm(tensors, indices=indices))
    torch.testing.assert_close(cuda.norm(tensors), reference.norm(tensors))


@needs_compiler
@pytest.mark.parametrize("bad", [-1, 50, 1 << 30])
def test_an_index_beyond_its_tensor_stops_the_kernel_before_anything_is_written_there(bad):
    """On a GPU the trap ends the context, as a device-side assertion of torch does."""
    cuda = emulated.load()
    guarded = torch.zeros(200)
    param, indices = guarded[50:100], torch.tensor([3, bad], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="trapped"):
        cuda.apply_delta_([param], [indices], [torch.ones(2)])
    assert not guarded[:50].any() and not guarded[100:].any()


@needs_compiler
def test_bad_arguments_are_refused_as_on_the_cpu():
    cuda = emulated.load()
    param, step = torch.zeros(4), torch.zeros(())
    with pytest.raises(RuntimeError, match="grads must have the shape of its parameter"):
        cuda.adamw_([param], [torch.ones(5)], [param.clone()], [param.clone()], [], [step], **HYPER)
    with pytest.raises(RuntimeError, match="unselected must be"):
        cuda.adamw_(
            [param], [torch.ones(4)], [param.clone()], [param.clone()], [], [step], **HYPER,
            unselected="thawed",
        )  # fmt: skip
    assert not param.any()
    for changes, message in (
        ({"keys": []}, "rounding must have one key per tensor, got 0 for 1"),
        ({"geometries": [(0, 3, 3)] * 2}, "geometries must have three numbers per tensor, got 6 for 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            test_native.rounded(cuda, **changes)


@needs_compiler
@pytest.mark.parametrize("geometry", test_native.GEOMETRIES)
def test_results_are_those_of_the_reference(geometry):
    results = test_native.everything(emulated.load(), geometry)
    expected = test_native.everything(reference, geometry)
    for i, (got, want) in enumerate(zip(results, expected, strict=True)):
        rtol, atol = test_native.CLOSE.get(got.dtype, (0, 0))
        torch.testing.assert_close(
            got, want, rtol=rtol, atol=atol, msg=lambda text, i=i: f"result {i}: {text}"
        )


@needs_compiler
@pytest.mark.parametrize("seed", range(4))
def test_any_arguments_end_in_a_result_or_an_exception_and_touch_nothing_else(monkeypatch, seed):
    """As for the CPU; but there an index is refused, here it may have stopped a kernel halfway."""
    # full tiles have paths of their own
    monkeypatch.setattr(test_native, "SIZES", [*test_native.SIZES, 4096, 4097, 8192, 10_000])
    cuda, choose = emulated.load(), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (1 << 19,), dtype=torch.uint8, generator=generator)
    for call in range(600):
        arguments = test_native.Arguments(choose, noise)
        verb = choose.choice(test_native.VERBS)
        given = getattr(arguments, verb)()
        spoiled = choose.choice([0, 0, 1, 1, 2])
        for _ in range(spoiled):
            arguments.spoil(given)
        may_change, before = arguments.may_change(given), arguments.room.clone()
        try:
            getattr(cuda, verb)(**given)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            if not spoiled or "barrier" in str(error):
                raise
        strange = (arguments.room != before) & (may_change == 0)
        assert not strange.any(), f"call {call} of {verb} wrote to {strange.nonzero()[:4].view(-1)}"


FLOATS = test_native.FLOATS
NUMELS = [0, 1, 7, 33, 1024, 4096, 4097, 5000, 9001, 12_288]


class RandomUpdate:
    """The arguments of an update, of which any part may lie in the way of the fast paths: dtypes, alignment,
    geometry, a mask of any form, statistics.
    """

    def __init__(self, seed):
        self.choose, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.numels = self.choose.choices(NUMELS, k=self.choose.choice([1, 1, 2, 3]))
        count = len(self.numels)
        self.dtypes = self.choose.choices(FLOATS, k=count)
        self.mixed = self.choose.random() < 0.5
        self.given = test_native.HYPER | {"eps": 1e-4, "maximize": self.chance(0.3)}
        self.given |= {"beta1": self.choose.choice([0.0, 0.3, 0.9])}
        if self.chance(0.5):
            self.given["lr"] = torch.tensor(0.1, dtype=torch.float64)
        if self.chance(0.3):
            self.given["grad_scale"] = torch.tensor(0.5, dtype=self.choose.choice(FLOATS))
        if self.chance(0.2):
            self.given["found_inf"] = torch.tensor(self.choose.choice([0.0, 1.0]))
        if self.chance(0.7):
            self.given["geometries"] = [self.geometry(max(numel, 1)) for numel in self.numels]
        if self.chance(0.4):
            self.given["rounding"] = self.draws()
        self.given["unselected"] = self.choose.choice(["frozen", "zero_grad", "track"])
        self.given["rescale"] = self.choose.choice([1.0, 2.5])
        self.grads = self.tensors(special=self.chance(0.2))
        # what is written: parameters, both moments, the largest of the second, statistics
        self.written = [self.tensors() for _ in range(2)]
        self.written += [self.tensors(positive=True), self.tensors(positive=True) if self.chance(0.4) else []]
        self.written.append(self.tensors() if self.chance(0.5) else [])
        self.written[0] = [self.tensor(*what) for what in zip(self.numels, self.dtypes, strict=True)]
        counted = [0.0, 5.0, 255.0, 256.0, 2048.0]
        self.steps = [
            torch.tensor(self.choose.choice(counted), dtype=self.choose.choice(FLOATS)) for _ in self.numels
        ]
        if self.written[4]:
            self.given["kind"] = self.choose.choice(["squares", "signed", "absolute"])
            if self.chance(0.5):
                self.given["statistic_scales"] = [torch.tensor(0.3) for _ in self.numels]
        self.scored_by_statistic = False
        match self.choose.randrange(5):
            case 0:
                masks = [torch.rand(n, generator=self.generator) < 0.3 for n in self.numels]
                self.given["bits"] = [reference.pack_bits(mask) for mask in masks]
            case 1:
                self.given["seeded"] = self.draws()
            case 2 | 3:
                keys = [1 << 31, 0xBF000000, 1 << 15, 0xBF00, -5, BEYOND_ALL_KEYS]
                ties = [-1, 0, 500, 4000, 2**40 + 900, EVERY_TIE]
                self.given["cuts"] = Cuts(
                    torch.tensor(self.choose.choices(keys, k=count)),
                    torch.tensor(self.choose.choices(ties, k=count)),
                )
                self.scored_by_statistic = bool(self.written[4]) and self.chance(0.5)
                self.given["scores"] = [t.mul_(4).round_().div_(4) for t in self.tensors(special=True)]

    def chance(self, probability):
        return self.choose.random() < probability

    def tensor(self, numel, dtype, positive=False, special=False):
        before = self.choose.choice([0, 0, 0, 1, 2, 8])
        made = torch.randn(numel + before, generator=self.generator).to(dtype)[before:]
        if positive:
            made.abs_()
        if special and numel:
            for value in (float("nan"), float("inf"), float("-inf"), -0.0):
                made[self.choose.randrange(numel)] = value
        return made

    def tensors(self, **what):
        dtypes = self.choose.choices(FLOATS, k=len(self.numels)) if self.mixed else self.dtypes
        return [self.tensor(n, d, **what) for n, d in zip(self.numels, dtypes, strict=True)]

    def geometry(self, numel):
        inner = self.choose.choice([1, 13, 100, 1500])
        tiles = self.choose.choice([1024, 2048])
        return self.choose.choice(
            [
                (0, numel, numel),
                (self.choose.choice([8, 1023, 1024, 2**33 + 4, 2**40]), numel, numel + 10),
                (self.choose.choice([0, 77, 2**40]), inner, inner + self.choose.choice([0, 1, 1000])),
                (self.choose.choice([0, 7, 1024, 2**33]), tiles, tiles + self.choose.choice([0, 7, 1024])),
                (self.choose.choice([0, 1024]), 1536, 2048),
            ]
        )

    def draws(self):
        threshold = int(self.choose.choice([0, 0.3, 0.5, 1]) * 2**32)
        keys = [self.choose.randrange(2**32) for _ in self.numels]
        seed, draw = self.choose.randrange(2**64), self.choose.randrange(2**32)
        return Draws(seed, draw, threshold, keys, self.chance(0.25))

    def results(self, backend):
        # copies that are as well aligned
        params, firsts, seconds, largest, statistics = (
            [
                torch.empty(0, dtype=t.dtype).set_(t.untyped_storage().clone(), t.storage_offset(), t.shape)
                for t in tensors
            ]
            for tensors in self.written
        )
        steps, flags = clones(self.steps), [torch.tensor(False) for _ in self.numels]
        given = self.given | ({"scores": statistics} if self.scored_by_statistic else {})
        if statistics:
            given |= {"statistics": statistics, "nonfinite": flags}
        backend.adamw_(params, self.grads, firsts, seconds, largest, steps, **given)
        return [*params, *firsts, *seconds, *largest], [*statistics, *steps, *flags]


@needs_compiler
@pytest.mark.parametrize("part", range(4))
def test_any_update_is_that_of_the_reference(part):
    cuda = emulated.load()
    for seed in range(100 * part, 100 * part + 100):
        update = RandomUpdate(seed)
        (got, exact), (want, same) = update.results(cuda), update.results(reference)
        for g, w in zip(exact, same, strict=True):
            torch.testing.assert_close(
                g, w, rtol=0, atol=0, equal_nan=True, msg=lambda t, s=seed: f"{s}: {t}"
            )
        # a parameter is as exact as the coarsest of its moments; none of a wrong mask is as close as this
        coarsest = max(torch.finfo(tensor.dtype).eps for tensor in want)
        close = {"rtol": max(coarsest, 2e-5), "atol": 2e-2 if coarsest > 1e-6 else 2e-5, "equal_nan": True}
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, **close, msg=lambda t, s=seed: f"{s}: {t}")


@needs_compiler
@pytest.mark.parametrize("geometry", [(7, 1024, 2048), (0, 1536, 2048), (0, 1024, 1031), (1024, 2048, 3072)])
def test_rows_that_cut_tiles_of_random_words_are_drawn_entry_by_entry(geometry):
    """Long enough for full tiles, aligned, and each in one way only: offset, length or distance of rows."""
    n = 3 * 4096
    draws = Draws(seed=5, draw=6, threshold=2**31, keys=[7], one_word=False)
    results = []
    for backend in (emulated.load(), reference):
        param, grad = torch.zeros(n), torch.ones(n)
        moments, step = [torch.zeros(n) for _ in range(2)], torch.zeros(())
        backend.adamw_(
            [param],
            [grad],
            moments[:1],
            moments[1:],
            [],
            [step],
            **HYPER,
            seeded=draws,
            geometries=[geometry],
        )
        statistic = torch.ones(n, dtype=torch.bfloat16)
        backend.accumulate_(
            [statistic], [grad * 2**-9], [torch.tensor(False)],
            kind="signed", rounding=draws, geometries=[geometry],
        )  # fmt: skip
        results.append([param != 0, statistic.float()])
    assert_equal(*results)
