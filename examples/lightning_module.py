"""Lightning: a small network on scikit-learn's digits, validated and checkpointed."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import sfr
from sfr.integrations.lightning import SFRCallback


class Classifier(lightning.LightningModule):
    """As a submodule the criterion has its state in every checkpoint, and is cross-entropy in validation."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.model = sfr.SFRWrapper(net)
        self.criterion = sfr.SFRLoss(self.model)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.criterion(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", self.criterion(self.model(batch[0]), batch[1]), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


if __name__ == "__main__":
    lightning.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, test = random_split(TensorDataset(pixels, torch.tensor(labels)), [0.8, 0.2])
    convolutions = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    trainer = lightning.Trainer(max_epochs=3, default_root_dir="runs/lightning", logger=False, callbacks=SFRCallback())
    trainer.fit(classifier := Classifier(net), DataLoader(train, 64, shuffle=True), DataLoader(test, 256))
    print(trainer.callback_metrics)
    torch.save(net.state_dict(), "runs/lightning/model.pt")  # the plain model's
