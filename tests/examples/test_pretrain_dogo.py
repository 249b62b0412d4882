"""Pre-training a pair writes what it promises, resumes bit for bit, and its views and judges are what they say."""

import json
from argparse import Namespace

import accelerate
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torchvision.transforms.v2 import functional as transforms
from written_runs import assert_killed_run_resumes, assert_same_weights, metrics, weights

import pretrain_dogo
from benchmarks.pretrain import dogo
from common import runs, two_views
from common.data import SOURCES, load_splits
from common.frozen_features import knn_accuracy, linear_accuracy
from common.models import build_model
from common.run_folder import RunFolder
from common.two_views import plain_view
from sfr.pretrain import TwoViewNetwork


def pretrain(output_dir, *arguments):
    """Two epochs of two steps on 40 digits."""
    small = ["--limit", "40", "--batch-size", "16", "--image-size", "8", "--epochs", "2", "--models", "resnet8"]
    return pretrain_dogo.main([*small, "wrn_16_2", "--output-dir", str(output_dir), *arguments])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    pretrain(folder)
    return folder


def test_run_announces_itself_and_writes_every_artefact(tmp_path, capsys, undisturbed):
    pretrain(tmp_path)
    printed = capsys.readouterr()
    assert "digits: 40 training images, 0 held out, 40 test images" in printed.out
    assert "after the last epoch: first_knn_accuracy" in printed.out
    assert "images/s" in printed.err
    parts = {f"{part}_{name}_loss" for part in ("ssl", "kl") for name in pretrain_dogo.NAMES}
    for epoch, record in enumerate(metrics(tmp_path), start=1):
        assert record["epoch"] == epoch
        assert parts | {"first_knn_accuracy", "second_knn_accuracy"} <= record.keys()
    assert {"first_linear_accuracy", "second_linear_accuracy"} <= json.loads(
        (tmp_path / "summary.json").read_text()
    ).keys()
    assert (undisturbed / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_written_weights_load_into_networks_of_the_same_kind(undisturbed):
    pair = {"first": "resnet8", "second": "wrn_16_2"}
    networks = torch.nn.ModuleDict({name: TwoViewNetwork(build_model(model, 10)) for name, model in pair.items()})
    networks.load_state_dict(weights(undisturbed), strict=True)


@pytest.mark.parametrize(("fatal_step", "left"), [(1, []), (4, ["checkpoint-0001"])])
def test_a_killed_run_resumes_to_the_weights_of_an_undisturbed_one(
    tmp_path, monkeypatch, undisturbed, fatal_step, left
):
    assert_killed_run_resumes(monkeypatch, pretrain, tmp_path, undisturbed, fatal_step, left)
    assert metrics(tmp_path) == metrics(undisturbed)


def test_alone_is_the_same_run_without_the_mutual_term(tmp_path, undisturbed):
    pretrain(tmp_path / "alone", "--method", "alone")
    pretrain(tmp_path / "weightless", "--weight", "0")
    alone = weights(tmp_path / "alone")
    assert_same_weights(alone, weights(tmp_path / "weightless"))
    assert any(not torch.equal(alone[name], value) for name, value in weights(undisturbed).items())
    assert "kl_first_loss" not in metrics(tmp_path / "alone")[0]


def test_simsiam_trains_too(tmp_path):
    pretrain(tmp_path, "--objective", "simsiam", "--epochs", "1")
    assert any(name.startswith("first.predictor.") for name in weights(tmp_path))
    assert -1 <= metrics(tmp_path)[0]["ssl_first_loss"] <= 1


def test_encode_gives_features_of_plain_images_in_their_order(tmp_path):
    args = pretrain_dogo.parse_arguments(["--batch-size", "16", "--image-size", "8"])
    images = load_splits("digits", None, limit=40).train.data
    network = TwoViewNetwork(build_model("wrn_16_2", 10)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    accelerator = accelerate.Accelerator()
    loader = runs.Run(args, accelerator, RunFolder(tmp_path), {}).pixels(images)
    features, labels = pretrain_dogo.encode(network, loader, args, accelerator)
    assert_same_weights(network.state_dict(), before)  # BatchNorm has learnt nothing from them
    assert torch.equal(labels, images.labels)
    one_by_one = [network.eval().features(plain_view(image[None], 8, SOURCES["digits"])) for image in images.pixels[:3]]
    torch.testing.assert_close(features[:3], torch.cat(one_by_one), atol=1e-5, rtol=1e-4)
    assert features.shape == (40, 128)


def test_the_benchmark_judges_the_encoders_that_the_run_has_left(undisturbed, monkeypatch):
    recipe = {"--dataset": "digits", "--models": "resnet8 wrn_16_2", "--batch-size": "16"}
    monkeypatch.setattr(dogo, "RECIPE", recipe)
    args = Namespace(image_size=8, precision="no")
    splits = load_splits("digits", None, limit=40)
    summary = json.loads((undisturbed / "summary.json").read_text())
    for place, network in zip(pretrain_dogo.NAMES, dogo.encoders(weights(undisturbed)).values(), strict=True):
        train, test = (dogo.encoded(network, part.data, args) for part in (splits.train, splits.test))
        judged = train, splits.train.data.labels, test, splits.test.data.labels
        assert knn_accuracy(*judged) == summary[f"{place}_knn_accuracy"]
        assert linear_accuracy(*judged, 10) == summary[f"{place}_linear_accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "64"], "--batch-size 64 is more than the 40 training images"),
        (["--models", "resnet8", "resnet21"], "resnet21: no such model"),
        (["--models", "resnet8", "squeezenet1_0"], r"--models squeezenet1_0: SqueezeNet has no nn\.Linear"),
    ],
)
def test_a_wrong_option_is_an_error_that_leaves_no_run_behind(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        pretrain(tmp_path / "run", *arguments)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--smallest-crop", "0"],
        ["--weight", "-1"],
        ["--temperature", "0"],
        ["--models", "resnet8"],
        ["--data-dir", "."],
    ],
)
def test_arguments_out_of_range_print_the_usage(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit):
        pretrain_dogo.main(arguments)
    assert "error: " in capsys.readouterr().err


def test_crops_have_the_area_and_the_place_they_may_have():
    corners = two_views.crops(500, 16, 0.2, False, torch.zeros(1))
    low, high = corners[:, 0, 0], corners[:, -1, -1]
    assert corners.abs().max() <= 1
    area = ((high - low) / 2 * 16 / 15).prod(dim=1)  # from the centres of the outer pixels to their rims
    assert 0.15 < area.min() < 0.3  # a crop as high or wide as the image is cut, which makes it smaller
    assert 0.8 < area.max() <= 1.0001


def test_a_flipped_view_is_the_mirror_of_the_image(monkeypatch):
    monkeypatch.setattr(two_views, "jitter", lambda views: views)
    monkeypatch.setattr(two_views, "coin", lambda count, probability, like: torch.arange(count) == 1)
    images = torch.rand(1, 3, 8, 8).repeat(2, 1, 1, 1)
    monkeypatch.setattr(
        two_views, "uniform", lambda count, low, high, like: torch.full((count,), 0.0 if low < 0 else 1.0)
    )
    plain, mirrored = two_views.augment(images, 8, 0.2, flip=True)
    torch.testing.assert_close(plain, images[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mirrored, images[0].flip(2), atol=1e-5, rtol=0)


def test_jitter_does_what_torchvision_does(monkeypatch):
    factors = iter([1.1, 0.8, 1.3, 0.0])
    monkeypatch.setattr(two_views, "uniform", lambda count, *_: torch.full((count,), next(factors)))
    monkeypatch.setattr(two_views, "coin", lambda count, probability, like: torch.full((count,), probability == 0.8))
    image = 0.4 + 0.2 * torch.rand(1, 3, 8, 8)  # so that nothing is clipped
    expected = transforms.adjust_brightness(image, 1.1)
    expected = transforms.adjust_saturation(transforms.adjust_contrast(expected, 0.8), 1.3)
    torch.testing.assert_close(two_views.jitter(image), expected, atol=2e-3, rtol=0)


def test_jitter_colours_no_grey_image_and_greys_a_fifth_of_the_others():
    views = torch.rand(200, 3, 4, 4)
    grey = views[:, :1].repeat(1, 3, 1, 1)
    for images in (views, grey):
        jittered = two_views.jitter(images)
        assert 0 <= jittered.min() <= jittered.max() <= 1
        colourful = jittered.std(dim=1).amax(dim=(1, 2)) > 1e-3
        if images is grey:
            assert not colourful.any()
        else:
            assert 0.7 < colourful.float().mean() < 0.9  # a fifth is made grey


def test_every_image_gets_a_view_of_its_own():
    images = torch.rand(1, 3, 16, 16).repeat(8, 1, 1, 1)
    views = two_views.augment(images, 8, 0.2, flip=True)
    assert views.shape == (8, 3, 8, 8)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8


def test_neighbours_vote_by_similarity_and_not_by_length_or_number():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 5.0]])
    labels = torch.tensor([0, 0, 1])
    test = torch.tensor([[3.0, 0.1], [100.0, 1000.0], [0.0, 1.0]])
    assert knn_accuracy(train, labels, test, torch.tensor([0, 1, 1])) == 1
    assert knn_accuracy(train, labels, test, torch.tensor([1, 1, 1])) == pytest.approx(2 / 3)


def test_linear_accuracy_is_that_of_sklearns_logistic_regression():
    features, labels = torch.randn(300, 5), torch.randint(0, 3, (300,))
    features[:, 0] += labels
    train, test = features[:200] * 50 + 7, features[200:] * 50 + 7
    standard = (features - features[:200].mean(dim=0)) / features[:200].std(dim=0)
    peer = LogisticRegression(C=1 / (0.1 * 200), max_iter=1000).fit(standard[:200], labels[:200])
    ours = linear_accuracy(train, labels[:200], test, labels[200:], 3, penalty=0.1)
    assert ours == pytest.approx(peer.score(standard[200:], labels[200:]), abs=1e-6)
