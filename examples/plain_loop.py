"""Fine-tune a language model on a text file in plain PyTorch, with all that a loop has around AdamW.

python examples/plain_loop.py --data README.md [--resume out/step_20.pt]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_optim import ChildTuningAdamW, param_groups

CONFIG = {
    "model": "HuggingFaceTB/SmolLM2-135M", "data": "README.md", "out": "out", "resume": "", "seed": 0,
    "length": 256, "batch": 4, "accumulate": 2, "epochs": 3, "lr": 2e-4, "max_norm": 1.0, "save_every": 20,
    "density": 0.3, "observe": 10,
}  # fmt: skip
parser = argparse.ArgumentParser()
for name, value in CONFIG.items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
cfg = parser.parse_args()
Path(cfg.out).mkdir(parents=True, exist_ok=True)

torch.manual_seed(cfg.seed)
tokens = AutoTokenizer.from_pretrained(cfg.model)(Path(cfg.data).read_text(), return_tensors="pt").input_ids
batches = tokens[0, : tokens.numel() // cfg.length * cfg.length].view(-1, cfg.length).split(cfg.batch)
per_epoch = len(batches) // cfg.accumulate
model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
model.to("cuda" if torch.cuda.is_available() else "cpu").train()
# optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
groups = param_groups(model, method="child_tuning_d")
optimizer = ChildTuningAdamW(groups, lr=cfg.lr, variant="D", density=cfg.density, observe_steps=cfg.observe)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=cfg.epochs * per_epoch)
start, parts = 0, {"model": model, "optimizer": optimizer, "schedule": schedule}
if cfg.resume:
    saved = torch.load(cfg.resume, map_location="cpu", weights_only=True)
    start = saved["step"]
    for name, part in parts.items():
        part.load_state_dict(saved[name])

for step in range(start, cfg.epochs * per_epoch):
    torch.manual_seed(cfg.seed + step)  # of dropout: a resumed run draws the same
    in_epoch = torch.Generator().manual_seed(cfg.seed + step // per_epoch)  # each epoch has its order
    order = torch.randperm(len(batches), generator=in_epoch)[step % per_epoch * cfg.accumulate :]
    for i in order[: cfg.accumulate]:
        batch = batches[i].to(model.device)
        loss = model(input_ids=batch, labels=batch).loss / cfg.accumulate
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_norm)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    size = f"density {optimizer.density():.4f}, {optimizer.state_bytes()} bytes"
    print(f"{step + 1}: loss {loss * cfg.accumulate:.4f}, {size}")
    if (step + 1) % cfg.save_every == 0:
        saved = {name: part.state_dict() for name, part in parts.items()}
        torch.save(saved | {"step": step + 1}, f"{cfg.out}/step_{step + 1}.pt")
model.save_pretrained(cfg.out)
