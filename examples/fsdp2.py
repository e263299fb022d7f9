"""A language model on lines of text, spread over processes by FSDP2: Child-Tuning-D. It goes on from its last
whole checkpoint when a process dies, or when it is started again on another number of processes.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or those that start again read what the dead left in a store
torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/fsdp2.py --data my.txt
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_optim import ChildTuningAdamW, param_groups

CONFIG = {"model": "HuggingFaceTB/SmolLM2-135M", "data": "my.txt", "out": "out", "steps": 200, "batch": 8}
parser = argparse.ArgumentParser()
for name, value in (CONFIG | {"lr": 2e-5, "observe": 20, "save_every": 20}).items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
cfg = parser.parse_args()

device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
dist.init_process_group()
mesh = init_device_mesh(device.type, (dist.get_world_size(),))
tokenizer = AutoTokenizer.from_pretrained(cfg.model)
lines = [line for line in Path(cfg.data).read_text().splitlines() if line]
tokens = tokenizer(lines, padding=True, truncation=True, return_tensors="pt").to(device)
model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32).to(device).train()
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
# the optimizer comes after the shards
optimizer = ChildTuningAdamW(
    param_groups(model, method="child_tuning_d"), lr=cfg.lr, variant="D", observe_steps=cfg.observe
)


def saved():
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


# a checkpoint has its list of contents when all else of it is written
whole = [int(path.parent.name) for path in Path(cfg.out).glob("*/.metadata")]
first = max(whole, default=0)
if first:
    state = saved()
    checkpoint.load(state, checkpoint_id=f"{cfg.out}/{first}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
for step in range(first + 1, cfg.steps + 1):
    # the same lines in step `step`, however many processes share them
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(step))[: cfg.batch]
    own = order.tensor_split(mesh.size())[mesh.get_local_rank()]
    batch = {key: value[own.to(device)] for key, value in tokens.items()}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss := loss.detach() / mesh.size())
    density, size = optimizer.density(), optimizer.state_bytes()  # density asks all processes
    if mesh.get_local_rank() == 0:
        print(f"{step}: loss {loss:.4f}, density {density:.4f}, {size} bytes a process", flush=True)
    if step % cfg.save_every == 0 or step == cfg.steps:
        checkpoint.save(saved(), checkpoint_id=f"{cfg.out}/{step}")
dist.destroy_process_group()
