"""Every Python snippet of README and pages runs, as a stranger would paste it; commands exist, links lead somewhere."""

import email
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision import models

import sfr
from common.diffusion_transformer import DiffusionTransformer

mpl.use("Agg")

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *sorted(ROOT.glob("C*.md"))]
EVIDENCE = {"accuracy", "cost", "dogo", "equality", "kdep", "models", "scaling", "transport"}
WRITTEN = [page for page in DOCS if page.parent != ROOT / "docs" or page.stem not in EVIDENCE]
CARDS = sorted((ROOT / "docs" / "methods").glob("*.md"))
OUTSIDE = {"examples.md", "benchmarks.md", "changelog.md", "contributing.md"}  # pages of the site, not in docs/
YOURS = "train.py"  # stands for the reader's own script
PROGRAMS = {"pip", "python", "pytest", "bash", "accelerate", "torchrun", "ruff", "mypy", "mkdocs", "."}
CARD = ["What it is", "How to use it", "Suggested settings", "When it helps", "When it hurts"]
CARD += ["Composability", "Attribution"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


WITH_SNIPPETS = [page for page in [ROOT / "README.md", *DOCS] if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if blocks(page, "bash")]


def surroundings(page):
    """What a user has before a snippet: a model, a loop around it, and what the page calls by name."""
    model = models.resnet18(num_classes=10)
    x, y = torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,))
    names = {"sfr": sfr, "torch": torch, "model": model, "x": x, "y": y, "loader": [(x, y)] * 2, "epochs": 3}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.01)
    names["data"] = TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6))
    if page.parent.name == "guide":  # the guide goes on where the quickstart ends
        names["model"] = sfr.SFRWrapper(model)
        names["criterion"] = sfr.SFRLoss(names["model"])
        names["criterion"](model(x), y)
    if page.stem == "own-loss":
        names["class_weights"] = torch.ones(10)
        names["detector"] = models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
        )
        names["images"] = [torch.rand(3, 64, 64)] * 2
        box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
        names["targets"] = [box, box]
    if page.stem == "layersync":
        names["transformer"] = DiffusionTransformer(16, patch=4, width=16, depth=6, heads=2, num_classes=10)
        names["noisy_images"], names["velocity"] = torch.randn(2, 4, 3, 16, 16)
        names["time"], names["labels"] = torch.rand(4), y
    if page.stem == "kdep":
        names |= {"teacher": models.resnet34(), "student": model, "images": [x] * 2, "loader": [x] * 2}
    if page.stem == "dogo":
        names |= {name: torch.randn(4, 3, 32, 32) for name in ("a1", "b1", "a2", "b2")}
    return names


def run(page):
    """Run all snippets of a page, from top to bottom; return the names that they leave."""
    names = surroundings(page)
    for snippet in blocks(page, "python"):
        exec(snippet, names)
    return names


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Snippets may write files."""
    monkeypatch.chdir(tmp_path)
    yield
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.mark.parametrize("page", [page for page in WITH_SNIPPETS if page.parent != ROOT], ids=name_of)
def test_the_snippets_of_a_page_run_from_top_to_bottom(page):
    names = run(page)
    if isinstance(names.get("loss"), torch.Tensor) and names["loss"].grad_fn and page.parent.name == "guide":
        names["loss"].backward()


def test_the_pages_for_users_have_snippets():
    pages = {name_of(page) for page in WITH_SNIPPETS}
    assert {"README.md", "docs/index.md", "docs/quickstart.md"} <= pages
    assert {name_of(card) for card in CARDS} <= pages
    guide = {path.stem for path in (ROOT / "docs" / "guide").glob("*.md")}
    assert {Path(page).stem for page in pages if "/guide/" in page} == guide - {"troubleshooting", "train-on-cifar"}


def test_the_two_lines_train_and_give_the_model_back():
    names = surroundings(ROOT / "README.md")
    plain = names["model"]
    before = plain.conv1.weight.detach().clone()
    exec(blocks(ROOT / "README.md", "python")[0], names)
    assert names["model"] is plain
    assert not isinstance(plain, sfr.SFRWrapper)
    assert not torch.equal(plain.conv1.weight, before)


def test_the_report_of_the_readme_is_printed_before_training(capsys):
    names = surroundings(ROOT / "README.md")
    two_lines, report = blocks(ROOT / "README.md", "python")
    exec(two_lines.partition("for x, y")[0], names)
    exec(report, names)
    assert "supervised by" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["guide/labels.md", "methods/past-predictions.md"])
def test_past_predictions_are_kept_of_every_sample(page):
    names = run(ROOT / "docs" / page)
    if page.startswith("guide"):
        names["loss"].backward()
    assert (names["criterion"].labels.source.table.sum(dim=1) > 0).all()
    assert names["criterion"].config.alpha == sfr.Ramp(0, 0.8, steps=3)


@pytest.mark.parametrize("card", CARDS, ids=name_of)
def test_a_method_card_has_the_fixed_sections(card):
    assert re.findall(r"^## (.*)$", card.read_text(), flags=re.MULTILINE) == CARD


def test_the_readme_has_at_most_a_thousand_words():
    words = [word for word in (ROOT / "README.md").read_text().split() if any(map(str.isalnum, word))]
    assert len(words) <= 1000


def description_of_the_package(folder, repository):
    """The README in the metadata of the package, built with this address of the repository."""
    pytest.importorskip("setuptools", minversion="77", reason="an older one does not know this pyproject.toml")
    shutil.copytree(ROOT / "sfr", folder / "sfr", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE", "setup.py"):
        shutil.copy(ROOT / name, folder)
    project = re.sub(r"^\[project\.urls\]\n(.+\n)*", "", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    urls = f'\n[project.urls]\nRepository = "{repository}"\n' if repository else ""
    (folder / "pyproject.toml").write_text(project + urls)
    build = "import setuptools.build_meta as backend; backend.prepare_metadata_for_build_wheel('metadata')"
    (folder / "metadata").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    [metadata] = (folder / "metadata").glob("*.dist-info/METADATA")
    return email.message_from_string(metadata.read_text()).get_payload()


def targets_in(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_a_package_index_shows_no_link_of_the_readme_that_leads_nowhere(tmp_path):
    readme = (ROOT / "README.md").read_text()
    plain = description_of_the_package(tmp_path / "plain", None)
    assert targets_in(plain) == [target for target in targets_in(readme) if "://" in target]
    there = "https://example.org/sfr"
    absolute = description_of_the_package(tmp_path / "absolute", there)
    assert len(targets_in(absolute)) == len(targets_in(readme))
    assert all("://" in target for target in targets_in(absolute))
    assert f"({there}/blob/HEAD/docs/quickstart.md)" in absolute
    assert f"({there}/raw/HEAD/docs/method.png)" in absolute


def test_the_picture_of_the_method_is_small():
    assert (ROOT / "docs" / "method.png").stat().st_size < 150_000


def test_every_page_is_in_the_navigation():
    navigation = re.search(r"^nav:\n(.*?)^\S", (ROOT / "mkdocs.yml").read_text(), flags=re.DOTALL | re.MULTILINE)[1]
    listed = set(re.findall(r"([\w/-]+\.md)$", navigation, flags=re.MULTILINE)) - OUTSIDE
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in DOCS}


def commands_of(text):
    """The words of each command in a block of shell, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for end in [i for i, word in enumerate(words) if word in ("&&", "|", ";")][::-1]:
            yield words[end + 1 :]
            words = words[:end]
        if words:
            yield words


def files_called_by(words):
    """The files of the repository that a command runs."""
    if "-m" in words and words[0].startswith("python"):
        module = ROOT.joinpath(*words[words.index("-m") + 1].split("."))
        if module.parts[len(ROOT.parts)] in ("benchmarks", "examples"):
            yield module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    for word in words:
        if word == YOURS:
            return
        if re.search(r"^[\w./-]+\.(py|sh)$", word) or word == ".ci/run":
            yield ROOT / word


def options_of(words):
    """The long options of a command that are the script's own."""
    script = next((place for place, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
    if script is None:
        script = words.index("-m") + 1
    return {word.partition("=")[0] for word in words[script + 1 :] if word.startswith("--")}


def sources_of(file):
    """The text of a script and of the modules beside it, where its options are declared."""
    files = file.parent.rglob("*.py") if file.name == "__main__.py" else [file, *file.parent.glob("*/*.py")]
    return "".join(path.read_text() for path in {file, *files})


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_the_commands_of_a_page_exist_with_their_options(page):
    for block in blocks(page, "bash"):
        for words in commands_of(block):
            assert words[0] in PROGRAMS, words
            for file in files_called_by(words):
                assert file.exists(), words
                for option in options_of(words):
                    assert f'"{option}"' in sources_of(file), (words, option)


def test_extras_named_by_a_page_exist():
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for named in re.findall(r"pip install .*?\"?\.\[([\w,]+)\]", page.read_text()):
            assert set(named.split(",")) <= extras, name_of(page)


def anchors_of(page):
    """The anchors of a page as GitHub makes them of its titles."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors_of(there), target


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_page_is_reached_from_another(page):
    reached = {
        (other.parent / target.partition("#")[0]).resolve()
        for other in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", other.read_text())
        if other != page
    }
    assert page in reached
