"""Hugging Face's Trainer: a small ResNet on scikit-learn's digits; --resume goes on from the last checkpoint.

Two processes on the CPU: `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/hf_trainer.py`."""

import sys
from typing import Any

import torch
import transformers as hf
from sklearn.datasets import load_digits

import sfr
from sfr.integrations.transformers import SFRCallback

images, labels = load_digits(return_X_y=True)
pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).kron(torch.ones(2, 2)) / 16
digits: Any = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]
args = hf.TrainingArguments("runs/hf", per_device_train_batch_size=48, learning_rate=0.01, save_strategy="epoch")
torch.manual_seed(0)
config = hf.ResNetConfig(num_channels=1, hidden_sizes=[16, 32], depths=[1, 1], id2label=dict(enumerate("0123456789")))
model = sfr.SFRWrapper(hf.ResNetForImageClassification(config))
criterion = sfr.SFRLoss(model)
trainer = hf.Trainer(model, args, None, digits[:1440], compute_loss_func=criterion)
SFRCallback(criterion).add_to(trainer)  # logs the parts of the loss, and lets a run resume exactly
trainer.train(resume_from_checkpoint="--resume" in sys.argv)
print(trainer.evaluate(digits[1440:]), criterion.last)
net: Any = model.unwrap()
net.save_pretrained("runs/hf", is_main_process=trainer.is_world_process_zero())
