"""Checkpoints: what is saved comes back, what is damaged or hostile is named, and no kill loses one."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hrm.checkpoint.read import (
    CheckpointError,
    differences,
    latest_checkpoint,
    load_checkpoint,
    read_manifest,
)
from hrm.checkpoint.save import save_checkpoint
from tests.support.checkpoints import names, refused, reseal, save, write_manifest
from tests.support.paths import ROOT

# --- what is saved comes back


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = np.random.Generator(np.random.Philox(3))
    weights = {
        "a.weight": torch.randn(5, 3),
        "half": torch.randn(4).to(torch.bfloat16),
        "transposed": torch.randn(2, 6).t(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    training: dict[str, Any] = {
        "optimiser": {"step": torch.tensor(7), "moment": torch.randn(9).t(), "empty": {}, 3: []},
        "random": [random.Random(1).getstate(), torch.get_rng_state()],
        "philox": {
            "counter": torch.from_numpy(generator.bit_generator.state["state"]["counter"].view(np.int64))
        },
        "numbers": [1, -1.5, True, None, "text", float("inf"), 2**127],
        "halted": torch.tensor([True, False]),
    }
    path = save_checkpoint(
        tmp_path / "project" / "run",
        12,
        weights=weights,
        training=training,
        run={"seed": 5, "ratio": 0.25, "nested": {"names": ("x", "y")}},
        facts={"metrics": {"loss": float("nan"), "accuracy": 0.5}},
    )
    assert path == tmp_path / "project" / "run" / "step_12"
    assert names(path) == ["manifest.json", "model.safetensors", "training.pt"]
    read = load_checkpoint(path)
    assert (read.step, read.path, read.notes) == (12, path, [])
    assert read.weights.keys() == weights.keys()
    for name, tensor in weights.items():
        assert read.weights[name].dtype == tensor.dtype and torch.equal(read.weights[name], tensor)
    restored = random.Random()
    restored.setstate(read.training["random"][0])
    assert restored.random() == random.Random(1).random()
    assert torch.equal(read.training["random"][1], training["random"][1])
    assert torch.equal(read.training["philox"]["counter"], training["philox"]["counter"])
    assert torch.equal(read.training["optimiser"]["moment"], training["optimiser"]["moment"])
    assert read.training["optimiser"]["empty"] == {} and read.training["optimiser"][3] == []
    assert read.training["numbers"] == training["numbers"]
    assert torch.equal(read.training["halted"], training["halted"])
    manifest = read.manifest
    assert manifest["run"] == {"seed": 5, "ratio": 0.25, "nested": {"names": ["x", "y"]}}
    assert manifest["metrics"] == {"loss": None, "accuracy": 0.5}
    assert manifest["versions"]["torch"] == torch.__version__
    for name in ("model.safetensors", "training.pt"):
        data = (path / name).read_bytes()
        assert manifest["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_views_of_one_flat_buffer_are_saved_apart_and_compactly(tmp_path: Path) -> None:
    flat = torch.arange(1_000_000, dtype=torch.float32)
    path = save_checkpoint(
        tmp_path,
        1,
        weights={"a": flat[:6].view(2, 3), "b": flat[6:10], "again": flat[:6].view(3, 2)},
        training={"moment": flat[10:20], "other": [flat[15:25]]},
        run={},
    )
    read = load_checkpoint(path)
    assert torch.equal(read.weights["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(read.weights["b"], torch.arange(6.0, 10.0))
    assert torch.equal(read.weights["again"], torch.arange(6.0).view(3, 2))
    assert torch.equal(read.training["moment"], torch.arange(10.0, 20.0))
    assert torch.equal(read.training["other"][0], torch.arange(15.0, 25.0))
    assert sum(file.stat().st_size for file in path.iterdir()) < 10_000


def test_changing_loaded_tensors_does_not_change_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 2.0)
    read = load_checkpoint(path)
    read.training["moment"].zero_()
    read.weights["w"].zero_()
    again = load_checkpoint(path)
    assert again.training["moment"].tolist() == [2.0] * 7 and again.weights["w"].eq(2).all()


@pytest.mark.parametrize(
    ("training", "place"),
    [
        ({"a": {"b": [1, np.float64(2)]}}, "training.a.b[1] is a float64"),
        ({"a": np.zeros(2)}, "training.a is a ndarray"),
        ({"a": {1, 2}}, "training.a is a set"),
        ({"a": {(1, 2): 3}}, "training.a: key (1, 2)"),
    ],
)
def test_unreadable_values_are_not_saved(tmp_path: Path, training: dict, place: str) -> None:
    with pytest.raises(TypeError) as caught:
        save_checkpoint(tmp_path / "run", 1, weights={}, training=training, run={})
    assert place in str(caught.value)
    assert not (tmp_path / "run").exists()


# --- which one is the newest, which ones stay


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100, 101):
        save(tmp_path, step, step, keep=2)
    assert names(tmp_path) == ["step_100", "step_101"]
    save(tmp_path, 102, keep=None)
    save(tmp_path, 103, keep=None)
    assert names(tmp_path) == ["step_100", "step_101", "step_102", "step_103"]
    save(tmp_path, 104, keep=1)
    assert names(tmp_path) == ["step_104"]
    with pytest.raises(ValueError):
        save(tmp_path, 105, keep=0)


def test_the_newest_is_the_one_saved_last(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, step)
    # a run that went back to step 10 and on from there
    save(tmp_path, 15, 15, keep=2)
    assert names(tmp_path) == ["step_15", "step_30"]
    assert latest_checkpoint(tmp_path) == (tmp_path / "step_15", [])
    assert load_checkpoint(tmp_path).training["value"] == 15


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    save(tmp_path, 2, 2.5)
    assert names(tmp_path) == ["step_1", "step_2"]
    assert load_checkpoint(tmp_path).weights["w"].eq(2.5).all()


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") == (None, [])
    (tmp_path / "step_x").mkdir()
    (tmp_path / "other").mkdir()
    assert latest_checkpoint(tmp_path) == (None, [])
    refused(tmp_path, str(tmp_path), "no step_<N> folder")
    refused(tmp_path / "missing", "does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")


def test_leftovers_of_killed_saves_are_skipped_and_then_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    shutil.copytree(tmp_path / "step_1", tmp_path / ".tmp_step_2_abcd")
    (tmp_path / "step_1").rename(tmp_path / "step_1.old")
    (tmp_path / "notes").write_text("the user's")
    read = load_checkpoint(tmp_path)
    assert (read.path.name, read.step, read.notes) == ("step_1.old", 1, [])
    save(tmp_path, 3, 3.0)
    assert names(tmp_path) == ["notes", "step_1", "step_3"]
    shutil.copytree(tmp_path / "step_3", tmp_path / "step_3.old")
    assert load_checkpoint(tmp_path).path.name == "step_3"
    save(tmp_path, 4, 4.0)
    assert names(tmp_path) == ["notes", "step_1", "step_3", "step_4"]


# --- damage


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt", "manifest.json"])
def test_a_flipped_byte_is_reported_and_the_previous_checkpoint_is_used(tmp_path: Path, file: str) -> None:
    save(tmp_path, 1, 1.0)
    damaged = save(tmp_path, 2, 2.0) / file
    data = damaged.read_bytes()
    choose = random.Random(0)
    for position in [0, len(data) - 2, *(choose.randrange(len(data)) for _ in range(30))]:
        flipped = bytes([data[position] ^ (1 << choose.randrange(8))])
        # between the fields of the JSON text some bytes carry no meaning
        if file == "manifest.json" and data[position : position + 1].isspace():
            continue
        damaged.write_bytes(data[:position] + flipped + data[position + 1 :])
        refused(tmp_path / "step_2", str(damaged))
        read = load_checkpoint(tmp_path)
        assert (read.step, read.training["value"], len(read.notes)) == (1, 1.0, 1)
        assert str(damaged) in read.notes[0]
    damaged.write_bytes(data)
    assert load_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt", "manifest.json"])
@pytest.mark.parametrize("length", [None, 0, 1, -1])
def test_missing_and_truncated_files(tmp_path: Path, file: str, length: int | None) -> None:
    save(tmp_path, 1, 1.0)
    damaged = save(tmp_path, 2, 2.0) / file
    data = damaged.read_bytes().rstrip()
    damaged.unlink()
    if length is not None:
        damaged.write_bytes(data[:length])
    refused(tmp_path / "step_2", str(damaged), "use a")
    path, notes = latest_checkpoint(tmp_path)
    assert path == tmp_path / "step_1" and len(notes) == 1 and str(damaged) in notes[0]
    shutil.rmtree(tmp_path / "step_1")
    refused(tmp_path, "no undamaged checkpoint", str(damaged))


def test_pruning_does_not_count_damaged_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    (tmp_path / "step_2" / "manifest.json").unlink()
    save(tmp_path, 3, 3.0, keep=2)
    assert names(tmp_path) == ["step_1", "step_2", "step_3"]
    path, notes = latest_checkpoint(tmp_path)
    assert path == tmp_path / "step_3" and "step_2" in notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        "{}",
        "[]",
        '"digest"',
        "null",
        '{"digest": 1}',
        '{"a": ' + "9" * 5000 + "}",
        "\ud800".encode("utf-8", "surrogatepass"),
        " " * (1 << 21),
    ],
    ids=range(9),
)
def test_absurd_manifests(tmp_path: Path, text: str | bytes) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path / "step_1", str(path), "more than 1 MiB" if len(text) > 1 << 20 else "damaged")


def test_forged_manifests(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    original = json.loads((path / "manifest.json").read_text())
    files = original["files"]
    forged: list[dict[str, Any]] = [
        {"step": "1"},
        {"step": -1},
        {"step": True},
        {"run": []},
        {"serial": None},
        {"files": []},
        {"files": {"training.pt": files["training.pt"]}},
        {"files": files | {"../../step_9": {"size": 0, "sha256": ""}}},
        {"files": files | {"training.pt": 3}},
    ]
    for fields in forged:
        write_manifest(path, original | fields)
        refused(path, "manifest.json is damaged (wrong digest or fields)")
    write_manifest(path, original | {"format": 2})
    refused(path, "checkpoint format 2, this version reads 1")
    write_manifest(path, original)
    assert load_checkpoint(path).step == 1
    path.rename(tmp_path / "step_7")
    refused(tmp_path / "step_7", "belongs to step 1; rename its folder to step_1")
    # under a name of the user's choice it is still a checkpoint
    (tmp_path / "step_7").rename(tmp_path / "best")
    assert load_checkpoint(tmp_path / "best").step == 1


# --- hostile files


def test_training_files_that_unfold_beyond_their_size(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    file = path / "training.pt"

    nested: list = [1]
    for _ in range(40):
        nested = [nested, nested]
    cyclic: list = [1]
    cyclic.append(cyclic)
    wide = torch.zeros(1).expand(1 << 40)
    deep: list = []
    for _ in range(300):
        deep = [deep]
    for value, why in ((nested, "occurs twice"), (cyclic, "occurs twice"), (wide, "unusual kind or size")):
        torch.save({"a": value}, file)
        reseal(path)
        refused(path, str(file), why)
    torch.save({"a": torch.eye(3).to_sparse()}, file)
    reseal(path)
    refused(path, str(file))
    torch.save([1], file)
    reseal(path)
    refused(path, str(file), "not a dict")

    # a compressed member: 200 MB of zeros in 200 KB
    torch.save({"a": 1}, file)
    with zipfile.ZipFile(file) as archive:
        prefix = archive.namelist()[0].split("/")[0]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{prefix}/data.pkl", bytes(200_000_000))
    assert file.stat().st_size < 1_000_000
    reseal(path)
    refused(path, str(file), "compressed")


@pytest.mark.parametrize(
    "data",
    [
        (1 << 60).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"null",
        b"\0" * 7,
        (88).to_bytes(8, "little")
        + b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}'.ljust(88)
        + b"\0" * 8,
        (88).to_bytes(8, "little")
        + b'{"w":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}'.ljust(88)
        + b"\0" * 8,
    ],
    ids=["huge header", "no object", "short", "huge shape", "beyond the file"],
)
def test_absurd_safetensors(tmp_path: Path, data: bytes) -> None:
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(data)
    reseal(path)
    refused(path, str(path / "model.safetensors"), "cannot be read as safetensors")


# --- a save that is stopped, a disk that is full, a folder that cannot be written


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 1.0)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, 2.0)
    assert names(tmp_path) == ["step_1"] and load_checkpoint(tmp_path).training["value"] == 1.0


def test_an_invalid_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "file" / "run", 1)
    message = str(caught.value)
    for part in (str(tmp_path / "file" / "run"), "Not a directory", "needed", "free", "output_dir="):
        assert part in message
    assert "\n" not in message and names(tmp_path) == ["file"]
    # a file of the user's where the checkpoint would lie stays
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_1").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot save a checkpoint"):
        save(tmp_path / "run", 1)
    assert names(tmp_path / "run") == ["step_1"] and (tmp_path / "run" / "step_1").read_text() == "mine"


FULL_DISK = """
import json, os, resource, sys
from pathlib import Path
import torch
from hrm.checkpoint.read import CheckpointError, load_checkpoint
from hrm.checkpoint.save import save_checkpoint

if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
run = Path(sys.argv[1]) / "project" / "run"
save = lambda step, w, t: save_checkpoint(
    run, step, weights={"w": torch.full((w,), float(step))}, training={"t": torch.ones(t)}, run={}
)
save(1, 100_000, 10)
messages = []
# too large: the weights, then the training state
for step, sizes in ((2, (1_000_000, 10)), (3, (10, 1_000_000)), (1, (1_000_000, 10))):
    try:
        save(step, *sizes)
    except CheckpointError as error:
        messages.append(str(error))
left, read = sorted(os.listdir(run)), load_checkpoint(run)
save(4, 50_000, 10)
print(json.dumps({
    "messages": messages, "left": left, "step": read.step, "w": read.weights["w"].unique().tolist(),
    "then": load_checkpoint(run).step, "notes": read.notes,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["small disk", "limit"])
def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, how: str) -> None:
    """On a file system of 2 MB in a namespace of its own; where that is not allowed, by a limit."""
    mount = 'mount -t tmpfs -o size=2m none "$1" && shift && exec "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        how = "limit"
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), how]
    done = subprocess.run(
        command if how == "limit" else prefix + command, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["messages"]) == 3
    for message in result["messages"]:
        assert "\n" not in message
        assert ("File too large" if how == "limit" else "No space left on device") in message
        for part in (str(tmp_path), "3.815 MiB needed", " free)", "free space", "output_dir="):
            assert part in message
    assert (result["left"], result["step"], result["w"], result["notes"]) == (["step_1"], 1, [1.0], [])
    assert result["then"] == 4


# --- resuming


def test_resuming_another_run_names_every_difference(tmp_path: Path) -> None:
    arch = {"hidden_size": 4, "H_layers": 2, "rope_theta": 10000.0, "layout": {"kind": "a"}}
    manifest = read_manifest(save(tmp_path, 6, run={"arch": arch, "data_fingerprint": "f00d"}))
    assert differences(manifest, {"data_fingerprint": "f00d", "arch": dict(arch)}) == []
    other = {**arch, "hidden_size": 8, "layout": {"kind": "b"}, "new": True}
    assert differences(manifest, {"arch": other, "data_fingerprint": "beef"}) == [
        "arch.hidden_size was 4 and is now 8",
        "arch.layout.kind was 'a' and is now 'b'",
        "arch.new was unset and is now true",
        "data_fingerprint was 'f00d' and is now 'beef'",
    ]
