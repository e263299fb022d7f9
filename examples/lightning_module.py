"""A classifier of lines of {"text": ..., "label": 0 or 1}, with Lightning: Layer-GradDrop, drawn by epoch.

python examples/lightning_module.py --data my.jsonl [--manual 1] [--resume out/last.ckpt]
"""

import argparse

import lightning
from datasets import load_dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparse_optim import GradDropAdamW, param_groups

CONFIG = {"model": "distilbert/distilbert-base-uncased", "data": "my.jsonl", "out": "out", "resume": ""}
parser = argparse.ArgumentParser()
for name, value in (CONFIG | {"epochs": 3, "manual": 0}).items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
cfg = parser.parse_args()


class Classifier(lightning.LightningModule):
    automatic_optimization = not cfg.manual

    def configure_optimizers(self):
        groups = param_groups(self.model, method="grad_drop")
        return GradDropAdamW(groups, lr=2e-5, keep=0.5, granularity="layer", refresh="epoch")

    def on_train_batch_start(self, batch, batch_idx):
        lightning.seed_everything(self.global_step, verbose=False)  # of dropout: a resumed run draws the same
        # not in on_train_epoch_start, which is left out after a checkpoint of an epoch's last step
        self.optimizers(use_pl_optimizer=False).new_epoch(self.current_epoch)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        ours, loss = self.optimizers(use_pl_optimizer=False), outputs["loss"]
        self.print(
            f"{self.global_step}: loss {loss:.4f}, density {ours.density():.4f}, {ours.state_bytes()} bytes"
        )


classifier, tokenizer = Classifier(), AutoTokenizer.from_pretrained(cfg.model, model_max_length=64)
classifier.model = AutoModelForSequenceClassification.from_pretrained(cfg.model).train()  # two labels
rows = load_dataset("json", data_files=cfg.data, split="train").rename_column("label", "labels")
rows = rows.map(lambda row: tokenizer(row["text"], padding="max_length", truncation=True))
sampler = DistributedSampler(rows, num_replicas=1, rank=0)  # Lightning tells it the epoch, resumed or not
loader = DataLoader(rows.remove_columns("text").with_format("torch"), batch_size=8, sampler=sampler)
trainer = lightning.Trainer(max_epochs=cfg.epochs, callbacks=[ModelCheckpoint(cfg.out, save_last=True)])
trainer.fit(classifier, loader, ckpt_path=cfg.resume or None)
classifier.model.save_pretrained(cfg.out)
