"""Files that are damaged, or made to deceive: each is refused, and nothing in it runs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_networks
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import grl_surgery as gs
from grl_surgery.io import atomic_write as atomic_files
from grl_surgery.io import export as exporting
from grl_surgery.io import programs
from grl_surgery.io import safetensors as safetensors_file
from grl_surgery.io.safetensors import _checksum

RAN: list[str] = []


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return RAN.append, ("code ran",)


@pytest.fixture(autouse=True)
def _nothing_runs() -> Any:
    RAN.clear()
    yield
    assert not RAN


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    m = gs.insert_grl(timm.create_model("test_resnet"), after="layer2")
    m = gs.attach_domain_head(m, "global_pool", hidden=8)
    return gs.export(m, tmp_path_factory.mktemp("good") / "m.safetensors").read_bytes()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    return gs.export(m, tmp_path_factory.mktemp("good") / "m.pt2", small_networks.image()).read_bytes()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --------------------------------------------------------------------------------- checkpoints, any bytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Bomb()), "is no safetensors file, but a pickle"),
        (b"", "is no safetensors file, but damaged: it has 0 bytes"),
        (b"{}", "is no safetensors file"),
        (struct.pack("<Q", 2**43) + b"{" + b" " * 100, "announce a header of 8,796,093,022,208"),
        (struct.pack("<Q", 2**63) + b"{}", "announce a header"),
        (struct.pack("<Q", 2) + b"{}", "holds weights and no recipe"),
        (struct.pack("<Q", 4) + b"{xx}", "is damaged: SafetensorError"),
        (
            struct.pack("<Q", 68)
            + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}} '
            + b"1234",
            "is damaged: SafetensorError",
        ),
        (
            struct.pack("<Q", 76)
            + b'{"a":{"dtype":"F32","shape":[250000000000],"data_offsets":[0,1000000000000]}}'[:76],
            "is damaged: SafetensorError",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(gs.ExportError, match=message):
        gs.load(written(tmp_path / "m.safetensors", content))


def test_a_zip_with_a_pickle_in_it_is_refused_as_a_checkpoint(tmp_path: Path) -> None:
    torch.save(Bomb(), tmp_path / "m.safetensors")
    with pytest.raises(gs.ExportError, match="is no safetensors file, but a zip archive"):
        gs.load(tmp_path / "m.safetensors")


def test_a_checkpoint_cut_off_anywhere_is_refused(checkpoint: bytes, tmp_path: Path) -> None:
    for end in (0, 1, 7, 8, 9, 1000, len(checkpoint) // 2, len(checkpoint) - 1):
        with pytest.raises(gs.ExportError, match=r"is damaged|is no safetensors file"):
            gs.load(written(tmp_path / "m.safetensors", checkpoint[:end]))


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(checkpoint: bytes, tmp_path: Path) -> None:
    draw = random.Random(0)
    header = 8 + int.from_bytes(checkpoint[:8], "little")
    places = [draw.randrange(header) for _ in range(150)] + [
        draw.randrange(header, len(checkpoint)) for _ in range(50)
    ]
    for place in places:
        damaged = bytearray(checkpoint)
        damaged[place] ^= 1 << draw.randrange(8)
        with pytest.raises(gs.ExportError, match=r"damaged|no safetensors|no recipe|not JSON"):
            gs.load(written(tmp_path / "m.safetensors", bytes(damaged)))


# ----------------------------------------------------------------------- checkpoints with a forged recipe


def forged(content: bytes, path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The checkpoint with another recipe or other tensors, and a checksum that fits."""
    written(path, content)
    with safe_open(path, framework="pt") as file:
        recipe = json.loads(file.metadata()["grl_surgery"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(recipe, tensors)
    text = json.dumps(recipe)
    save_file(tensors, path, {"grl_surgery": text, "grl_surgery_sha256": _checksum(text, tensors)})
    return path


def _set(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda recipe, tensors: recipe.update(values)


def _in_part(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda recipe, tensors: recipe["parts"][0].update(values)


def _in_cut(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda recipe, tensors: recipe["parts"][0]["cuts"][0].update(values)


def _in_classifier(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda recipe, tensors: recipe["parts"][0]["heads"]["domain"]["settings"]["classifier"].update(
        values
    )


def _other_shape(recipe: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["fc.weight"] = torch.zeros(3, 3)


def _missing(recipe: dict[str, Any], tensors: dict[str, Any]) -> None:
    del tensors["fc.weight"]


def _extra(recipe: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["__class__"] = torch.zeros(1)


FORGED = {
    "a factory": (_set(source="os:getcwd"), "only timm/NAME and torchvision/NAME are built from a file"),
    "a file of code": (_set(source="/tmp/evil.py:make"), "only timm/NAME and torchvision/NAME"),
    "a path that climbs": (_set(source="timm/../../evil"), "only timm/NAME and torchvision/NAME"),
    "a hub": (_set(source="timm/hf-hub:evil/repo"), "only timm/NAME and torchvision/NAME"),
    "no such model": (_set(source="timm/resnet18_evil"), "timm has no model 'resnet18_evil'"),
    "an option that loads a pickle": (
        _set(options={"checkpoint_path": "evil.pth"}),
        "the option 'checkpoint_path' = 'evil.pth', which is not allowed",
    ),
    "an option that downloads": (_set(options={"pretrained": True}), "the option 'pretrained' = True"),
    "terabytes of classes": (_set(options={"num_classes": 10**11}), "needs more than the .* bytes"),
    "terabytes of another network": (
        _set(source="timm/eva_giant_patch14_224"),
        "needs more than the .* bytes",
    ),
    "a head of terabytes": (_in_classifier(hidden=10**9), "needs more than the .* bytes|cannot be replayed"),
    "a head without end": (_in_classifier(depth=-1), "cannot be replayed: depth"),
    "a classifier of code": (_in_classifier(kind="os.system"), "no classifier of kind 'os.system'"),
    "another format": (_set(format=2), "has the format 2; this version reads format 1"),
    "no format": (_set(format="1"), "'format' is '1', not a whole number"),
    "modules that are no list": (_set(modules={}), "'modules' is {}, not a list"),
    "another network": (_set(source="timm/test_vit"), "the network is built differently here"),
    "a module that is not there": (_in_part(path="../x"), "cuts in '../x', and there is no such module"),
    "a name with dunders": (_in_cut(module="__class__"), "a cut of kind 'after' called '__class__'"),
    "a name that is taken": (_in_cut(module="conv1"), "splices in 'conv1', and the network has that already"),
    "a name that is code": (_in_cut(module="x); import os"), "a cut of kind 'after' called"),
    "a kind of cut": (_in_cut(kind="exec"), "a cut of kind 'exec'"),
    "an edge that is none": (_in_cut(kind="edge", at=["a"]), r"a cut on the edge \['a'\]"),
    "no point": (_in_cut(at="nowhere"), "cannot be replayed: there is no point 'nowhere'"),
    "another point": (_in_cut(at="layer1"), "the graph is differently here|the graph is different"),
    "another graph": (_set(graph="0" * 64), "the hash of the graph is not the one in the file"),
    "a coefficient that is code": (
        _set(reversals={"grl_layer2": {"coeff": "os", "dtype": "float32"}, "domain.reversal": {}}),
        "the coefficient of 'grl_layer2' is 'os'",
    ),
    "a coefficient that is infinite": (
        _set(reversals={"grl_layer2": {"coeff": "inf", "dtype": "float32"}, "domain.reversal": {}}),
        "the coefficient of 'grl_layer2': coeff is inf",
    ),
    "a dtype that is a function": (_set(dtype="load"), "'load' is no dtype"),
    "other ties": (_set(tied=[["fc.weight", "fc.bias"]]), "the tied tensors of the file are"),
    "a missing tensor": (_missing, "has no 'fc.weight'"),
    "a tensor too many": (_extra, "has '__class__', which the network has not"),
    "another shape": (_other_shape, r"'fc.weight' has the shape \(3, 3\) in the file"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_recipe_is_refused(
    name: str, checkpoint: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = FORGED[name]
    path = forged(checkpoint, tmp_path / "m.safetensors", change)
    monkeypatch.setattr(os, "system", lambda *_: RAN.append("system"))
    tracemalloc.start()
    try:
        with pytest.raises(gs.ExportError, match=message):
            gs.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


def test_a_recipe_nested_without_end_is_refused(checkpoint: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", checkpoint)
    tensors = {"a": torch.zeros(1)}
    for text in ("[" * 100_000, "[]", '{"format": ' + "9" * 10_000 + "}", "nonsense"):
        save_file(tensors, path, {"grl_surgery": text, "grl_surgery_sha256": _checksum(text, tensors)})
        with pytest.raises(gs.ExportError, match=r"the recipe in .* is (not JSON|a list)|'format'"):
            gs.load(path)


# ------------------------------------------------------------------------------------------------ programs


def rewritten(content: bytes, path: Path, change: Callable[[dict[str, bytes]], None], **options: Any) -> Path:
    """The archive with other members."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def member(members: dict[str, bytes], ending: str) -> str:
    return next(name for name in members if name.endswith(ending))


def _replace(ending: str, old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        name = member(members, ending)
        text = members[name].decode()
        assert re.search(old, text)
        members[name] = re.sub(old, lambda _: new, text, count=1).encode()

    return change


def _pickled_inputs(members: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    members[member(members, "sample_inputs/model.pt")] = buffer.getvalue()


def _add(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({name: data})


def _remove(ending: str) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.pop(member(members, ending)) and None


PROGRAMS = {
    "example inputs that run code": (_pickled_inputs, "are pickled Python objects"),
    "a pickled weight": (
        _replace("model_weights_config.json", r'"use_pickle": ?false', '"use_pickle": true'),
        "as a pickle, which could run any code",
    ),
    "a weight of another folder": (
        _replace("model_weights_config.json", r'"path_name": ?"weight_0"', '"path_name": "../../x"'),
        "as a pickle, which could run any code",
    ),
    "a custom object": (
        _add("m/data/constants/custom_obj_0", pickle.dumps(Bomb())),
        "which export never writes",
    ),
    "a path that climbs": (_add("m/../../../tmp/x", b""), "which export never writes"),
    "a library": (_add("m/data/aotinductor/model/x.so", b""), "which export never writes"),
    "another root": (_add("other/byteorder", b"little"), "which export never writes"),
    "a call of the system": (
        _replace("models/model.json", r'"target": ?"torch\.ops\.aten\.[^"]*"', '"target": "torch.os.system"'),
        "calls 'torch.os.system', which is no operation on tensors",
    ),
    "a size that is code": (
        _replace("models/model.json", r'"expr_str": ?"[^"]*"', '"expr_str": "__import__(\'os\').getcwd()"'),
        r"has the size .__import__",
    ),
    **{
        f"the guard {guard}": (
            _replace("models/model.json", r'"guards_code": ?\[\]', '"guards_code": ' + json.dumps([guard])),
            "which is not run",
        )
        for guard in (
            "print(1)",
            "L['x'].size.__globals__",
            "L['x'].size()[0] == 2  # it ends here",
            "(lambda: L)()",
            "L['x'].size(L['y'].size()[0])",
            "2 ** 9 ** 9 == L",
            "__import__('os')",
            3,
        )
    },
    "no recipe": (_remove("extra/grl_surgery.json"), "so export did not write it"),
    "no program": (_remove("models/model.json"), "so export did not write it"),
    "another reversal": (
        _replace("extra/grl_surgery.json", r'"reversals": \["grl_stage1"\]', '"reversals": ["grl_stage2"]'),
        "disagree about the reversal 'grl_stage1'",
    ),
    "a program that is no JSON": (_replace("models/model.json", r"^\{", "["), "is not JSON"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_forged_program_is_refused(name: str, program: bytes, tmp_path: Path) -> None:
    change, message = PROGRAMS[name]
    with pytest.raises(gs.ExportError, match=message):
        gs.load(rewritten(program, tmp_path / "m.pt2", change))


def test_the_program_that_is_not_forged_is_loaded(program: bytes, tmp_path: Path) -> None:
    assert gs.verify_flip(gs.load(rewritten(program, tmp_path / "m.pt2", lambda members: None))).ok


def test_a_program_that_would_unpack_to_any_size_is_refused(program: bytes, tmp_path: Path) -> None:
    path = rewritten(
        program,
        tmp_path / "m.pt2",
        lambda members: members.update({"m/data/weights/weight_0": bytes(10**7)}),
        compression=zipfile.ZIP_DEFLATED,
    )
    with pytest.raises(gs.ExportError, match=r"which export never|is compressed"):
        gs.load(path)


def test_a_program_cut_off_or_with_a_flipped_bit_is_refused(program: bytes, tmp_path: Path) -> None:
    for end in (0, 10, len(program) // 2, len(program) - 30):
        # In half of it, the last archive that is complete may be the one of the example inputs.
        with pytest.raises(gs.ExportError, match=r"is damaged or no \.pt2 archive|which export never writes"):
            gs.load(written(tmp_path / "m.pt2", program[:end]))
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        large = [row for row in archive.infolist() if row.file_size > 300]
    for row in large:
        damaged = bytearray(program)
        damaged[row.header_offset + 400] ^= 4
        with pytest.raises(gs.ExportError, match="is damaged"):
            gs.load(written(tmp_path / "m.pt2", bytes(damaged)))


def test_a_pickle_named_pt2_is_refused(tmp_path: Path) -> None:
    torch.save(Bomb(), tmp_path / "m.pt2")
    with pytest.raises(gs.ExportError, match="which export never writes"):
        gs.load(tmp_path / "m.pt2")
    with pytest.raises(gs.ExportError, match=r"is damaged or no \.pt2 archive"):
        gs.load(written(tmp_path / "n.pt2", pickle.dumps(Bomb())))


# -------------------------------------------------------------------------------------------------- folders


def test_the_code_in_a_folder_does_not_run_when_the_folder_is_loaded(tmp_path: Path) -> None:
    net = small_networks.Net()
    folder = gs.export(gs.insert_grl(net, after="stage1"), tmp_path / "spliced", small_networks.image())
    (folder / "model.py").write_text("raise SystemExit('code ran')")
    (folder / "config.json").write_text('{"source": "os:getcwd", "weights": "../../x"}')
    assert gs.verify_flip(gs.load(folder, model=net), net, small_networks.image()).ok


def test_a_folder_that_export_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    with pytest.raises(gs.ExportError, match=r"is not replaced, .*: chapter1\.tex"):
        gs.export(m, tmp_path / "thesis", small_networks.image())
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_folder_that_was_added_to_or_edited_is_not_replaced(tmp_path: Path) -> None:
    x = small_networks.image()
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    folder = gs.export(m, tmp_path / "spliced", x)
    (folder / "__pycache__").mkdir()  # as importing model.py leaves it
    gs.export(m, folder, x)
    (folder / ".git").mkdir()
    for name in ("README.md", "model.py", "config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("grl_surgery", "my_name"))
    with pytest.raises(gs.ExportError, match=r": \.git, README\.md, config\.json, model\.py\n"):
        gs.export(m, folder, x)
    assert "my_name" in (folder / "README.md").read_text()
    assert (folder / ".git").is_dir()


def test_what_an_interrupted_export_left_is_not_removed_where_it_is_not_ours(tmp_path: Path) -> None:
    previous = tmp_path / ".spliced.previous"
    previous.mkdir()
    (previous / "mine").touch()
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    with pytest.raises(gs.ExportError, match="is not replaced"):
        gs.export(m, tmp_path / "spliced", small_networks.image())
    assert (previous / "mine").exists()


# ----------------------------------------------------------------------------------- links and permissions


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_new_file_has_the_permissions_of_any_new_file_and_keeps_those_it_had(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    path = gs.export(m, tmp_path / "m.safetensors")
    folder = gs.export(m, tmp_path / "spliced", small_networks.image())
    assert {mode(file) for file in (path, *folder.iterdir())} == {mode(tmp_path / "any")}
    path.chmod(0o640)
    (folder / "model.py").chmod(0o600)
    gs.export(m, path)
    gs.export(m, folder, small_networks.image())
    assert mode(path) == 0o640
    assert mode(folder / "model.py") == 0o600


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("name", ["m.safetensors", "spliced"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    link, stored = tmp_path / name, tmp_path / "store" / "0f3a"
    link.symlink_to(stored)
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    for _ in range(2):
        gs.export(m, link, small_networks.image())
        assert link.is_symlink()
    assert [entry.name for entry in stored.parent.iterdir()] == ["0f3a"]
    assert gs.reversals(gs.load(link, model=small_networks.Net()))


# ------------------------------------------------------------------------------------------ atomic writing


class Crash(BaseException):
    """The power fails."""


def steps(name: str) -> list[tuple[Any, str]]:
    """Where writing can be interrupted."""
    writing = {
        "m.safetensors": (exporting, "write_checkpoint"),
        "m.pt2": (torch.export, "save"),
        "folder": (exporting, "write_code"),
    }
    reading = {
        "m.safetensors": (exporting, "check_checkpoint"),
        "m.pt2": (programs, "check_program"),
        "folder": (exporting, "check_folder"),
    }
    renaming = (os, "rename") if name == "folder" else (os, "replace")
    return [writing[name], (atomic_files, "_to_disk"), reading[name], renaming]


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt2", "folder"])
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_step_leaves_the_previous_file_whole(
    name: str, step: int, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = small_networks.image()
    old, new = (gs.insert_grl(small_networks.Net(), after=point) for point in ("stage1", "stage2"))
    path = gs.export(old, tmp_path / name, x)
    before = contents(path)
    owner, function = steps(name)[step]
    original = getattr(owner, function)

    def crash(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            original(*args, **kwargs)
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(owner, function, crash)
        with pytest.raises(Crash):
            gs.export(new, path, x)
    replaced = function in ("replace", "rename") and when == "after"
    left = sorted(entry.name for entry in tmp_path.iterdir())
    if not replaced:
        assert contents(path) == before
        assert left == [name]
    elif name == "folder":
        assert before in [contents(entry) for entry in tmp_path.iterdir()]
    else:
        assert gs.reversals(gs.load(path, **({} if name == "m.pt2" else {"model": small_networks.Net()})))
        assert left == [name]
    gs.export(new, path, x)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [name]


def contents(path: Path) -> dict[str, str]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_full_disk_leaves_the_previous_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    path = gs.export(m, tmp_path / "m.safetensors")
    before = contents(path)

    def full(model: Any, file: Path, *rest: Any, **options: Any) -> None:
        file.write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_checkpoint", full)
    with pytest.raises(gs.ExportError, match="No space left"):
        gs.export(m, path)
    assert contents(path) == before


def test_what_was_written_is_read_back_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    path = gs.export(m, tmp_path / "m.safetensors")
    before = contents(path)
    write = safetensors_file.write_checkpoint

    def damaging(model: Any, file: Path, *rest: Any, **options: Any) -> None:
        write(model, file, *rest, **options)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))

    monkeypatch.setattr(exporting, "write_checkpoint", damaging)
    with pytest.raises(gs.ExportError, match="its checksum is not that of its content"):
        gs.export(m, path)
    assert contents(path) == before
