"""The two lines in a plain Accelerate loop: a small network on scikit-learn's digits.

Several processes, GPUs and mixed precision come with `accelerate launch examples/accelerate_loop.py`.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import sfr

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
train, test = random_split(TensorDataset(pixels, torch.tensor(labels)), [0.8, 0.2])
convolutions = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

accelerator = Accelerator()
model = sfr.SFRWrapper(net)  # the first line, before prepare
criterion = sfr.SFRLoss(model)  # the second
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
parallel, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(train, 64, shuffle=True))

for epoch in range(1, 4):
    for x, y in loader:
        loss = criterion(parallel(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: {criterion.last}")

plain = accelerator.unwrap_model(parallel).unwrap().cpu().eval()
x, y = test[:]
accelerator.print(f"test accuracy {(plain(x).argmax(dim=1) == y).float().mean():.1%}")
