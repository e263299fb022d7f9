"""Steps in graphs: torch.compile takes a step whole, CUDA graphs replay one, and a GradScaler need not wait.

What a GPU alone can show is marked so. Everything else runs here: a step that believes in a capture counts on
"the device" only, which is what a replay does.
"""

import copy
import io
import shutil

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from sparse_optim import (
    Bernoulli,
    GradualUnfreezing,
    MaskedAdamW,
    Schedule,
    SignedGradient,
    SquaredGradient,
    TopK,
    backends,
)
from sparse_optim.backends import native, reference

POLICIES = {
    "dense": {},
    "dense_max_norm": {"max_grad_norm": 0.1},
    "bernoulli": {"policy": Bernoulli(0.3)},
    "bernoulli_clipped": {"policy": Bernoulli(0.3, rescale=True), "max_grad_norm": 0.1},
    "bernoulli_tensors": {"policy": Bernoulli(0.5, unit="tensor"), "unselected": "track"},
    "bernoulli_layers": {"policy": Bernoulli(0.5, unit="layer"), "unselected": "zero_grad"},
    "top_k_list": {"policy": TopK(0.2, schedule=Schedule(observe=2))},
    "top_k_bits": {"policy": TopK(0.2, schedule=Schedule(observe=2)), "unselected": "zero_grad"},
}
# whose steps go on differing
CHANGING = {
    "bernoulli_every_2": {"policy": Bernoulli(0.3, every=2)},
    "alternating": {"policy": TopK(0.2, schedule=Schedule(observe=1, train=2))},
    "observe_and_train": {"policy": TopK(0.2, schedule=Schedule(observe=2, train=2, meanwhile="everything"))},
    "unfreezing": {"policy": GradualUnfreezing(every=2)},
}
every_policy = pytest.mark.parametrize("options", [pytest.param(v, id=k) for k, v in POLICIES.items()])
every_method = pytest.mark.parametrize(
    "options", [pytest.param(v, id=k) for k, v in (POLICIES | CHANGING).items()]
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


# on the CPU, where numbers that a kernel reads are near anyway
LEAVES_NUMBERS = [name for name in backends.available(torch.device("cpu")) if name != "reference"]


def on_backends(names, policies):
    """Policies, dtypes and backends; a few of them in Triton's interpreter, which takes seconds for each."""
    few = ("bernoulli", "bernoulli_layers", "top_k_list")
    return pytest.mark.parametrize(
        ("options", "dtype", "backend"),
        [
            pytest.param(options, dtype, name, id=f"{policy}-{str(dtype).removeprefix('torch.')}-{name}")
            for name in names
            for policy, options in policies.items()
            for dtype in (torch.float32, torch.bfloat16)
            if name != "triton" or (policy in few and dtype == torch.bfloat16)
        ],
    )


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return model.to(dtype)


def give_gradients(model, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        # sixteenths, which no scale and no dtype rounds
        grad = torch.randint(-16, 17, p.shape, generator=generator) / 16
        p.grad = (grad * scale).to(p.dtype)


def optimizer_of(model, options, **more):
    dtype = next(model.parameters()).dtype
    rounds = {"stochastic_rounding": True} if dtype == torch.bfloat16 else {}
    return MaskedAdamW(model.named_parameters(), **{"lr": 1e-2, "seed": 7, **rounds, **options, **more})


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(map(torch.equal, a, b))


def same_state(a, b):
    """Two state dicts that hold the same bits."""
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for own, other in zip(a["state"].values(), b["state"].values(), strict=True):
        assert own.keys() == other.keys()
        for key, value in own.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


# --- torch.compile ----------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """`torch.compile(..., fullgraph=True)`, and how many graphs it made. Nothing of earlier tests is left."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def compile_(function, **options):
        return torch.compile(function, **{"fullgraph": True, "backend": count, **options})

    compile_.graphs = graphs
    yield compile_
    torch._dynamo.reset()


def train(options, compile_, *, lr, dtype=torch.float32, steps=7):
    model = small_model(dtype)
    optimizer = optimizer_of(model, options, lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
    schedule = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)

    def step():
        # not optimizer.step(): the schedule has put a wrapper there that torch.compile does not enter
        type(optimizer).step(optimizer)

    if compile_ is not None:
        step = compile_(step)
    for number in range(steps):
        give_gradients(model, number)
        if compile_ is None:
            optimizer.step()
        else:
            step()
        schedule.step()
    return weights(model), optimizer.state_dict()


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@every_method
def test_a_compiled_step_is_one_graph_for_the_whole_schedule_with_the_same_bits(compiled, options, lr):
    expected, state = train(options, None, lr=lr)
    got, own_state = train(options, compiled, lr=lr)
    assert equal(got, expected)
    same_state(own_state, state)
    assert len(compiled.graphs) == 1
    assert not equal(got, weights(small_model()))


@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@both_dtypes
def test_inductor_runs_a_compiled_step_as_it_is(compiled, dtype):
    options = POLICIES["bernoulli"]
    got, _ = train(options, lambda step: compiled(step, backend="inductor"), lr=1e-2, dtype=dtype, steps=3)
    expected, _ = train(options, None, lr=1e-2, dtype=dtype, steps=3)
    assert equal(got, expected)


def test_a_step_with_a_schedule_compiles_around_the_wrapper_of_the_schedule(compiled):
    runs = []
    for compile_ in (lambda function: function, lambda function: compiled(function, fullgraph=False)):
        model = small_model()
        optimizer = optimizer_of(model, POLICIES["top_k_list"])
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = compile_(lambda optimizer=optimizer: optimizer.step())
        for number in range(5):
            give_gradients(model, number)
            step()
            schedule.step()
        runs.append(weights(model))
    assert equal(*runs)


def test_a_training_step_compiles_as_a_whole(compiled):
    """What happens to a parameter in the graph before the step, and after it, stays in order."""
    runs = []
    # the last lets the step work on copies of parameters, and stores them at its end
    for compile_ in (
        lambda function: function,
        compiled,
        lambda function: compiled(function, backend="aot_eager"),
    ):
        model, average = small_model(), [torch.zeros_like(p) for p in small_model().parameters()]
        optimizer = optimizer_of(model, POLICIES["bernoulli"])

        @torch.no_grad()
        def step(model=model, average=average, optimizer=optimizer):
            for p in model.parameters():
                p.mul_(1.01)
                p.grad.mul_(2)
            optimizer.step()
            for mean, p in zip(average, model.parameters(), strict=True):
                mean.lerp_(p, 0.5)

        step = compile_(step)
        for number in range(4):
            give_gradients(model, number)
            step()
        runs.append([*weights(model), *average])
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


@pytest.mark.parametrize("scaled_in_the_graph", [False, True])
def test_gradients_are_the_same_objects_after_a_compiled_step(compiled, scaled_in_the_graph):
    model = small_model()
    optimizer = optimizer_of(model, POLICIES["bernoulli"])

    @torch.no_grad()
    def scale_and_step():
        for p in model.parameters():
            p.grad.mul_(2)
        optimizer.step()

    step = compiled(lambda: optimizer.step())
    if scaled_in_the_graph:
        # what the step then gets are other tensors
        step = compiled(scale_and_step, backend="aot_eager")
    for number in range(2 if scaled_in_the_graph else 3):
        give_gradients(model, number)
        if number == 2:
            optimizer.param_groups[0]["betas"] = (0.9, None)
        before, gradients = weights(model), [p.grad for p in model.parameters()]
        if number == 2:
            with pytest.raises((TypeError, RuntimeError)):
                step()
            assert torch.is_grad_enabled()
        else:
            step()
        assert all(p.grad is grad for p, grad in zip(model.parameters(), gradients, strict=True))
    assert equal(weights(model), before) != scaled_in_the_graph


@pytest.mark.parametrize("former", ["without_a_gradient", "with_its_gradient"])
def test_a_compiled_step_trains_a_parameter_that_took_the_place_of_another(compiled, former):
    runs = []
    for compile_ in (lambda function: function, compiled):
        model = small_model()
        optimizer = optimizer_of(model, POLICIES["dense"])
        step = compile_(lambda optimizer=optimizer: optimizer.step())
        for number in range(5):
            if number == 2:
                old, model[0].weight = model[0].weight, nn.Parameter(model[0].weight.detach() * 5)
                optimizer.param_groups[0]["params"][0] = model[0].weight
                if former == "without_a_gradient":
                    old.grad = None
            if number == 3:
                optimizer.param_groups[0]["params"].append(extra := nn.Parameter(torch.ones(3)))
                optimizer.param_groups[0]["param_names"].append("extra")
            give_gradients(model, number)
            if number >= 3:
                extra.grad = torch.ones(3)
            step()
        runs.append([*weights(model), extra.detach()])
    assert equal(*runs)


def test_groups_with_other_lists_are_noticed_by_a_compiled_step(compiled):
    model = small_model()
    optimizer = optimizer_of(model, POLICIES["dense"])
    step = compiled(lambda: optimizer.step())
    give_gradients(model, 0)
    step()
    before = weights(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(
        RuntimeError, match=r"^a compiled step must know its parameters, got .*; call it again"
    ):
        step()
    assert equal(weights(model), before)
    step()
    assert not equal(weights(model), before)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # nor need it
def test_what_says_and_asks_beside_a_compiled_step_is_heard(compiled):
    runs = []
    for compile_ in (lambda function: function, lambda function: compiled(function, fullgraph=False)):
        model, seen = small_model(), []
        optimizer = optimizer_of(model, {"policy": Bernoulli(0.3, every="epoch")})

        def step(optimizer=optimizer, model=model, seen=seen):
            optimizer.new_epoch()
            optimizer.step()
            seen.append(optimizer.mask(model[0].weight))
            return optimizer.density()

        step, densities = compile_(step), []
        for number in range(3):
            give_gradients(model, number)
            densities.append(step())
        runs.append([*weights(model), *seen, torch.tensor(densities)])
    assert equal(*runs)


def test_no_graph_is_replayed_without_asking_the_host():
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no such tag")
    assert torch.Tag.cudagraph_unsafe in torch.ops.sparse_optim.step_.default.tags


# torch looks at what it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_step_takes_a_closure(compiled):
    runs = []
    for compile_ in (lambda function: function, lambda function: compiled(function, fullgraph=False)):
        model, data = small_model(), torch.ones(4, 6)
        optimizer = optimizer_of(model, POLICIES["dense"])

        def closure(model=model, optimizer=optimizer, data=data):
            optimizer.zero_grad()
            loss = model(data).square().mean()
            loss.backward()
            return loss

        step = compile_(lambda optimizer=optimizer, closure=closure: optimizer.step(closure))
        losses = [step().detach() for _ in range(3)]
        runs.append([*weights(model), torch.stack(losses)])
    assert equal(*runs)


def test_layers_freeze_and_thaw_under_a_compiled_step(compiled):
    runs = []
    for compile_ in (lambda function: function, compiled):
        model = small_model()
        optimizer = optimizer_of(model, POLICIES["bernoulli"])
        step = compile_(lambda optimizer=optimizer: optimizer.step())
        for number in range(6):
            give_gradients(model, number)
            if number % 3 == 1:
                model[0].weight.grad = None
            step()
        runs.append(weights(model))
    assert equal(*runs)


def test_a_compiled_step_goes_on_after_loading_and_in_a_copy(compiled):
    model = small_model()
    optimizer = optimizer_of(model, POLICIES["top_k_list"])
    step = compiled(lambda: optimizer.step())
    for number in range(4):
        if number == 3:
            kept, at = copy.deepcopy(optimizer.state_dict()), weights(model)
            twin, other = copy.deepcopy((model, optimizer))
        give_gradients(model, number)
        step()
    after = weights(model)
    optimizer.load_state_dict(kept)
    with torch.no_grad():
        for p, value in zip(model.parameters(), at, strict=True):
            p.copy_(value)
    give_gradients(model, 3)
    step()
    assert equal(weights(model), after)
    assert equal(weights(twin), at)  # nothing of it was touched
    give_gradients(twin, 3)
    compiled(lambda: other.step())()
    assert equal(weights(twin), after)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"differentiable": True}, id="differentiable"),
        pytest.param(
            {"policy": TopK(0.2, schedule=Schedule(observe=1)), "release_gradients": True}, id="released"
        ),
    ],
)
def test_a_step_that_is_no_operator_stays_out_of_graphs(compiled, options):
    model = small_model()
    optimizer = optimizer_of(model, options)
    model(torch.ones(2, 6)).sum().backward()
    before = weights(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_step"):
        compiled(lambda: optimizer.step())()
    assert equal(weights(model), before)
    if "differentiable" in options:
        return  # of leaves, no step is
    torch._dynamo.reset()
    step = compiled(lambda: optimizer.step(), fullgraph=False)
    for number in range(2):
        optimizer.zero_grad()
        model(torch.full((2, 6), number + 1.0)).sum().backward()
        step()
    assert not equal(weights(model), before)


def test_a_compiled_step_without_a_gradient_is_none(compiled):
    model = small_model()
    optimizer, before = optimizer_of(model, POLICIES["bernoulli"]), weights(model)
    compiled(lambda: optimizer.step())()
    assert equal(weights(model), before)
    assert not optimizer.state


@pytest.mark.skipif(bool(native.why_not(None)), reason="needs the native library")
@pytest.mark.parametrize(
    "verb", ["adamw_", "adamw_indexed_", "accumulate_", "histogram", "norm", "apply_delta_"]
)
def test_operators_do_what_their_schemas_say(verb):
    """Shapes and what is written are right for tracing: no verb writes to what it does not declare."""
    ops = torch.ops.sparse_optim

    def tensors(*shapes, dtype=torch.float32):
        return [torch.rand(shape).to(dtype) for shape in shapes]

    shapes, numbers = ((3, 5), (4,)), (0.1, 0.9, 0.999, 1e-8, 0.1, False, None, None, None, None, None)
    params, grads, first, second, largest = (tensors(*shapes) for _ in range(5))
    steps, flags = [torch.tensor(1.0) for _ in shapes], [torch.tensor(False) for _ in shapes]
    indices = [torch.tensor([0, 7, 14], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)]
    listed, counts = [tensors(3, 1) for _ in range(3)], torch.zeros(1, 2048, dtype=torch.int64)
    arguments = {
        "adamw_": (
            params, grads, first, second, largest, steps, *numbers, [], [], [1, 0, 2**31, 0, 5, 6], [], [],
            "frozen", 1.0, [], None, tensors(*shapes), flags, "squares", [],
        ),
        "adamw_indexed_": (params, grads, indices, *listed, [], [], steps, *numbers, False),
        "accumulate_": (first, grads, flags, "squares", [], [counts], False, [], []),
        "histogram": (first, 21, 11, torch.zeros(2, dtype=torch.int64), True, False, [], []),
        "norm": (grads, [], [], [], [], None),
        "apply_delta_": (params, indices, tensors(3, 1), "replace"),
    }  # fmt: skip
    torch.library.opcheck(getattr(ops, verb).default, arguments[verb])


@pytest.mark.skipif(bool(native.why_not(None)), reason="needs the native library")
def test_the_operators_of_a_selection_and_of_a_step_do_what_their_schemas_say():
    # where a result's size depends on data, opcheck's comparison of shapes cannot be made
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    scores, cuts = [torch.rand(3, 5), torch.rand(4)], [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    compact = torch.ops.sparse_optim.compact.default
    torch.library.opcheck(compact, (scores, cuts, False, False, []), test_utils=utils)
    torch.library.opcheck(compact, (scores, cuts, True, False, []))
    gather = torch.ops.sparse_optim.gather_.default
    torch.library.opcheck(gather, ([torch.zeros(2)], [torch.rand(9)], [torch.tensor([1, 8])]))
    model = small_model()
    optimizer, params = optimizer_of(model, {}), list(model.parameters())
    places, grads = list(range(len(params))), [torch.ones_like(p) for p in params]
    step = torch.ops.sparse_optim.step_.default
    with torch.no_grad():
        # the optimizer remembers: a second run of the same step is another step, so runs are not compared
        torch.library.opcheck(step, (params, grads, places, optimizer._in_graphs), test_utils=utils)


# --- counting on the device -------------------------------------------------------------------------------


def run(options, dtype, steps=6, **more):
    model = small_model(dtype)
    optimizer = optimizer_of(model, options, **more)
    masks = []
    for number in range(steps):
        give_gradients(model, number)
        optimizer.step()
        masks += [optimizer.mask(p) for p in model.parameters()]
    return model, optimizer, masks


def close_or_equal(got, expected, backend):
    # Triton's power of a beta on the device is its own, so that its numbers may differ in the last place
    if backend == "triton":
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    else:
        assert equal(got, expected)


@on_backends(backends.available(torch.device("cpu")), POLICIES | CHANGING)
def test_what_is_counted_on_the_device_is_what_the_host_counts(options, backend, dtype):
    model, optimizer, masks = run(options, dtype, backend=backend)
    counted, other, own_masks = run(options, dtype, backend=backend, capturable=True)
    close_or_equal(weights(counted), weights(model), backend)
    assert equal(own_masks, masks)
    state, expected = other.state_dict(), optimizer.state_dict()
    assert [g["clock"] for g in state["param_groups"]] == [g["clock"] for g in expected["param_groups"]]
    assert [g["draw"] for g in state["param_groups"]] == [g["draw"] for g in expected["param_groups"]]


@every_policy
def test_a_checkpoint_loads_wherever_its_steps_are_counted(options):
    expected, *_ = run(options, torch.float32)
    for first, second in ((False, True), (True, False)):
        model, optimizer, _ = run(options, torch.float32, steps=3, capturable=first)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = optimizer_of(model, options, capturable=second)
        other.load_state_dict(torch.load(file, weights_only=True))
        for number in range(3, 6):
            give_gradients(model, number)
            other.step()
        assert equal(weights(model), weights(expected))


# --- a GradScaler that does not wait ----------------------------------------------------------------------


def scaled_run(options, *, infinities=(), dtype=torch.float32, unscale=False, look=True, **more):
    model = small_model(dtype)
    optimizer = optimizer_of(model, options, **more)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    masks = []
    for number in range(7):
        give_gradients(model, number, scale=scaler.get_scale())
        scaler.scale(torch.ones(()))  # as for a loss
        if number in infinities:
            model[0].weight.grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if look or number == 6:
            masks += [optimizer.mask(p) for p in model.parameters()]
    return model, optimizer, masks, scaler


@pytest.mark.parametrize("unscale", [False, True], ids=["unscaled_by_the_step", "unscaled_before"])
@pytest.mark.parametrize("infinities", [(), (0,), (1, 2), (4,)], ids=str)
@every_method
def test_what_a_scaler_leaves_to_the_step_ends_as_what_it_does_itself(options, infinities, unscale):
    # both on the same switches but for where infinities are looked at
    # looking at masks brings the host up to date, and must not be needed
    alike = {"infinities": infinities, "unscale": unscale, "look": not infinities}
    model, optimizer, masks, scaler = scaled_run(options, **alike)
    assert not optimizer._step_supports_amp_scaling
    other, flagged, own_masks, own_scaler = scaled_run(options, **alike, capturable=True)
    assert flagged._step_supports_amp_scaling
    assert equal(weights(other), weights(model))
    assert equal(own_masks, masks)
    expected, state = optimizer.state_dict(), flagged.state_dict()
    for group in (*expected["param_groups"], *state["param_groups"]):
        group.pop("capturable")
    same_state(state, expected)
    assert own_scaler.get_scale() == scaler.get_scale()
    assert state["param_groups"][0]["clock"] == 7 - len(infinities)


@pytest.mark.skipif(backends.available() == ("reference",), reason="needs an accelerated backend")
def test_fused_is_what_torch_calls_a_step_that_supports_scaling():
    model = small_model()
    assert optimizer_of(model, {}, fused=True)._step_supports_amp_scaling
    assert torch.optim.AdamW(model.parameters(), fused=True)._step_supports_amp_scaling
    assert not optimizer_of(model, {})._step_supports_amp_scaling
    released = TopK(0.2, schedule=Schedule(observe=1))
    optimizer = optimizer_of(model, {"policy": released}, release_gradients=True, capturable=True)
    # whole gradients are checked before they are released, by the scaler itself
    assert not optimizer._step_supports_amp_scaling


@pytest.mark.skipif(backends.available() == ("reference",), reason="needs an accelerated backend")
def test_fused_steps_are_counted_in_float32_as_in_torch(monkeypatch):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        counts = []
        for make in (MaskedAdamW, torch.optim.AdamW):
            p = nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            optimizer = make([p], fused=True)
            optimizer.step()
            counts.append(optimizer.state[p]["step"])
    finally:
        torch.set_default_dtype(default)
    assert counts[0].dtype == counts[1].dtype == torch.float32


def test_gradients_are_unscaled_after_the_step_as_in_torch():
    gradients = []
    for make in (
        lambda model: optimizer_of(model, {}, capturable=True),
        lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    ):
        model = small_model()
        optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=64.0)
        give_gradients(model, 0, scale=64.0)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        gradients.append([p.grad for p in model.parameters()])
    assert equal(*gradients)
    give_gradients(model, 0)
    assert equal(gradients[0], [p.grad for p in model.parameters()])


@pytest.mark.parametrize("statistic", [SquaredGradient(), SignedGradient()], ids=["squares", "signed"])
def test_observing_scaled_gradients_is_observing_them_unscaled(statistic):
    runs = []
    for scale in (None, 1024.0, torch.tensor(1024.0)):
        model = small_model()
        policy = TopK(0.3, statistic=statistic, schedule=Schedule(observe=None))
        optimizer = optimizer_of(model, {"policy": policy})
        for number in range(3):
            give_gradients(model, number, scale=1.0 if scale is None else float(scale))
            optimizer.observe(grad_scale=scale)
        observed = [optimizer.state[p]["statistic"].clone() for p in model.parameters()]
        optimizer.select()
        give_gradients(model, 9)
        optimizer.step()
        runs.append([*observed, *weights(model)])
    assert equal(runs[1], runs[0])
    assert equal(runs[2], runs[0])


def test_scaled_gradients_are_observed_in_float32():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    policy = TopK(0.5, statistic=SignedGradient(), schedule=Schedule(observe=None))
    optimizer = MaskedAdamW([p], policy=policy)
    p.grad = torch.tensor([1e-4, -3e-4, 2.0, 5e-5], dtype=torch.float16)
    optimizer.observe(grad_scale=65536.0)
    assert torch.equal(optimizer.state[p]["statistic"], p.grad.float() / 65536)
    assert optimizer.state[p]["statistic"].ne(0).all()


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, float("inf"), float("nan"), 1e-40, True, "4", torch.ones(2)], ids=str
)
def test_a_scale_that_is_none_is_refused(scale):
    model = small_model()
    optimizer = optimizer_of(model, {"policy": TopK(0.3, schedule=Schedule(observe=None))})
    give_gradients(model, 0)
    with pytest.raises(ValueError, match=r"^grad_scale must be one number, positive .*, got .*; pass .*\.$"):
        optimizer.observe(grad_scale=scale)
    assert not optimizer.state


# --- capture ----------------------------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch):
    """Lets a step believe that a graph captures it: on the CPU it then runs as a replay does."""

    def switch(on):
        monkeypatch.setattr(MaskedAdamW, "_is_capturing", property(lambda self: on and self._counts_there))

    return switch


@on_backends(LEAVES_NUMBERS, POLICIES)
def test_replays_draw_count_and_train_as_steps_do(capturing, options, dtype, backend):
    expected, other, _ = run(options, dtype, steps=8, backend=backend, capturable=True)
    model, optimizer, _ = run(options, dtype, steps=3, backend=backend, capturable=True)
    capturing(True)
    for number in range(3, 6):
        give_gradients(model, number)
        optimizer.step()
        assert optimizer.param_groups[0]["clock"] == 3  # the host is asleep
    capturing(False)
    for number in range(6, 8):
        give_gradients(model, number)
        optimizer.step()
    assert equal(weights(model), weights(expected))
    masks = [[o.mask(p) for p in m.parameters()] for o, m in ((optimizer, model), (other, expected))]
    assert equal(*masks)
    same_state(optimizer.state_dict(), other.state_dict())
    assert optimizer.param_groups[0]["clock"] == 8


@pytest.mark.parametrize("backend", LEAVES_NUMBERS[-1:])
def test_replays_go_on_from_what_was_loaded(capturing, backend):
    options = POLICIES["bernoulli"]
    expected, _, _ = run(options, torch.float32, steps=6, backend=backend, capturable=True)
    model, optimizer, _ = run(options, torch.float32, steps=3, backend=backend, capturable=True)
    kept, at = copy.deepcopy(optimizer.state_dict()), weights(model)
    for repeat in range(2):
        capturing(True)
        for number in range(3, 6):
            give_gradients(model, number)
            optimizer.step()
        capturing(False)
        assert equal(weights(model), weights(expected)), repeat
        optimizer.load_state_dict(kept)
        with torch.no_grad():
            for p, value in zip(model.parameters(), at, strict=True):
                p.copy_(value)


@pytest.mark.skipif(not LEAVES_NUMBERS, reason="needs an accelerated backend")
def test_a_parameter_that_never_was_observed_does_not_keep_steps_from_capture(capturing):
    model = small_model()
    optimizer = optimizer_of(model, POLICIES["top_k_list"], capturable=True)
    for number in range(5):
        give_gradients(model, number)
        if number < 2:
            model[2].bias.grad = None
        capturing(number == 4)
        optimizer.step()
    capturing(False)
    assert not optimizer.state[model[2].bias]
    assert optimizer.state_dict()["param_groups"][0]["clock"] == 5


@pytest.mark.skipif(not LEAVES_NUMBERS, reason="needs an accelerated backend")
def test_a_step_right_after_loading_is_not_captured(capturing):
    _, trained, _ = run(POLICIES["bernoulli"], torch.float32, steps=2, capturable=True)
    model = small_model()
    optimizer = optimizer_of(model, POLICIES["bernoulli"], capturable=True)
    optimizer.load_state_dict(trained.state_dict())
    give_gradients(model, 2)
    capturing(True)
    with pytest.raises(RuntimeError, match="needs state that is there"):
        optimizer.step()


def test_copies_of_an_optimizer_know_what_was_replayed(capturing):
    model, optimizer, _ = run(POLICIES["bernoulli"], torch.float32, steps=2, capturable=True)
    capturing(True)
    give_gradients(model, 2)
    optimizer.step()
    capturing(False)
    assert optimizer.state_dict()["param_groups"][0]["clock"] == 3
    twin, other = copy.deepcopy((model, optimizer))
    assert other.param_groups[0]["clock"] == 3
    for each, its_optimizer in ((model, optimizer), (twin, other)):
        give_gradients(each, 3)
        its_optimizer.step()
    assert equal(weights(twin), weights(model))


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        pytest.param(CHANGING["bernoulli_every_2"], 3, "a phase that stays", id="every_2"),
        pytest.param(CHANGING["alternating"], 3, "a phase that stays", id="alternating"),
        pytest.param(CHANGING["alternating"], 2, "a phase that stays", id="alternating_trains"),
        pytest.param(CHANGING["unfreezing"], 3, "a phase that stays", id="unfreezing"),
        pytest.param(POLICIES["top_k_list"], 1, "a phase that stays", id="still_observing"),
        pytest.param(POLICIES["bernoulli"], 0, "state that is there", id="first_step"),
        pytest.param({"backend": "reference"}, 3, "a backend that leaves", id="reference"),
        pytest.param(
            {"policy": TopK(0.2, schedule=Schedule(observe=1)), "release_gradients": True}, 3,
            "whole gradients", id="released",
        ),
    ],
)  # fmt: skip
@pytest.mark.skipif(not LEAVES_NUMBERS, reason="needs an accelerated backend")
def test_what_a_replay_would_not_repeat_is_refused(capturing, options, steps, message):
    model = small_model()
    optimizer = optimizer_of(model, options, capturable=True)
    for _ in range(steps):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    model(torch.ones(2, 6)).sum().backward()
    capturing(True)
    with pytest.raises(RuntimeError, match=rf"^a captured step (must|needs) .*{message}.*, got .*; .*\.$"):
        optimizer.step()
    capturing(False)
    assert equal(weights(model), before)
    same_state(optimizer.state_dict(), state)


def test_tables_of_a_capture_are_its_own(monkeypatch):
    """A graph reads its addresses from memory that steps outside of it do not write."""
    kernels = pytest.importorskip("sparse_optim.backends.triton_kernels")
    if kernels.why_not(torch.device("cpu")):
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(kernels, "_is_captured_later", lambda device: True)
    captures = []
    monkeypatch.setattr(kernels, "_captured", captures)
    state = [torch.zeros(40) for _ in range(3)]
    hyper = {"lr": torch.tensor(0.1), "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}

    def step(grad, into=state):
        kernels.adamw_([into[0]], [grad], [into[1]], [into[2]], [], [counted], **hyper)

    counted = torch.zeros(())
    step(torch.ones(40))
    monkeypatch.setattr(kernels, "_is_capturing", lambda device: True)
    first, second = torch.full((40,), 2.0), torch.full((40,), 3.0)
    step(first)
    step(second)
    assert [int(table._gradients[0]) for table in captures] == [first.data_ptr(), second.data_ptr()]
    assert len({table._gradients.data_ptr() for table in captures}) == 2
    assert len({table._spare[0].data_ptr() for table in captures}) == 2
    expected, steps = [torch.zeros(40) for _ in range(3)], [torch.zeros(())]
    for grad in (torch.ones(40), first, second):
        reference.adamw_([expected[0]], [grad], [expected[1]], [expected[2]], [], steps, **hyper)
    torch.testing.assert_close(state, expected)
    with pytest.raises(RuntimeError, match=r"^a captured step must have been made before .*; call step\(\)"):
        step(first, into=[torch.zeros(40) for _ in range(3)])
    for _ in range(2):
        step(first)
    with pytest.raises(RuntimeError, match=r"^between captures .* there must be a step outside"):
        step(first)
    monkeypatch.setattr(kernels, "_is_capturing", lambda device: False)
    step(first)
    monkeypatch.setattr(kernels, "_is_capturing", lambda device: True)
    step(first)


# --- on a GPU ---------------------------------------------------------------------------------------------

GPU_BACKENDS = (
    [name for name in backends.available(torch.device("cuda", 0)) if name != "reference"]
    if torch.cuda.is_available()
    else ["triton"]
)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: capture of a graph"),
]


def graph_run(options, dtype, backend, *, replayed, whole):
    """Eight steps, the last five in one graph that is replayed. `whole`: the backward pass is in it."""
    model = small_model(dtype).cuda()
    optimizer = optimizer_of(
        model, options, lr=torch.tensor(1e-2, device="cuda"), backend=backend, capturable=True
    )
    data = torch.randn(8, 4, 6, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)
    batch = torch.empty_like(data[0])

    def backward():
        for p in model.parameters():
            p.grad = None
        model(batch).square().mean().backward()

    def step():
        backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(3):
            batch.copy_(data[number])
            step()
    torch.cuda.current_stream().wait_stream(stream)
    if replayed:
        graph = torch.cuda.CUDAGraph()
        if not whole:
            backward()
            gradients = [p.grad for p in model.parameters()]
        with torch.cuda.graph(graph):
            step() if whole else optimizer.step()
    for number in range(3, 8):
        batch.copy_(data[number])
        # a schedule changes the learning rate where the graph reads it
        optimizer.param_groups[0]["lr"].fill_(1e-2 / number)
        if not replayed:
            step()
        elif whole:
            graph.replay()
        else:
            backward()
            torch._foreach_copy_(gradients, [p.grad for p in model.parameters()])
            graph.replay()
    return model, optimizer


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("whole", [False, True], ids=["step", "backward_and_step"])
@pytest.mark.parametrize("backend", [pytest.param(name, marks=on_gpu) for name in GPU_BACKENDS])
@both_dtypes
@every_policy
def test_a_replayed_graph_trains_as_steps_do(options, dtype, backend, whole):
    policy = options.get("policy")
    if backend == "native" and isinstance(policy, Bernoulli) and policy.unit != "entry":
        pytest.skip("the CUDA verbs read draws for whole tensors on the host")
    expected, other = graph_run(options, dtype, backend, replayed=False, whole=whole)
    model, optimizer = graph_run(options, dtype, backend, replayed=True, whole=whole)
    assert equal(weights(model), weights(expected))
    assert equal(*[[o.mask(p) for p in m.parameters()] for o, m in ((optimizer, model), (other, expected))])
    assert optimizer.state_dict()["param_groups"][0]["clock"] == 8


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("backend", [pytest.param(name, marks=on_gpu) for name in GPU_BACKENDS])
@pytest.mark.parametrize("infinity", [False, True], ids=["finite", "infinite"])
def test_a_scaled_step_waits_for_nothing_on_the_device(backend, infinity):
    model = small_model().cuda()
    optimizer = optimizer_of(model, POLICIES["bernoulli"], backend=backend, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
    for number in range(3):
        give_gradients(small := small_model(), number, scale=64.0)
        for p, q in zip(model.parameters(), small.parameters(), strict=True):
            p.grad = q.grad.cuda()
        if infinity and number == 2:
            model[0].bias.grad[0] = float("inf")
        scaler.scale(torch.ones((), device="cuda"))
        before = weights(model)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            scaler.step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update(64.0)
    assert equal(weights(model), before) == infinity
    assert optimizer.state_dict()["param_groups"][0]["clock"] == 3 - infinity
