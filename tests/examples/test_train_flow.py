"""Flow matching: paths, sampler and network are what they say; a run resumes bit for bit."""

import json

import pytest
import torch
from processes import run_ranks
from written_runs import assert_killed_run_resumes, assert_same_weights, metrics, weights

import train_flow
from common import runs
from common.diffusion_transformer import DiffusionTransformer
from common.flow import guided, noisy, sample
from sfr.model.supervisor import Supervisor


def small(output_dir, *arguments):
    """Two epochs of two steps on 40 digits."""
    network = ["--width", "16", "--depth", "4", "--heads", "2", "--sampling-steps", "2"]
    return [
        *network,
        "--limit",
        "40",
        "--batch-size",
        "16",
        "--epochs",
        "2",
        "--output-dir",
        str(output_dir),
        *arguments,
    ]


def train(output_dir, *arguments):
    return train_flow.main(small(output_dir, *arguments))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return folder


def network(**sizes):
    torch.manual_seed(0)
    return DiffusionTransformer(
        **{"image_size": 8, "patch": 2, "width": 16, "depth": 2, "heads": 2} | sizes, num_classes=3
    )


def test_run_writes_what_it_promises(undisturbed):
    assert (undisturbed / "samples.png").read_bytes().startswith(b"\x89PNG")
    for epoch, record in enumerate(metrics(undisturbed), start=1):
        assert record["epoch"] == epoch
        assert {"train_velocity_loss", "train_feature_loss", "test_loss"} <= record.keys()
    summary = json.loads((undisturbed / "summary.json").read_text())
    quarters = [summary[f"test_loss_quarter_{i}"] for i in (1, 2, 3, 4)]
    assert min(quarters) < summary["test_loss"] < max(quarters)
    config = json.loads((undisturbed / "config.json").read_text())["sfr"]
    assert (config["matching"], config["pairs"], config["cost"]) == ("in_place", [[0.3, 0.7]], "cosine")


def test_what_is_written_is_the_slow_average(tmp_path):
    average = train(tmp_path)
    assert_same_weights(weights(tmp_path), average.state_dict())
    assert not hasattr(average, "sfr")


@pytest.mark.parametrize(("fatal_step", "left"), [(1, []), (4, ["checkpoint-0001"])])
def test_a_killed_run_resumes_to_the_weights_of_an_undisturbed_one(
    tmp_path, monkeypatch, undisturbed, fatal_step, left
):
    assert_killed_run_resumes(monkeypatch, train, tmp_path, undisturbed, fatal_step, left)


def test_without_weight_it_is_the_baseline(tmp_path, undisturbed):
    train(tmp_path / "vanilla", "--method", "vanilla")
    train(tmp_path / "weightless", "--sfr", "feature_weight=0")
    vanilla = weights(tmp_path / "vanilla")
    assert_same_weights(vanilla, weights(tmp_path / "weightless"))
    assert any(not torch.equal(vanilla[name], value) for name, value in weights(undisturbed).items())


def test_the_slow_average_can_supervise(tmp_path, monkeypatch, undisturbed):
    seen = []
    supervisor_features = Supervisor.features
    monkeypatch.setattr(
        Supervisor, "features", lambda self, *args: seen.append(self.network) or supervisor_features(self, *args)
    )
    average = train(tmp_path / "slow", "--average-supervises")
    assert len(seen) == 4
    assert {network.module for network in seen} == {average}
    own, slow = (weights(folder) for folder in (undisturbed, tmp_path / "slow"))
    assert any(not torch.equal(own[name], value) for name, value in slow.items())


def in_two_processes(rank, folder):
    torch.set_num_threads(1)
    args = train_flow.parse_arguments(small(folder, "--lr", "0"))
    train_flow.train(args, runs.build_accelerator(args))


def test_two_processes_judge_the_same_test_images_by_the_same_noise(tmp_path):
    run_ranks(in_two_processes, tmp_path / "two", environment={"ACCELERATE_USE_CPU": "true"})
    train(tmp_path / "one", "--lr", "0")
    one, two = (metrics(tmp_path / name)[-1]["test_loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)


def test_the_error_on_test_images_does_not_depend_on_the_batches(tmp_path):
    """Of a network that says zero, the error is the mean square of noise - images."""
    record = {}
    for size in ("16", "20"):
        train(tmp_path / size, "--method", "vanilla", "--lr", "0", "--batch-size", size)
        record[size] = metrics(tmp_path / size)[0]["test_loss"]
    assert record["16"] == pytest.approx(record["20"], rel=0.05)
    assert record["16"] > 1  # the variance of the noise and that of the images


def test_the_path_leads_from_the_images_to_the_noise():
    images, noise = torch.randn(2, 5, 3, 4, 4)
    time = torch.tensor([0, 1, 0.5, 0.25, 0.75])
    points, velocity = noisy(images, noise, time)
    torch.testing.assert_close(points[0], images[0])
    torch.testing.assert_close(points[1], noise[1])
    for i in range(5):
        torch.testing.assert_close(points[i], images[i] + time[i] * velocity[i])


def test_the_sampler_follows_a_velocity_that_is_known():
    """dx/dt = 2 t has the solution x(0) = x(1) - 1; Heun's method is exact for it but for its last step."""
    noise, labels = torch.randn(6, 3, 4, 4), torch.zeros(6, dtype=torch.long)
    steps = 10
    found = sample(lambda x, time, _: (2 * time)[:, None, None, None].expand_as(x), noise, labels, steps)
    torch.testing.assert_close(found, noise - 1 - 1 / steps**2, rtol=0, atol=1e-5)


def test_one_straight_path_is_followed_in_one_step():
    noise, image = torch.randn(2, 4, 3, 4, 4)
    found = sample(lambda x, time, labels: noise - image, noise, torch.zeros(4, dtype=torch.long), steps=1)
    torch.testing.assert_close(found, image)


def test_guidance_counts_what_the_class_adds():
    def velocity(images, time, labels):
        return images + labels[:, None, None, None]

    images, time, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.tensor([1, 4])
    found = guided(velocity, 2.0, no_class=3)(images, time, labels)
    assert found.mean(dim=(1, 2, 3)).tolist() == [2 * 1 - 3, 2 * 4 - 3]
    assert guided(velocity, 1.0, no_class=3) is velocity


def test_a_share_of_the_images_has_no_class():
    args = train_flow.parse_arguments(["--unlabelled", "0.25"])
    torch.manual_seed(0)
    found = train_flow.some_without(torch.arange(10).repeat(1000), args)
    hidden = found == 10
    assert hidden.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert found[~hidden].equal(torch.arange(10).repeat(1000)[~hidden])


def test_the_network_starts_at_zero_and_its_blocks_as_the_identity():
    net = network()
    images, time, labels = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    assert net(images, time, labels).eq(0).all()
    tokens, condition = torch.randn(3, 16, 16), torch.randn(3, 16)
    assert net.blocks[0](tokens, condition).equal(tokens)


def test_each_token_becomes_the_pixels_of_its_own_patch():
    net = network(depth=0)
    torch.nn.init.normal_(net.to_pixels.weight)
    images, time, labels = torch.randn(1, 3, 8, 8), torch.rand(1), torch.tensor([1])
    changed = images.clone()
    changed[:, :, 2:4, 6:8] += 1
    where = (net(images, time, labels) != net(changed, time, labels)).any(dim=1)[0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert where.equal(expected)


def test_the_network_sees_class_and_time():
    net = network()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1)
    of_class = net(images, torch.full((3,), 0.5), torch.tensor([0, 1, 2]))
    of_time = net(images, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1, 1, 1]))
    for found in (of_class, of_time):
        assert (found[0] - found[1]).abs().max() > 1e-3
        assert (found[1] - found[2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--patch", "3"], "multiple of the patch"),
        (["--width", "18"], "multiple of twice the heads"),
        (["--sfr", "matching=nearest"], "matching must be"),
    ],
)
def test_what_cannot_work_is_said_at_once(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, *arguments)
