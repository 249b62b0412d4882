"""On a CUDA device: the same promises as on the CPU, and no wait for the device in a training step."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import sfr
from sfr.labels import DynamicLabelSmoothing
from sfr.transport import certified, solve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextmanager
def no_waiting():
    """Make every wait of the host for the device an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says that it does not find them all
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("solver", ["proximal", "sinkhorn"])
def test_plans_of_the_device_are_those_of_the_cpu(solver):
    cost = torch.rand(8, 16, 16)
    torch.testing.assert_close(
        solve(cost.cuda(), solver=solver).cpu(), solve(cost, solver=solver), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("masses", [False, True])
@pytest.mark.parametrize(("n", "m"), [(16, 16), (49, 64), (64, 64), (5, 3)])
def test_the_fused_kernel_gives_the_plans_of_the_eager_solver(n, m, masses):
    cost = torch.rand(8, n, m)
    a, b = (torch.rand(8, size).add(0.1) for size in (n, m))
    given = (a / a.sum(dim=1, keepdim=True), b / b.sum(dim=1, keepdim=True)) if masses else (None, None)
    expected = solve(cost, *given, solver="proximal")  # on the CPU there is no other
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the kernel that did not start
        found = solve(cost.cuda(), *(None if side is None else side.cuda() for side in given), solver="proximal")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-4 / n)


def test_a_certificate_never_waits_for_the_device():
    cost = torch.rand(8, 100, 100)
    on_the_device = cost.cuda()
    with no_waiting():
        plan, bound = certified(on_the_device)
    assert plan.is_cuda
    torch.testing.assert_close(bound.cpu(), certified(cost)[1], rtol=1e-3, atol=1e-5)


def test_exact_plans_are_given_back_on_the_device():
    cost = torch.rand(8, 16, 16)
    assert torch.equal(solve(cost.cuda(), solver="exact").cpu(), solve(cost, solver="exact"))


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"marginals": "cross"},
        {"cost": "cosine", "grouping": "segments"},
        {"smoothing": "past", "num_samples": 1000},
        {"smoothing": "class_mean"},
        {"smoothing": "uniform"},
    ],
)
def test_a_training_step_never_waits_for_the_device(make_net, batch, switches):
    images, labels = batch[0].cuda(), batch[1].cuda()
    index = torch.arange(len(images), device="cuda")
    model = sfr.SFRWrapper(make_net().cuda(), example_input=images)
    criterion = sfr.SFRLoss(model, **switches)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = criterion(model(images), labels, index=index)
        loss.backward()
        return loss

    step()  # creates what is created once
    with no_waiting():
        loss = step()
    assert loss.isfinite()


def test_the_loss_of_the_device_is_close_to_that_of_the_cpu(make_net, batch):
    net = make_net()
    losses = []
    for device in ("cpu", "cuda"):
        model = sfr.SFRWrapper(net.to(device))
        criterion = sfr.SFRLoss(model, feature_weight=1.0)
        losses.append(criterion(model(batch[0].to(device)), batch[1].to(device)).item())
        model.unwrap()
    assert losses[0] == pytest.approx(losses[1], rel=0.005)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_the_kernels_give_the_loss_and_the_gradients_of_pytorchs_operations(make_net, batch, monkeypatch, last):
    net, images, labels = make_net().cuda(), batch[0].cuda(), batch[1].cuda()
    if last:
        net, images = net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    results = []
    for given_up in (False, True):
        monkeypatch.setattr(sfr.feature.term.fused_values, "given_up", given_up)
        model = sfr.SFRWrapper(net)
        criterion = sfr.SFRLoss(model, feature_weight=10.0, gate="none")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of the kernels that did not start
            criterion(model(images), labels).backward()
        results.append([criterion.last.feature, *(each.grad.clone() for each in net.parameters())])
        net.zero_grad()
        model.unwrap()
    for own, plain in zip(*results, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "uniform"},
        {"mode": "class_mean"},
        {"mode": "class_mean", "update": "epoch"},
        {"mode": "past", "num_samples": 512, "alpha": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_the_kernels_of_the_label_term_give_what_pytorchs_operations_give(monkeypatch, options, classes):
    criteria = [DynamicLabelSmoothing(**options) for _ in range(2)]
    for step in range(3):
        index = torch.randperm(512)[:256]
        target = (index % min(classes, 20)).cuda()
        logits = (torch.randn(256, classes) + 5 * F.one_hot(index % min(classes, 20), classes)).cuda()
        target[step] = -100
        results = []
        for criterion, given_up in zip(criteria, (False, True), strict=True):
            monkeypatch.setattr(sfr.labels.on_a_device.label_kernels, "given_up", given_up)
            leaf = logits.clone().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of the kernels that did not start
                loss = criterion(leaf, target, index.cuda())
            results.append([loss.detach(), *torch.autograd.grad(loss, leaf), *criterion.state_dict().values()])
        for own, plain in zip(*results, strict=True):
            torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-6)


def losses_of(model, criterion, images, labels, steps=6):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# PyTorch's own: of what Dynamo looks at, of TF32, and of the empty graph that it starts its pool of memory with.
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:TensorFloat32 tensor cores",
    "ignore:The CUDA Graph is empty",
)
def test_a_model_that_replays_cuda_graphs_trains_as_the_eager_one(make_net, batch):
    net, images, labels = make_net().cuda(), batch[0].cuda(), batch[1].cuda()
    losses = []
    for compiled in (False, True):
        model = sfr.SFRWrapper(copy.deepcopy(net), stages=["1", "3", "5"])
        criterion = sfr.SFRLoss(model, feature_weight=1.0)
        forward = torch.compile(model, mode="reduce-overhead") if compiled else model
        losses.append(losses_of(forward, criterion, images, labels))
        assert criterion.last.feature > 0
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_a_step_that_is_recorded_as_a_whole_gives_the_gradients_of_one_that_is_not(make_net, batch):
    """No warnings here: a step in 50 looks at the values, and must not be the one that is recorded."""
    net, images, labels = make_net().cuda(), batch[0].cuda(), batch[1].cuda()
    model = sfr.SFRWrapper(net, stages=["1", "3", "5"])
    criterion = sfr.SFRLoss(model, feature_weight=1.0)

    def step():
        criterion(model(images), labels).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # creates what is created once
            net.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    expected = [each.grad.clone() for each in net.parameters()]
    net.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for each in net.parameters():
        each.grad.zero_()
    graph.replay()
    for own, eager in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(own.grad, eager, rtol=1e-3, atol=1e-5)


def test_a_model_spread_over_two_devices_gives_the_loss_of_one(make_net, batch):
    net = make_net()

    def loss_and_gradient(model, target):
        loss = sfr.SFRLoss(model, feature_weight=1.0, solver="proximal")(model(batch[0]), target)
        loss.backward()
        return loss.item(), net[0].weight.grad.clone()

    whole = sfr.SFRWrapper(net, stages=["1", "3", "5"])
    expected, gradient = loss_and_gradient(whole, batch[1])
    whole.unwrap().zero_grad()
    for layer in net[2:]:
        layer.cuda()
        layer.register_forward_pre_hook(lambda _, args: (args[0].cuda(),))
    spread = sfr.SFRWrapper(net, stages=["1", "3", "5"])
    found, moved = loss_and_gradient(spread, batch[1].cuda())
    assert found == pytest.approx(expected, rel=0.005)
    torch.testing.assert_close(moved, gradient, rtol=0.02, atol=1e-4)
