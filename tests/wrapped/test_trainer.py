"""Hugging Face's Trainer and PEFT know the wrapped model for what it is."""

import json
import warnings

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import sfr


@pytest.fixture(autouse=True)
def _their_own_warnings(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these libraries say of themselves and of each other
        yield


def vit():
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], layer_type="basic", num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


@pytest.fixture(scope="module")
def images():
    """Return a data set with columns that no model takes."""
    generator = torch.Generator().manual_seed(0)
    rows = {
        "pixel_values": torch.randn(24, 3, 16, 16, generator=generator).tolist(),
        "labels": [k % 10 for k in range(24)],
        "image_id": list(range(24)),
        "caption": ["of no use"] * 24,
    }
    return datasets.Dataset.from_dict(rows).with_format("torch")


def trainer_of(model, images, folder, criterion=None, **options):
    """Return a Trainer with default arguments, but for what makes it short and quiet."""
    args = transformers.TrainingArguments(
        str(folder), max_steps=6, report_to="none", use_cpu=True, disable_tqdm=True, **options
    )
    return transformers.Trainer(
        model,
        args,
        train_dataset=images,
        eval_dataset=images,
        compute_loss_func=criterion,
        compute_metrics=lambda given: {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())},
    )


EVALUATED = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("make", [vit, resnet])
def test_default_arguments_train_and_evaluate_as_of_the_plain_model(make, images, tmp_path):
    plain = trainer_of(make(), images, tmp_path / "plain", **EVALUATED)
    plain.train()
    model = sfr.SFRWrapper(make())
    criterion = sfr.SFRLoss(model)
    trainer = trainer_of(model, images, tmp_path / "sfr", criterion, load_best_model_at_end=True, **EVALUATED)
    trainer.train()
    assert criterion.step == 6
    assert criterion.last.feature > 0
    assert trainer.label_names == plain.label_names
    metrics = trainer.evaluate()
    assert metrics.keys() == plain.evaluate().keys() >= {"eval_loss", "eval_accuracy"}
    with torch.no_grad():
        logits = sfr.unwrap(model).eval()(images["pixel_values"][:]).logits
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, images["labels"][:]).item(), rel=1e-4)
    assert trainer.state.best_model_checkpoint is not None


@pytest.mark.parametrize("make", [vit, resnet])
def test_what_is_saved_is_what_from_pretrained_loads(make, images, tmp_path):
    model = sfr.SFRWrapper(make())
    trainer = trainer_of(model, images, tmp_path, sfr.SFRLoss(model), **EVALUATED)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    weights = model.state_dict()
    for folder in ("saved", "checkpoint-6"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["architectures"] == [
            make().__class__.__name__
        ]
        loaded = make().__class__.from_pretrained(tmp_path / folder)
        assert not isinstance(loaded, sfr.SFRWrapper)
        assert loaded.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "saved" / "model.safetensors").keys()
    )


def test_a_checkpoint_resumes_the_weights_bit_for_bit(images, tmp_path):
    def run(folder, resume=None):
        torch.manual_seed(0)
        model = sfr.SFRWrapper(resnet())
        trainer = trainer_of(model, images, folder, sfr.SFRLoss(model), **EVALUATED)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    straight = run(tmp_path)
    resumed = run(tmp_path / "resumed", str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(value, straight[name]) for name, value in resumed.items())


# Transformers 5 has other names for them.
LORA = peft.LoraConfig(target_modules=r".*\.(query|q_proj|value|v_proj)", r=2, modules_to_save=["classifier"])


def adapted(order):
    torch.manual_seed(0)
    if order == "adapters first":
        model = sfr.SFRWrapper(peft.get_peft_model(vit(), LORA))
        return model, sfr.SFRLoss(model)
    model = peft.get_peft_model(sfr.SFRWrapper(vit()), LORA)
    return model, sfr.SFRLoss(model)


ORDERS = ["adapters first", "wrapped first"]


@pytest.mark.parametrize("order", ORDERS)
def test_adapters_train_with_the_feature_term_and_nothing_else_does(order, batch):
    model, criterion = adapted(order)
    criterion(model(pixel_values=batch[0]).logits, batch[1]).backward()
    assert criterion.last.feature > 0
    assert len(criterion.last.pairs) == 6
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)


@pytest.mark.parametrize("order", ORDERS)
def test_the_trainer_saves_the_adapters_alone_and_peft_loads_them(order, images, tmp_path):
    model, criterion = adapted(order)
    trainer = trainer_of(model, images, tmp_path, criterion, label_names=["labels"], **EVALUATED)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in ("saved", "checkpoint-6"):
        files = {file.name for file in (tmp_path / folder).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        assert "model.safetensors" not in files
        assert all(
            "lora" in name or "classifier" in name
            for name in load_file(tmp_path / folder / "adapter_model.safetensors")
        )
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(vit(), tmp_path / "saved").eval()
    x = images["pixel_values"][:4]
    assert torch.allclose(loaded(pixel_values=x).logits, model.eval()(pixel_values=x).logits, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_merged_adapters_give_the_plain_model(order, batch):
    model, criterion = adapted(order)
    criterion(model(pixel_values=batch[0]).logits, batch[1]).backward()
    expected = model.eval()(pixel_values=batch[0]).logits
    merged = sfr.unwrap(model.merge_and_unload())
    merged = sfr.unwrap(merged)
    assert type(merged) is transformers.ViTForImageClassification
    torch.testing.assert_close(merged(pixel_values=batch[0]).logits, expected, atol=1e-5, rtol=1e-4)


TEXTS = datasets.Dataset.from_dict(
    {"input_ids": [[k % 20] * 9 for k in range(24)], "labels": [[k % 20] * 9 for k in range(24)]}
)


def language_model():
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=4, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def test_a_language_model_trains_with_its_loss_from_the_logits(tmp_path):
    """The recipe of docs/guide/loops.md; without sfr's part it is the Trainer's own loss."""
    model = sfr.SFRWrapper(language_model())
    criterion = sfr.SFRLoss(model)

    def of_next_tokens(output, labels, num_items_in_batch=None):
        logits = output.logits[:, :-1].flatten(0, 1)
        return criterion(logits, labels[:, 1:].flatten(), num_items_in_batch=num_items_in_batch)

    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, gradient_accumulation_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(model, args, train_dataset=TEXTS, compute_loss_func=of_next_tokens).train()
    assert criterion.step == 3
    assert criterion.last.feature > 0

    ids = torch.tensor(TEXTS["input_ids"])[:4]
    with torch.no_grad():
        output = model.eval()(ids, labels=ids)
        torch.testing.assert_close(of_next_tokens(output, ids), output.loss)


def test_a_loss_that_the_model_has_not_computed_is_an_error_that_tells_of_the_trainer(tmp_path):
    model = sfr.SFRWrapper(language_model())
    criterion = sfr.SFRLoss(model, label_loss=lambda output, _: output.loss)
    args = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    with pytest.raises(ValueError, match=r"got NoneType\. A Hugging Face model .* from output\.logits"):
        transformers.Trainer(model, args, train_dataset=TEXTS, compute_loss_func=criterion).train()
