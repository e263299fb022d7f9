"""Contract under test: under Lightning, with automatic and with manual optimization, every method trains the
weights of a plain loop, and a run that goes on from any checkpoint ends as one that was never interrupted.
"""

import logging

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from sparse_optim import (
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    GradualUnfreezing,
    MaskedAdamW,
    Schedule,
    SecondOrderAdamW,
    SignedGradient,
    TopK,
    param_groups,
)
from sparse_optim.nn import mix_weights

pytestmark = [
    # advice about speed, and about a training step whose loss is not logged
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    # the callbacks that wrote a checkpoint are left out where it is read
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    # weights after the step are what is wanted
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    # its own use of torch
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]
EPOCHS, STEPS_PER_EPOCH, MICRO_BATCHES = 3, 3, 2
STEPS = EPOCHS * STEPS_PER_EPOCH
CLIP = 0.5
REPEATING = TopK(0.2, SignedGradient(), schedule=Schedule(observe=2, train=2))
METHODS = {
    "dense": (MaskedAdamW, {}),
    "child_tuning_f": (ChildTuningAdamW, {"variant": "F"}),
    "child_tuning_d": (ChildTuningAdamW, {"variant": "D", "observe_steps": 2}),
    "observed_before": (ChildTuningAdamW, {"variant": "D", "observe_steps": None}),
    "child_tuning_d_release": (ChildTuningAdamW, {"variant": "D", "observe_steps": 2, "fidelity": "release"}),
    "dps_dense": (DPSAdamW, {"variant": "dense", "update_steps": 2}),
    "dps_mix": (DPSAdamW, {"variant": "mix", "update_steps": 2}),
    "second_order": (SecondOrderAdamW, {"observe_steps": 2, "density": 0.1}),
    "grad_drop": (GradDropAdamW, {"keep": 0.5}),
    "grad_drop_epoch": (GradDropAdamW, {"keep": 0.5, "refresh": "epoch"}),
    "layer_grad_drop": (GradDropAdamW, {"keep": 0.5, "granularity": "layer"}),
    "layer_grad_drop_epoch": (GradDropAdamW, {"keep": 0.5, "granularity": "layer", "refresh": "epoch"}),
    "gradual_unfreezing": (MaskedAdamW, {"policy": GradualUnfreezing()}),
    "repeating": (MaskedAdamW, {"policy": REPEATING}),
    "released": (
        MaskedAdamW,
        {"policy": REPEATING, "release_gradients": True, "statistic_dtype": torch.bfloat16},
    ),
}
NAMES = {ChildTuningAdamW: "child_tuning_d", DPSAdamW: "dps"}
every_method = pytest.mark.parametrize("method", METHODS)
every_way = pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])


@pytest.fixture(autouse=True)
def _quiet():
    """What Lightning says about the machine is noise here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def network():
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(2)]
    return nn.ModuleDict({"layer": nn.Sequential(*layers), "classifier": nn.Linear(6, 3)})


def optimizer_of(model, method):
    """The optimizer of a method, its schedule, and what mixes the model's weights, if anything does."""
    optimizer_class, options = METHODS[method]
    if options.get("release_gradients"):  # Lightning would clip by gradients that are gone
        options = options | {"max_grad_norm": CLIP}
    optimizer = optimizer_class(param_groups(model, method=NAMES.get(optimizer_class)), lr=0.02, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=STEPS)
    mixing = mix_weights(model, optimizer) if options.get("variant") == "mix" else None
    return optimizer, schedule, mixing


def loss_of(model, batch):
    inputs, targets = batch
    return (model["classifier"](model["layer"](inputs)) - targets).square().mean()


def observe_before(model, optimizer):
    """For a schedule that leaves it to the loop, unless what it selected comes from a checkpoint."""
    explicit = isinstance(optimizer.policy, TopK) and optimizer.policy.schedule.observe is None
    if explicit and optimizer.param_groups[0]["phase"] == 0:
        for batch in Loader():
            loss_of(model, batch).backward()
            optimizer.observe()
            optimizer.zero_grad()
        optimizer.select()


class Loader(torch.utils.data.DataLoader):
    """Batches in another order at each epoch, whose number Lightning tells the sampler. It goes on within an
    epoch, as Lightning asks of those that shall.
    """

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        size = 4 * STEPS_PER_EPOCH * MICRO_BATCHES
        dataset = torch.utils.data.TensorDataset(
            *(torch.randn(size, columns, generator=generator) for columns in (6, 3))
        )
        self.given, self.skipped = 0, 0
        sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0)
        super().__init__(dataset, batch_size=4, sampler=sampler)

    def __iter__(self):
        skipped, self.skipped = self.skipped, 0
        for i, batch in enumerate(super().__iter__()):
            if i >= skipped:
                self.given = i + 1
                yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.skipped = state["given"] % len(self)


class Module(lightning.LightningModule):
    """The recipe of `plain_run`, as Lightning wants it."""

    def __init__(self, method, manual):
        super().__init__()
        self.model, self.automatic_optimization = network(), not manual
        # mixed weights have other names in a checkpoint, which is read before configure_optimizers is called
        self.parts = optimizer_of(self.model, method)
        self.mixing = self.parts[2]

    def configure_optimizers(self):
        optimizer, schedule, _ = self.parts
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def ours(self):
        """Not Lightning's wrapper, which copies our attributes when it is made."""
        return self.optimizers(use_pl_optimizer=False)

    def on_train_start(self):
        observe_before(self.model, self.ours)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.global_step + batch_idx)  # of mixed weights
        # not in on_train_epoch_start, which Lightning leaves out after a checkpoint of an epoch's last step
        self.ours.new_epoch(self.current_epoch)

    def training_step(self, batch, batch_idx):
        loss = loss_of(self.model, batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / MICRO_BATCHES)
        if (batch_idx + 1) % MICRO_BATCHES == 0:
            if not self.ours.release_gradients:
                self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return None

    def on_save_checkpoint(self, checkpoint):
        if self.mixing is not None:
            checkpoint["mixing"] = self.mixing.state_dict()

    def on_load_checkpoint(self, checkpoint):
        if self.mixing is not None:
            self.mixing.load_state_dict(checkpoint["mixing"])


def lightning_run(method, manual, *, callbacks=(), precision="32-true", clip=None, **fit):
    module = Module(method, manual)
    own = {}
    if not manual:
        own["accumulate_grad_batches"] = MICRO_BATCHES
        own["gradient_clip_val"] = clip if module.parts[0].release_gradients else CLIP
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, precision=precision, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(callbacks), callbacks=list(callbacks), **own,
    )  # fmt: skip
    trainer.fit(module, Loader(), **fit)
    assert trainer.global_step == STEPS
    return module


def plain_run(method, autocast=False):
    model, loader = network(), Loader()
    optimizer, schedule, _ = optimizer_of(model, method)
    observe_before(model, optimizer)
    for epoch in range(EPOCHS):
        optimizer.new_epoch()
        loader.sampler.set_epoch(epoch)
        for i, batch in enumerate(loader):
            torch.manual_seed(100 * (epoch * STEPS_PER_EPOCH + i // MICRO_BATCHES) + i)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, batch)
            (loss / MICRO_BATCHES).backward()
            if (i + 1) % MICRO_BATCHES == 0:
                if not optimizer.release_gradients:
                    # in the order of Lightning's sum: the norm depends on it, in its last bits
                    params = [p for group in optimizer.param_groups for p in group["params"]]
                    nn.utils.clip_grad_norm_(params, CLIP)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model, optimizer


def bits(value):
    """Nested state with every tensor as dtype, shape and bytes, which compare exactly."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().reshape(-1).contiguous().view(torch.uint8)
        return str(value.dtype), tuple(value.shape), bytes(flat.tolist())
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    return [bits(inner) for inner in value] if isinstance(value, list | tuple) else value


def everything(model, optimizer):
    """Weights, moments, statistics, masks and the numbers of all groups."""
    masks = [optimizer.mask(p) for group in optimizer.param_groups for p in group["params"]]
    return bits([model.state_dict(), optimizer.state_dict(), masks])


@every_way
@every_method
def test_lightning_ends_at_the_weights_of_a_plain_loop(method, manual):
    module = lightning_run(method, manual)
    assert everything(module.model, module.ours) == everything(*plain_run(method))


@every_way
@every_method
def test_lightning_in_mixed_precision_ends_at_the_weights_of_a_plain_loop(method, manual):
    module = lightning_run(method, manual, precision="bf16-mixed")
    assert everything(module.model, module.ours) == everything(*plain_run(method, autocast=True))


@pytest.mark.one_in(2, by="method")
@every_way
@every_method
def test_a_run_that_lightning_resumes_from_any_checkpoint_ends_the_same(tmp_path, method, manual):
    """Written after each step: while observing, at the selection, right after it, while it trains, within an
    epoch and at its last step. And once more at the end of each epoch.
    """
    steps = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    epochs = ModelCheckpoint(
        tmp_path / "epochs", "{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
    )
    whole = lightning_run(method, manual, callbacks=[steps, epochs])
    end = everything(whole.model, whole.ours)
    # with manual optimization Lightning writes one more, amid the first step, without the gradients so far
    written = [path for path in sorted(tmp_path.glob("*/*.ckpt")) if path.name != "step=0.ckpt"]
    assert len(written) == STEPS + EPOCHS
    for path in written:
        torch.load(path, weights_only=True)  # which Lightning leaves to torch's default
        resumed = lightning_run(method, manual, ckpt_path=path, weights_only=True)
        assert everything(resumed.model, resumed.ours) == end, path.name


def test_clipping_by_lightning_warns_where_gradients_are_released():
    """It would clip by what is left of them; `max_grad_norm=` of the optimizer clips what it applies."""
    with pytest.warns(UserWarning, match="the norm of a released gradient is that of its selected"):
        lightning_run("released", manual=False, clip=CLIP)
