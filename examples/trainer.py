"""Fine-tune a classifier with Hugging Face's Trainer: Child-Tuning D, which observes before it trains.

python examples/trainer.py
python examples/trainer.py --data my.jsonl --labels 2   # lines of {"text": ..., "label": 0 or 1}
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from sparse_optim import ChildTuningAdamW
from sparse_optim.integrations.transformers import SparseOptimCallback, trainer_optimizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="distilbert/distilbert-base-uncased")
parser.add_argument("--data", default="fancyzhx/ag_news", help="on the hub, or a .jsonl file")
parser.add_argument("--labels", type=int, default=4)
parser.add_argument("--out", default="out")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --out")
cli = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(cli.model)
is_file = cli.data.endswith(".jsonl")
texts = load_dataset("json", data_files=cli.data) if is_file else load_dataset(cli.data)
train_dataset = texts["train"].map(lambda row: tokenizer(row["text"], truncation=True, max_length=128))
model = AutoModelForSequenceClassification.from_pretrained(cli.model, num_labels=cli.labels)
args = TrainingArguments(
    cli.out, learning_rate=1e-4, weight_decay=0.01, per_device_train_batch_size=cli.batch,
    max_steps=cli.steps, logging_steps=max(1, cli.steps // 10), save_steps=max(1, cli.steps // 5),
)  # fmt: skip

trainer = Trainer(
    model,
    args,
    train_dataset=train_dataset,
    data_collator=DataCollatorWithPadding(tokenizer),
    # learning rate, betas, eps, weight decay and seed come from args
    optimizer_cls_and_kwargs=trainer_optimizer(ChildTuningAdamW, args, variant="D", observe_steps=None),
)
# observes 200 batches before training begins, counts epochs, logs density and the size of the state
trainer.add_callback(SparseOptimCallback(trainer, observe_batches=200))
trainer.train(resume_from_checkpoint=cli.resume)
trainer.save_model()
