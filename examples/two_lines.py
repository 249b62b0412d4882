"""The two lines in a bare PyTorch loop: a small network on scikit-learn's digits, on the CPU in seconds."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import sfr

torch.manual_seed(0)
parts = train_test_split(*load_digits(return_X_y=True), test_size=0.2, random_state=0)
x_train, x_test = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for x in parts[:2])
y_train, y_test = (torch.tensor(y) for y in parts[2:])


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


model: nn.Module = nn.Sequential(
    *block(1, 16), nn.MaxPool2d(2), *block(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
)
model = sfr.SFRWrapper(model)  # the first line
criterion = sfr.SFRLoss(model)  # the second, in the place of nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(1, 6):
    for batch in torch.randperm(len(x_train)).split(64):
        optimizer.zero_grad()
        loss = criterion(model(x_train[batch]), y_train[batch])
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: last loss {loss.item():.3f}")

model = model.unwrap().eval()  # the plain model again
accuracy = (model(x_test).argmax(dim=1) == y_test).float().mean()
print(f"test accuracy {accuracy:.1%}; one seed, no comparison: see the README for those")
