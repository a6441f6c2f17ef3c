"""Checkpoints: what is written is what is read, and anything else is refused with its name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmv_fast import load_model
from dmv_fast import weights as store
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.weights import CheckpointError, load_pretrained, save_model, sha256


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "mine.safetensors"
    save_model(DMV(DMVConfig(candidates=8, similarity="dot")), path)
    return path


def test_round_trip(checkpoint):
    torch.manual_seed(0)
    model = DMV(DMVConfig(candidates=8, similarity="dot"))
    loaded = load_model(checkpoint)
    assert loaded.config == model.config and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], tensor, atol=1e-3, rtol=1e-3), name
    assert load_model(checkpoint, k=2).config.candidates == 2
    assert load_file(checkpoint)["backbone.conv1.weight"].dtype == torch.float16
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_unknown_name_lists_the_shipped_ones():
    with pytest.raises(CheckpointError, match="'dmv99'"):
        load_model("dmv99")


def test_truncated_and_foreign_files(checkpoint, tmp_path):
    short = tmp_path / "short.safetensors"
    short.write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_model(short)
    pickle = tmp_path / "old.pt"
    torch.save({"a": torch.ones(2)}, pickle)
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_model(pickle)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(2)}, foreign)
    with pytest.raises(CheckpointError, match="not a dmv_fast checkpoint"):
        load_model(foreign)


def test_checkpoint_of_another_network(checkpoint, tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    tensors = load_file(checkpoint)
    tensors["head.centre.0.weight"] = torch.zeros(3, 3)
    save_file(tensors, wrong, metadata={"dmv_fast.config": '{"backbone": "resnet18"}'})
    with pytest.raises(CheckpointError, match=r"wrong\.safetensors: do not fit"):
        load_model(wrong)
    save_file(tensors, wrong, metadata={"dmv_fast.config": '{"shiny": 1}'})
    with pytest.raises(CheckpointError, match="newer"):
        load_model(wrong)


def test_wrong_hash(checkpoint):
    note = checkpoint.with_name(checkpoint.name + ".sha256")
    note.write_text(sha256(checkpoint) + "  mine.safetensors\n")
    load_model(checkpoint)
    note.write_text("0" * 64)
    with pytest.raises(CheckpointError, match="sha256"):
        load_model(checkpoint)


def test_shipped_files_are_listed_with_their_hash(monkeypatch, checkpoint, tmp_path):
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    monkeypatch.setattr(store, "SUMS", tmp_path / "SHA256SUMS")
    with pytest.raises(CheckpointError, match="not listed"):
        load_model("mine")
    store.SUMS.write_text(f"{sha256(checkpoint)}  mine.safetensors\n")
    assert store.known() == ["mine"]
    load_model("mine")
    store.SUMS.write_text(f"{'1' * 64}  mine.safetensors\n")
    with pytest.raises(CheckpointError, match="sha256"):
        load_model("mine")


def test_pretrained_stem(tmp_path):
    torch.manual_seed(0)
    source = DMV(DMVConfig()).backbone.state_dict()
    stem = {n: t for n, t in source.items() if n.startswith(("conv1", "bn1", "layer1", "layer2", "layer3"))}
    path = tmp_path / "stem.safetensors"
    save_file(stem, path)
    model = DMV(DMVConfig())
    load_pretrained(model, path)
    assert torch.equal(model.backbone.layer3[1].conv2.weight, source["layer3.1.conv2.weight"])
    with pytest.raises(CheckpointError, match="resnet50"):
        load_pretrained(DMV(DMVConfig(backbone="resnet50")), path)


def test_shipped_checkpoints_load():
    for name in store.known():
        load_model(name)
