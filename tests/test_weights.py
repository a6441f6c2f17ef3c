"""Checkpoints: what is written is what is read, and anything else is refused with its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmv_fast import load_model
from dmv_fast import weights as store
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.weights import CheckpointError, load_pretrained, places, save_model, sha256

ROOT = Path(__file__).resolve().parent.parent


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
        accuracy = 2**-8 if tensor.ndim == 4 else 1e-3
        assert torch.allclose(loaded.state_dict()[name], tensor, atol=1e-3, rtol=accuracy), name
    assert load_model(checkpoint, k=2).config.candidates == 2
    assert load_file(checkpoint)["backbone.conv1.weight"].dtype == torch.float16
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_weights_of_convolutions_are_bfloat16_numbers(tmp_path):
    """Whatever their size: float16 has as many bits for large ones as for small ones only down to 2^-14."""
    model = DMV(DMVConfig())
    with torch.no_grad():
        weight = model.head.centre[0].weight
        weight.copy_(torch.randn(weight.shape) * torch.logspace(-6, 1, weight.shape[1])[:, None, None])
    path = tmp_path / "mine.safetensors"
    save_model(model, path)
    stored = load_model(path).state_dict()
    for name, tensor in stored.items():
        assert tensor.ndim != 4 or torch.equal(tensor, tensor.bfloat16().float()), name
    assert torch.allclose(stored["head.centre.0.weight"], weight, atol=2**-24, rtol=2**-8)
    save_model(model, path, dtype=torch.float32)
    assert torch.equal(load_model(path).state_dict()["head.centre.0.weight"], weight)


@pytest.mark.parametrize("name", sorted(store.known()))
def test_convolutions_of_the_shipped_ones_are_bfloat16_numbers(name):
    """So that float32 of two parts takes two products, as README's figures have it."""
    if store.known()[name] is None:
        pytest.skip(f"{name} is not here")
    weights = {key: tensor for key, tensor in load_model(name).state_dict().items() if tensor.ndim == 4}
    assert [key for key, w in weights.items() if not torch.equal(w, w.bfloat16().float())] == []


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


@pytest.fixture
def house(monkeypatch, tmp_path, checkpoint):
    """A list that names two checkpoints, one of them shipped; folders of a checkout and a cache."""
    shipped = tmp_path / "checkout/dmv_fast/weights"
    shipped.mkdir(parents=True)
    (tmp_path / "checkout/weights").mkdir()
    monkeypatch.setattr(places, "SHIPPED", shipped)
    monkeypatch.setattr(places, "SUMS", shipped / "SHA256SUMS")
    monkeypatch.setenv("DMV_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    shutil.copy(checkpoint, shipped / "small.safetensors")
    digest = sha256(checkpoint)
    places.SUMS.write_text(f"{digest}  small.safetensors\n{digest}  large.safetensors\n")
    return tmp_path


def test_named_checkpoints_are_found_in_each_of_their_places(house, checkpoint):
    shipped, cached = places.SHIPPED / "small.safetensors", house / "cache/large.safetensors"
    assert store.known() == {"large": None, "small": shipped}
    load_model("small")
    shutil.copy(checkpoint, cached)
    assert store.known()["large"] == store.find("large") == cached
    load_model("large")
    in_checkout = house / "checkout/weights/large.safetensors"
    shutil.copy(checkpoint, in_checkout)
    # Beside an installed package a folder that happens to be named weights is not ours.
    assert store.find("large") == cached
    (house / "checkout/pyproject.toml").touch()
    assert store.find("large") == in_checkout
    load_model("large")


def test_an_absent_checkpoint_says_what_to_put_where(house, checkpoint):
    with pytest.raises(CheckpointError) as error:
        load_model("large")
    place = str(house / "cache/large.safetensors")
    for said in ("'large'", "folder weights/", place, sha256(checkpoint), "DMV_FAST_CACHE"):
        assert said in str(error.value)
    with pytest.raises(CheckpointError, match=r"'huge': no such file.*large, small"):
        load_model("huge")


@pytest.mark.parametrize("place", ["checkout/dmv_fast/weights/small", "cache/large"])
def test_a_named_checkpoint_with_another_sum_is_refused(house, checkpoint, place):
    path = house / f"{place}.safetensors"
    path.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(CheckpointError) as error:
        load_model(path.stem)
    for said in (str(path), sha256(path), sha256(checkpoint), str(path.stat().st_size)):
        assert said in str(error.value)


def test_a_shipped_file_that_is_not_listed_is_refused(house, checkpoint):
    stray = places.SHIPPED / "stray.safetensors"
    shutil.copy(checkpoint, stray)
    with pytest.raises(CheckpointError, match="not listed"):
        load_model(stray)


def test_where_the_cache_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("DMV_FAST_CACHE", str(tmp_path / "here"))
    assert store.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("DMV_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(places.sys, "platform", "linux")
    assert store.cache_folder() == tmp_path / "dmv_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_folder() == Path.home() / ".cache/dmv_fast"
    monkeypatch.setattr(places.sys, "platform", "darwin")
    assert store.cache_folder() == Path.home() / "Library/Caches/dmv_fast"
    monkeypatch.setattr(places.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    assert store.cache_folder() == tmp_path / "Local/dmv_fast"


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


def test_every_checkpoint_of_the_checkout_is_listed_and_loads(monkeypatch, tmp_path):
    monkeypatch.setenv("DMV_FAST_CACHE", str(tmp_path))  # not what this machine's cache holds
    files = [*places.SHIPPED.glob("*.safetensors"), *(ROOT / "weights").glob("*.safetensors")]
    assert sorted(store.known().values()) == sorted(files)
    for name, path in store.known().items():
        load_model(name)
        assert path.with_suffix(".md").is_file(), f"{name} has no model card"


def test_the_wheel_stays_small():
    assert sum(path.stat().st_size for path in places.SHIPPED.glob("*.safetensors")) < 45e6
