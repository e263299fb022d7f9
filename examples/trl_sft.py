"""Supervised fine-tuning with TRL: the 1 % with the most consistent gradient, without whole gradients.

python examples/trl_sft.py
python examples/trl_sft.py --data my.jsonl   # lines of {"text": ...} or {"messages": [...]}
"""

import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from sparse_optim import SecondOrderAdamW
from sparse_optim.integrations.transformers import SparseOptimCallback, trainer_optimizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
parser.add_argument("--data", default="trl-lib/Capybara", help="on the hub, or a .jsonl file")
parser.add_argument("--out", default="out")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--observe", type=int, default=100, help="batches, before training begins")
parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --out")
cli = parser.parse_args()

is_file = cli.data.endswith(".jsonl")
data = load_dataset("json", data_files=cli.data) if is_file else load_dataset(cli.data)
args = SFTConfig(
    cli.out, learning_rate=1e-4, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_length=512,
    max_steps=cli.steps, logging_steps=max(1, cli.steps // 10), save_steps=max(1, cli.steps // 5),
    use_cpu=not torch.cuda.is_available(), model_init_kwargs={"dtype": "bfloat16"},
    max_grad_norm=0,  # the optimizer clips what it applies
)  # fmt: skip

trainer = SFTTrainer(
    cli.model,
    args,
    train_dataset=data["train"],
    optimizer_cls_and_kwargs=trainer_optimizer(
        SecondOrderAdamW, args, density=0.01, observe_steps=None, release_gradients=True, max_grad_norm=1.0
    ),
)
trainer.add_callback(SparseOptimCallback(trainer, observe_batches=cli.observe))
trainer.train(resume_from_checkpoint=cli.resume)
trainer.save_model()
