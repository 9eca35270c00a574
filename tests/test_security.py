"""What somebody else's files can do to who opens them: nothing but be refused in one line."""

import os
import pickle
import resource
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hrm.checkpoint.safe_io import DESCRIPTION_LIMIT, read_safetensors, read_torch, read_training
from hrm.checkpoint.save import save_checkpoint
from hrm.checkpoint.weights import read_weights
from hrm.common.errors import UserError
from hrm.common.files import numbered_lines, open_own, read_json, read_text, write_whole
from hrm.data.arc.files import read_source, read_task
from hrm.data.format import read_names
from hrm.data.maze.files import read_mazes
from hrm.data.sudoku.files import read_puzzles
from hrm.report import differences, report
from hrm.study.history import MOST_METRICS, read_histories, read_history
from hrm.study.runs import Run, _read_plan
from hrm.training.logging import MetricsFile
from hrm.training.run_folder import run_lock
from tests.support.browser import chromium
from tests.support.paths import ROOT

HOSTILE = "<img src=http%3A x onerror=alert(1)><script>document.title='run'<!--\x1b[31m"


# --- nothing is unpickled


class Bomb:
    """Pickled, a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile_checkpoints(folder: Path, trace: Path) -> dict[str, Path]:
    """Files that touch `trace` when they are trusted, or take memory without end."""
    touch = Bomb(os.system, f"touch {trace}")
    paths = {name: folder / f"{name}.pt" for name in ("torch", "legacy", "pickle", "tar", "zip", "npz")}
    torch.save({"a": touch}, paths["torch"])
    torch.save({"a": touch}, paths["legacy"], _use_new_zipfile_serialization=False)
    paths["pickle"].write_bytes(pickle.dumps(touch))
    with tarfile.open(paths["tar"], "w") as archive:
        archive.add(paths["pickle"], "pickle")
    with zipfile.ZipFile(paths["zip"], "w") as archive_:
        archive_.writestr("x/data.pkl", pickle.dumps({"a": touch}, protocol=4))
    np.savez(paths["npz"], a=np.array([touch], dtype=object))
    for name, what in {
        "bytearray": Bomb(bytearray, 1 << 40),
        "storage": Bomb(torch.UntypedStorage, 1 << 40),
        "set": {1},
    }.items():
        paths[name] = folder / f"{name}.pt"
        torch.save({"a": what}, paths[name])
    return paths


def test_a_malicious_checkpoint_runs_no_code(tmp_path):
    for name, path in hostile_checkpoints(tmp_path, tmp_path / "ran").items():
        for read in (read_torch, read_training, read_weights, read_safetensors):
            with pytest.raises(UserError) as caught:
                read(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value), (name, read)
        assert not (tmp_path / "ran").exists(), name
    for name in ("torch", "bytearray", "storage", "set"):
        with pytest.raises(UserError, match=r"it refers to .*, which was not run"):
            read_torch(tmp_path / f"{name}.pt")


def test_a_name_in_a_pickle_is_spelt_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02ctorch.\x1b[2J\nname\n.")
    with pytest.raises(UserError, match=r"it refers to torch\.\\x1b\[2J\.name, which was not run"):
        read_torch(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ([("x/data.pkl", b"N."), ("x/data.pkl", b"N.")], "not as torch.save writes one"),
        ([("x/data.pkl", b"N."), ("y/data.pkl", b"N.")], "not as torch.save writes one"),
        ([("x/data.pkl", b"N."), ("y/other", b"N.")], "not as torch.save writes one"),
        ([("x/other", b"N.")], "not as torch.save writes one"),
        ([("x/data.pkl", b"N" * DESCRIPTION_LIMIT + b".")], "its pickle is too long"),
        ([(f"x/{'n' * 1000}{i}", b"") for i in range(4400)], "too long a table of contents"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_other_archives_than_a_checkpoints_are_refused(tmp_path, members, what):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    with pytest.raises(UserError, match=what):
        read_torch(tmp_path / "x.pt")


def test_plain_checkpoints_are_still_read(tmp_path):
    state = {"a": [1, (2.5, "x", None, True)], "b": torch.arange(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "x.pt")
    read = read_training(tmp_path / "x.pt")
    assert read["a"] == state["a"] and read["b"].tolist() == [0, 1, 2] and read["c"].tolist() == [1.0, 1.0]
    module = torch.nn.Linear(2, 2)
    torch.save(module.state_dict(), tmp_path / "step_1")
    torch.save({"w": module.weight}, tmp_path / "step_2")
    assert read_weights(tmp_path / "step_1")[1]["bias"].tolist() == module.bias.tolist()
    assert read_weights(tmp_path / "step_2")[1]["w"].tolist() == module.weight.tolist()


# --- absurd sizes


READERS: dict[str, str] = {
    "a.json": "from hrm.data.arc.files import read_task as read",
    "identifiers.json": "from hrm.data.format import read_names; read = lambda path: read_names(path.parent)",
    "a.csv": "from hrm.data.sudoku.files import read_puzzles; read = lambda path: read_puzzles(path, 9)",
    "a.txt": "from hrm.data.sudoku.files import read_puzzles; read = lambda path: read_puzzles(path, 9)",
    "maze.csv": "from hrm.data.maze.files import read_mazes; read = lambda path: list(read_mazes(path))",
    "metrics.jsonl": "from hrm.study.history import read_history; "
    "read = lambda path: read_history(path.parent)",
    "plan.json": "from hrm.study.runs import _read_plan as read",
    "step_1": "from hrm.checkpoint.weights import read_weights as read",
    "a.safetensors": "from hrm.checkpoint.weights import read_weights as read",
    "config.yaml": "from hrm.study.history import _config as read",
}
_SCRIPT = """
import sys, time, resource
from pathlib import Path
from hrm.common.errors import UserError
for line in sys.stdin:
    name, imports = line.rstrip().split("\\t")
    exec(imports)
    path = Path(sys.argv[1]) / name
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read(path)
    except UserError as error:
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"{name}\\t{taken}\\t{time.process_time() - start:.2f}\\t{error}", flush=True)
"""


@pytest.mark.slow
def test_files_of_fifty_gigabytes_are_refused_unread(tmp_path):
    for name in READERS:
        with open(tmp_path / name, "wb") as file:
            file.write(b"question\n" if name.endswith(".csv") else b"")
        os.truncate(tmp_path / name, 50 << 30)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)],
        input="\n".join(f"{name}\t{imports}" for name, imports in READERS.items()),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30)),
        capture_output=True,
        text=True,
    )
    told = {line.split("\t")[0]: line.split("\t")[1:] for line in done.stdout.splitlines()}
    assert told.keys() == READERS.keys(), done.stderr
    for name, (kilobytes, seconds, message) in told.items():
        assert int(kilobytes) < 16 << 10 and float(seconds) < 20, (name, kilobytes, seconds)
        assert str(tmp_path) in message
    assert "more than 16 MiB, expected a file of ARC tasks" in told["a.json"][2]
    assert "line 2: longer than 4096 characters" in told["a.csv"][2]
    assert "line 1 is too long" in told["metrics.jsonl"][2]
    assert "more than 128 KiB" in told["config.yaml"][2]


def test_a_header_without_end_is_not_read(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{" * 100)
    with pytest.raises(UserError, match="its header is too long"):
        read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[" * 100_000, "not readable as JSON"),
        ("[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        ('{"a": ' * 40 + "1" + "}" * 40, "nested deeper than 32 levels"),
        ("9" * 5000, "not readable as JSON"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"\x1b": 1}', "not readable as JSON"),
        ("[1] 2", "not readable as JSON"),
        (" " * 101, "more than 100 bytes, expected numbers"),
    ],
)
def test_json_that_is_refused(tmp_path, text, what):
    (tmp_path / "a.json").write_text(text)
    limit = 100 if "100 bytes" in what else 1 << 20
    with pytest.raises(UserError, match=what) as caught:
        read_json(tmp_path / "a.json", limit, "numbers")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ") and "\n" not in str(caught.value)


def test_json_up_to_the_limits_is_read(tmp_path):
    (tmp_path / "a.json").write_text("[" * 32 + "]" * 32)
    assert read_json(tmp_path / "a.json", 64, "lists")[0][0]
    (tmp_path / "a.json").write_text('{"b": [1, 2.5, null, true]}')
    assert read_json(tmp_path / "a.json", 100, "lists") == {"b": [1, 2.5, None, True]}


def test_pipes_and_devices_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        for read in (lambda p: read_json(p, 9, "x"), lambda p: read_text(p, 9, "x"), read_task):
            with pytest.raises(UserError, match="a folder, pipe or device; expected a file"):
                read(path)
        with pytest.raises(UserError, match="a folder, pipe or device"):
            next(numbered_lines(path, 9, "x"))
        with pytest.raises(UserError):
            read_puzzles(path, 9)
        with pytest.raises(UserError):
            list(read_mazes(path))


def test_invalid_texts(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not text in UTF-8, expected words"):
        read_text(tmp_path / "a", 9, "words")
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfab\n" + b"c" * 9)
    assert list(numbered_lines(tmp_path / "a", 9, "x")) == [(1, "ab\n"), (2, "c" * 9)]
    with pytest.raises(UserError, match="line 2: longer than 8 characters, expected x"):
        list(numbered_lines(tmp_path / "a", 8, "x"))


def write_metrics(folder: Path, *lines: str, config: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def test_endless_metrics_and_invalid_names(tmp_path):
    many = (f'"m{number}": 1' for number in range(MOST_METRICS + 1))
    with pytest.raises(UserError, match="line 1 is past 1,024 metrics"):
        read_history(write_metrics(tmp_path / "a", f'{{"step": 1, {", ".join(many)}}}'))
    for name in ("\\ud800", "\\u001b[31m", "x" * 201):
        with pytest.raises(UserError, match=r"line 1 has no metric's name in '") as caught:
            read_history(write_metrics(tmp_path / "b", f'{{"step": 1, "{name}": 1}}'))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1 or ''}, *a]\n" for i in range(1, 3)),
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: &x {b: 1}\nc: {<<: *x}",
        "a: !!python/object/apply:os.system [touch ran]",
        "a: [{2020-01-01: 1}]",
        "? [1, 2]\n: 3",
        "1: 2",
        "a: !!int ''",
        "a: !!float ''",
        "a: !!timestamp x",
        "a: 2020-01-01",
        "a: 0x" + "f" * 20,
        "a: " + "9" * 5000,
        'a: "\\UFFFFFFFF"',
        "[" * 10_000,
        "a: b: c",
    ],
)
def test_a_configuration_holds_plain_values(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"config\.yaml: not a run's configuration"):
        read_history(write_metrics(tmp_path / "run", '{"step": 1}', config=text))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"seeds": 16, "candidates": {}}',
        '{"seeds": ["0"], "candidates": {}}',
        "[" * 5000,
        '{"seeds": [0], "candidates": {"v1": 3}}',
        '{"seeds": [0], "candidates": []}',
        '{"seeds": NaN}',
    ],
)
def test_an_invalid_plan(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json: (not readable|is damaged)|plan\.json is damaged"):
        _read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shared_device": 1}', "[" * 5000])
def test_an_invalid_record_of_a_finished_run(tmp_path, text):
    (tmp_path / "finished.json").write_text(text)
    with pytest.raises(UserError, match=r"finished\.json: .*expected the record of a finished run"):
        Run("v1", 0, tmp_path).made_by()


def test_more_sequences_than_memory_holds_are_refused_beforehand(monkeypatch):
    from hrm.config.load import parse_args
    from hrm.data.format import Metadata
    from hrm.engine import memory_estimate as memory

    config, cpu = parse_args(["preset=quick", "device=cpu"]), torch.device("cpu")
    metadata = Metadata(0, 0, 0, 6, 16, 1, 3, 1.0, ["all"])
    one, many = (memory._inference_peak(config, metadata, rows, cpu) for rows in (1, 101))
    monkeypatch.setattr(memory, "available_bytes", lambda device: one + 2 * (many - one))
    memory.check_inference(config, metadata, 190, cpu)
    with pytest.raises(
        UserError, match=r"^batch_size=220 needs about .* and cpu has .*: batch_size=\d+ would"
    ):
        memory.check_inference(config, metadata, 220, cpu)
    monkeypatch.setattr(memory, "available_bytes", lambda device: one // 2)
    with pytest.raises(UserError, match="not even one sequence fits"):
        memory.check_inference(config, metadata, 1, cpu)


def test_a_model_larger_than_its_weights_is_not_built(tmp_path):
    from hrm.checkpoint.load_model import Found, load_trained
    from hrm.config.load import load_config, to_yaml

    (tmp_path / "config.yaml").write_text(
        "arch: {hidden_size: 65536, num_heads: 1024, H_layers: 1024}\npreset: quick\ndevice: cpu\n"
    )
    config = load_config(tmp_path / "config.yaml")
    assert "hidden_size: 65536" in to_yaml(config)
    torch.save({"embed_tokens.embedding_weight": torch.zeros(6, 4)}, tmp_path / "step_1")
    weights = read_weights(tmp_path / "step_1")[1]
    with pytest.raises(UserError, match="is a checkpoint of another architecture"):
        load_trained(Found(tmp_path / "step_1", weights, config, None, []), device="cpu")


# --- names that lead elsewhere


def test_nothing_is_written_through_a_link(tmp_path):
    target = tmp_path / "foreign"
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    for path in (run / "metrics.jsonl", run.with_name(".run.lock"), run / "run.log", run / "config.yaml"):
        target.write_text("mine\n")
        path.symlink_to(target)
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a link, and writes do not follow links"):
        MetricsFile(run)
    with pytest.raises(UserError, match=r"\.run\.lock: is a link"), run_lock(run):
        raise AssertionError
    with pytest.raises(UserError, match=r"run\.log: is a link"):
        open_own(run / "run.log", "ab")
    write_whole(run / "config.yaml", "seed: 0\n")
    assert target.read_text() == "mine\n"
    assert (run / "config.yaml").read_text() == "seed: 0\n" and not (run / "config.yaml").is_symlink()


def test_a_planted_link_is_not_followed_when_truncating(tmp_path):
    target = tmp_path / "foreign"
    target.write_text("mine\n")
    run = write_metrics(tmp_path / "run", '{"step": 1, "a": 1}', '{"step": 9, "a": 1}', "x" * (3 << 20))
    (run / "metrics.jsonl.tmp").symlink_to(target)
    log = MetricsFile(run, 5)
    log.log({"a": 2}, 6)
    log.close()
    assert target.read_text() == "mine\n"
    assert (run / "metrics.jsonl").read_text() == '{"step": 1, "a": 1}\n{"step": 6, "a": 2}\n'


def test_links_planted_in_a_runs_folder_lead_nowhere(tmp_path):
    foreign, run = tmp_path / "foreign", tmp_path / "run"
    foreign.mkdir()
    (foreign / "model.safetensors").write_text("mine\n")
    run.mkdir()
    for name in (".tmp_step_1_a", "step_3.old", "step_7", "step_7.old"):
        (run / name).symlink_to(foreign)
    for step in (7, 8):
        save_checkpoint(run, step, weights={"w": torch.ones(2)}, training={}, run={}, keep=1)
    assert [path.name for path in foreign.iterdir()] == ["model.safetensors"]
    assert (foreign / "model.safetensors").read_text() == "mine\n"
    assert not (run / "step_8").is_symlink() and (run / "step_8" / "manifest.json").is_file()


def test_tasks_of_other_names_are_refused(tmp_path):
    pairs = '[{"input": [[1]], "output": [[2]]}]'
    for name in ("\\u001b[31m", "a\\u2028b", "a\\nb", "\\ud800"):
        (tmp_path / "a.json").write_text(f'{{"train": {pairs}, "test": {pairs}, "name": "{name}"}}')
        with pytest.raises(UserError, match=r"the name is .*, expected 1 to 200 plain characters") as caught:
            list(read_source(str(tmp_path)))
        assert str(caught.value).isprintable()


def test_names_of_puzzles_are_a_list_of_texts(tmp_path):
    (tmp_path / "identifiers.json").write_text('["a", ["b"]]')
    with pytest.raises(UserError, match="no list of names"):
        read_names(tmp_path)


# --- what pages and terminals show


def hostile_run(folder: Path) -> Path:
    name = os.fsdecode(os.fsencode(HOSTILE.replace("/", "")) + b"\xff")
    lines = ['{"step": 1, "train/loss": 1, "train/gates/<b>/\'\\"<i>/mean": 0.5}']
    lines += ['{"step": 2, "train/loss": 0.5, "train/gates/<b>/\'\\"<i>/mean": 0.5}']
    return write_metrics(folder / name, *lines, config='a: "</table><script>\\e]0;x\\a</script>"\n')


def test_a_report_escapes_names(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hrm.report.symptoms", lambda run: [])
    other = write_metrics(tmp_path / "other", '{"step": 1, "train/loss": 1}', config="a: 1\n")
    run = hostile_run(tmp_path)
    report([str(run), str(other)], tmp_path / "out")
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable() and "\\x1b[31m" in shown and "\\udcff" in shown
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text.lower() and "<img" not in text and "<b>" not in text
    assert "Content-Security-Policy" in text and "default-src 'none'" in text and "\x1b" not in text
    table = differences(read_histories([run, other]))
    assert table is not None and table.rows == [["a", "</table><script>\\x1b]0;x\\x07</script>", "1"]]
    with chromium() as browser:
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "out" / "report.html").as_uri())
        assert asked == [(tmp_path / "out" / "report.html").as_uri()]
        assert "<img src=http%3A x onerror=alert(1)>" in (page.text_content("h1") or "")
        assert page.evaluate("document.querySelectorAll('script, img, b, i').length") == 0
        # Not even a script that got in would run, or reach out.
        refused = page.evaluate("""() => new Promise((resolve) => {
            const found = [];
            document.addEventListener("securitypolicyviolation", (event) => {
                found.push(event.effectiveDirective);
                if (found.length === 2) resolve(found.sort());
            });
            const script = document.createElement("script");
            script.text = "window.ran = 1";
            document.body.append(script);
            new Image().src = "http://localhost:9/x";
        })""")
        assert refused == ["img-src", "script-src-elem"] and page.evaluate("window.ran") is None
