"""DistributedDataParallel without any trainer: `torchrun --nproc_per_node 2 examples/torchrun_ddp.py`, on the CPU."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import sfr

dist.init_process_group("gloo")
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
digits = TensorDataset(pixels, torch.tensor(labels))
sampler: DistributedSampler[object] = DistributedSampler(digits)
loader = DataLoader(digits, batch_size=64 // dist.get_world_size(), sampler=sampler)

convolutions = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
model = sfr.SFRWrapper(net)  # the first line; DDP goes around it
parallel = DistributedDataParallel(model)
criterion = sfr.SFRLoss(parallel)  # the second
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)

for epoch in range(3):
    sampler.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        criterion(parallel(x), y).backward()
        optimizer.step()

if dist.get_rank() == 0:
    print(criterion.last)
    torch.save(net.state_dict(), "model.pt")  # the plain model's
dist.barrier()  # a rank that ended while gloo's threads still let go of its last gradients could crash
dist.destroy_process_group()
