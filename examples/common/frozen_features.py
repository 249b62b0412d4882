"""How good are the features of a frozen encoder: nearest neighbours and linear evaluation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS

NEIGHBOURS = 20


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Share of the test images that a vote of the 20 nearest training images by cosine, weighted by exp(cos / 0.1),
    classifies correctly (Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination)."""
    similarity, nearest = (F.normalize(test) @ F.normalize(train).T).topk(min(NEIGHBOURS, len(train)))
    ballots = F.one_hot(train_labels[nearest], int(train_labels.max()) + 1)
    votes = (ballots * (similarity / 0.1).exp()[:, :, None]).sum(dim=1)
    return float((votes.argmax(dim=1) == test_labels).float().mean())


def linear_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int, penalty: float = 1e-3
) -> float:
    """Test accuracy of softmax regression on standardised features, fitted to convergence.

    A convex problem solved to its end leaves no learning rate or number of epochs that could favour one encoder.
    """
    spread, centre = torch.std_mean(train, dim=0)
    train, test = ((features - centre) / spread.clamp_min(1e-6) for features in (train, test))
    classifier = nn.Linear(train.shape[1], num_classes, device=train.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = LBFGS(classifier.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(classifier(train), train_labels) + penalty * classifier.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return float((classifier(test).argmax(dim=1) == test_labels).float().mean())
