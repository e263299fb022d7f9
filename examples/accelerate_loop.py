"""A classifier of lines of {"text": ..., "label": 0 or 1}, with accelerate: DPS, dense.

accelerate launch examples/accelerate_loop.py --data my.jsonl [--resume out/step_20]
"""

import argparse

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from sparse_optim import DPSAdamW, param_groups

CONFIG = {"model": "distilbert/distilbert-base-uncased", "data": "my.jsonl", "out": "out", "resume": ""}
parser = argparse.ArgumentParser()
for name, value in (CONFIG | {"steps": 200, "save_every": 20}).items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
cfg = parser.parse_args()

set_seed(0)
order = DataLoaderConfiguration(use_seedable_sampler=True)  # a resumed epoch goes on in the same order
accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=order)
rows = load_dataset("json", data_files=cfg.data, split="train")
tokenizer = AutoTokenizer.from_pretrained(cfg.model)
inputs = tokenizer(list(rows["text"]), padding=True, truncation=True, return_tensors="pt")
dataset = [{"labels": y} | {k: v[i] for k, v in inputs.items()} for i, y in enumerate(rows["label"])]
loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
model = AutoModelForSequenceClassification.from_pretrained(cfg.model).train()  # two labels
groups = param_groups(model, method="dps")
optimizer = DPSAdamW(groups, lr=2e-5, variant="dense", update_ratio=0.05, total_steps=cfg.steps)
schedule = get_linear_schedule_with_warmup(optimizer, 0, cfg.steps * accelerator.num_processes)
model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
ours, step, per_epoch = optimizer.optimizer, 0, -(-len(loader) // 2)
if cfg.resume:
    accelerator.load_state(cfg.resume)
    step = int(cfg.resume.rpartition("_")[2])
while step < cfg.steps:
    loader.set_epoch(step // per_epoch)
    for micro, batch in enumerate(skip_first_batches(loader, step % per_epoch * 2)):
        set_seed(2 * step + micro % 2, device_specific=True)  # of dropout: a resumed run draws the same
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            size = f"density {ours.density():.4f}, {ours.state_bytes()} bytes"
            accelerator.print(f"{step}: loss {loss:.4f}, {size}")
            if step % cfg.save_every == 0:
                accelerator.save_state(f"{cfg.out}/step_{step}")
            if step == cfg.steps:
                break
accelerator.unwrap_model(model).save_pretrained(cfg.out, is_main_process=accelerator.is_main_process)
