"""Past predictions: the target moves towards what the network predicted for the same image when it last saw it.

The loader tells which image is which: StackDataset gives each sample with its number. The network is a small one on
scikit-learn's digits, one label in five of which is wrong.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset

import sfr

EPOCHS = 5
torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
pixels = images.float().view(-1, 1, 8, 8) / 16
given = torch.where(torch.rand(len(labels)) < 0.2, torch.randint(10, labels.shape), labels)[:1440]
numbered = StackDataset(TensorDataset(pixels[:1440], given), range(1440))  # type: ignore[arg-type]
loader: DataLoader[tuple[list[torch.Tensor], torch.Tensor]] = DataLoader(numbered, 64, shuffle=True)

convolutions = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
model = sfr.SFRWrapper(net)
config = sfr.SFRConfig.preset("few-labels", num_samples=1440, steps=EPOCHS * len(loader))  # alpha rises to 0.8
criterion = sfr.SFRLoss(model, config)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(1, EPOCHS + 1):
    for (x, y), index in loader:
        loss = criterion(model(x), y, index=index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: {criterion.last}")

model.unwrap()
accuracy = (net.eval()(pixels[1440:]).argmax(dim=1) == labels[1440:]).float().mean()
print(f"test accuracy {accuracy:.1%}; one seed, no comparison")
