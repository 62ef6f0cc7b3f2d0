"""A trained module moves to another localizer: the map, what it is folded into, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer, load_model
from regionspot.checkpoint.formats import fingerprint
from regionspot.config import load_config
from regionspot.data import register_json_dataset
from regionspot.data.tokens import TokenStore
from regionspot.engine.token_transfer import TokenMoments, open_store, pairs_of_dataset, pairs_of_stores, transfer
from regionspot.modeling.localizers import LOCALIZER_REGISTRY, SamLocalizer
from regionspot_cli.commands import COMMANDS

from ..helpers import TINY, as_inputs, frozen_overrides, tiny_model, write_dataset, write_frozen_parts

NAME = "test_transfer"
MIXED = ("MODEL.REGIONSPOT.LOCALIZER.NAME", "MixedLocalizer")


class MixedLocalizer(SamLocalizer):
    """SAM whose tokens are an invertible linear transform of its own."""

    def forward(self, *args, **kwargs):
        generator = torch.Generator().manual_seed(5)
        matrix = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0] * torch.linspace(0.5, 2, 32)
        offset = torch.randn(32, generator=generator)
        outputs = super().forward(*args, **kwargs)
        return [
            dataclasses.replace(x, stage_tokens={key: t @ matrix + offset for key, t in x.stage_tokens.items()})
            for x in outputs
        ]


@pytest.fixture(scope="module", autouse=True)
def directory(tmp_path_factory):
    """A data set, the frozen weights, a trained checkpoint, and the config of the other localizer."""
    directory = tmp_path_factory.mktemp("transfer")
    LOCALIZER_REGISTRY._obj_map["MixedLocalizer"] = MixedLocalizer
    register_json_dataset(NAME, write_dataset(directory / "data", 36), directory / "data" / "images")
    model = tiny_model(names=None)
    write_frozen_parts(model.recognizer, directory)
    RegionSpotCheckpointer(model, str(directory)).save("trained", is_last=False)
    (directory / "mixed.yaml").write_text(load_config(TINY, list(MIXED)).dump())
    yield directory
    del LOCALIZER_REGISTRY._obj_map["MixedLocalizer"]
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture(scope="module")
def stores(directory):
    """The token stores of both localizers, side by side."""
    for config in (TINY, directory / "mixed.yaml"):
        base = ["--config-file", config, "--datasets", NAME, "--output", directory, "--side-by-side"]
        COMMANDS["extract"].call(*base, *frozen_overrides(directory))
    return directory / NAME


@pytest.fixture
def models(request):
    """The trained model, and one with the other localizer and another start."""
    options = ("MODEL.REGIONSPOT.INTEGRATION.MASK_POOLING", getattr(request, "param", False))
    trained, other = tiny_model(*options), tiny_model(*MIXED, *options)
    other.recognizer.localizer.load_state_dict(trained.recognizer.localizer.state_dict())
    other.recognizer.vision_language.load_state_dict(trained.recognizer.vision_language.state_dict())
    for parameter in other.recognizer.knowledge_integration.parameters():
        torch.nn.init.normal_(parameter)
    return trained, other


@torch.no_grad()
def logits(model):
    """Return the logits of regions that no map was fitted on."""
    inputs = [as_inputs(i) for i in (100, 101)]
    images = [x["image"] for x in inputs]
    tokens = model.recognizer.position_tokens(images, [x["instances"].gt_boxes for x in inputs])
    return model.recognizer.classify(tokens, model.recognizer.vision_language.encode_images(images))


def call(directory, output, *options):
    arguments = ["--config-file", TINY, "--weights", directory / "trained.pth", "--to", directory / "mixed.yaml"]
    overrides = [*frozen_overrides(directory)]
    return COMMANDS["transfer"].call(*arguments, "--output", output, *options, *overrides)


def test_map_is_the_least_squares_one():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6).double() + 3
    outputs = inputs[:, :4].sin() + 0.1 * torch.randn(500, 4, generator=generator)
    moments = TokenMoments(6, 4)
    for part in zip(inputs.split(7), outputs.split(7)):
        moments.add(*part)
    matrix, offset = moments.fit(1e-14)
    design = np.concatenate([inputs.numpy(), np.ones((500, 1))], axis=1)
    expected, *_ = np.linalg.lstsq(design, outputs.numpy(), rcond=None)
    np.testing.assert_allclose(matrix.numpy(), expected[:6].T, atol=1e-8)
    np.testing.assert_allclose(offset.numpy(), expected[6], atol=1e-8)
    error = (outputs - inputs @ matrix.T - offset).square().sum()
    variance = (outputs - outputs.mean(dim=0)).square().sum()
    assert moments.explained_variance(matrix, offset) == pytest.approx(float(1 - error / variance), abs=1e-9)
    # a map that is off by a constant explains less, however well it follows
    assert moments.explained_variance(matrix, offset + 9) < 0
    # all of the penalty's, none of the offset's: a large ridge leaves the mean
    shrunk, mean = moments.fit(1e12)
    np.testing.assert_allclose(shrunk.numpy(), 0, atol=1e-8)
    np.testing.assert_allclose(mean.numpy(), outputs.mean(dim=0).numpy(), atol=1e-8)


@pytest.mark.parametrize("models", [False, True], ids=["", "mask pooling"], indirect=True)
def test_linear_transform_is_undone(models):
    trained, other = models
    before = {key: x.clone() for key, x in trained.recognizer.state_dict().items()}
    expected = logits(trained)
    assert not all(torch.allclose(*pair, atol=1e-2) for pair in zip(logits(other), expected))
    both = (trained.recognizer, other.recognizer)
    result = transfer(*both, pairs_of_dataset(*both, NAME, 36), ridge=1e-10)
    for one, reference in zip(logits(other), expected):
        torch.testing.assert_close(one, reference, atol=1e-4, rtol=0)
    assert result.explained_variance > 0.9999 and result.num_pairs > 5 * result.num_held_out > 20
    assert all(torch.equal(x, before[key]) for key, x in trained.recognizer.state_dict().items())
    copied = other.recognizer.knowledge_integration.state_dict()
    for key, value in trained.recognizer.knowledge_integration.state_dict().items():
        assert torch.equal(copied[key], value) != key.startswith("to_clip."), key


def test_command_with_stores_and_images(directory, stores, tmp_path, capsys):
    options = {"stores": ["--stores", stores, stores], "images": ["--dataset", NAME]}
    maps = {}
    for name, source in options.items():
        assert call(directory, tmp_path / "out" / f"{name}.pth", *source, "--ridge", 1e-3) > 0.5
        assert "explained variance 0." in capsys.readouterr().out
        maps[name] = torch.load(tmp_path / "out" / f"{name}.pth", weights_only=True)["model"]["model.to_clip.weight"]
    # stores are in float16
    torch.testing.assert_close(maps["stores"], maps["images"], atol=2e-2, rtol=0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"stores.pth", "images.pth"}
    # training starts from it
    path = tmp_path / "out" / "images.pth"
    loaded = load_model(
        load_config(directory / "mixed.yaml", [*frozen_overrides(directory), "MODEL.WEIGHTS", str(path)])
    )
    torch.testing.assert_close(loaded.recognizer.knowledge_integration.to_clip.weight.cpu(), maps["images"])
    frozen = torch.load(path, weights_only=True)["frozen"]
    assert frozen["sam"]["source"] == str(directory / "sam.pth")
    old, new = (sorted(stores.glob(f"{kind}Localizer-*"))[0] for kind in ("Sam", "Mixed"))
    with pytest.raises(ValueError, match="another sam: expected .*MixedLocalizer.*got .*SamLocalizer"):
        open_store(old, loaded.recognizer)
    one, other = TokenStore(old), TokenStore(new)
    other.manifest["annotations"] = {"source": "other.json", "fingerprint": "0"}
    with pytest.raises(ValueError, match="of another annotations"):
        next(pairs_of_stores(one, other, 9))


def test_checkpoint_belongs_to_the_new_localizer(directory, models, tmp_path):
    trained, other = models
    torch.nn.init.normal_(other.recognizer.localizer.sam.mask_decoder.iou_token.weight)
    transfer(trained.recognizer, other.recognizer, [torch.randn(2, 9, 32).unbind() for _ in range(20)])
    RegionSpotCheckpointer(other, str(tmp_path)).save("start", is_last=False)
    frozen = torch.load(tmp_path / "start.pth", weights_only=True)["frozen"]
    assert frozen["sam"]["fingerprint"] == fingerprint(other.recognizer.localizer.sam.state_dict())
    RegionSpotCheckpointer(other).load(str(tmp_path / "start.pth"))
    with pytest.raises(ValueError, match="was trained with another sam"):
        RegionSpotCheckpointer(trained).load(str(tmp_path / "start.pth"))


def test_interrupted_write_leaves_nothing(directory, stores, tmp_path, monkeypatch):
    def interrupted(_, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(directory, tmp_path / "out" / "start.pth", "--stores", stores, stores)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("MODEL.REGIONSPOT.CLIP.FEATURES", "feature_map"),
            "same vision-language model.*class_token.*part feature_map",
        ),
        (("MODEL.REGIONSPOT.TOKEN_STAGE", "prompt_encoder"), "TOKEN_STAGE.*got transformer and prompt_encoder"),
        (("MODEL.REGIONSPOT.INTEGRATION.DEPTH", 2), "same MODEL.REGIONSPOT.INTEGRATION"),
    ],
)
def test_other_models_are_refused(overrides, message):
    trained, other = tiny_model().recognizer, tiny_model(*MIXED, *overrides).recognizer
    other.vision_language.load_state_dict(trained.vision_language.state_dict())
    with pytest.raises(ValueError, match=message):
        transfer(trained, other, [])


def test_other_clip_and_few_regions_are_refused(models):
    trained, other = (model.recognizer for model in models)
    before = {key: x.clone() for key, x in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"at least 64 regions to fit and 2 to hold out, got \d+ and 0"):
        transfer(trained, other, pairs_of_dataset(trained, other, NAME, 9))
    assert all(torch.equal(x, before[key]) for key, x in other.state_dict().items())
    torch.nn.init.zeros_(other.vision_language.clip_model.text_projection)  # the image encoder alone is the same
    with pytest.raises(ValueError, match=r"expected the same vision-language model in both configs, got .*\w{12}"):
        transfer(trained, other, [])
