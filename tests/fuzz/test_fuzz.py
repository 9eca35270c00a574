"""The readers under inputs that are nearly valid: they take them, or refuse them in one line."""

import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hrm.common.errors import UserError
from hrm.config.load import load_config
from hrm.solving.read_puzzles import read_puzzles
from tests.fuzz import campaign
from tests.fuzz.judge import MEMORY, Finding, Target, judge, warm
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
# Inputs a second are few where a reader opens many files, or makes a whole configuration.
SLOW = {"words", "config", "dataset", "identifiers", "array", "official_config", "plan"}
FOUND = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    warm(TARGETS[request.param])
    return TARGETS[request.param]


def test_every_target_has_its_share_of_a_campaign():
    assert campaign.SHARES.keys() == TARGETS.keys()


def test_every_seed_is_valid_and_changes(target):
    drawn = [campaign.draw(0, target.name, number) for number in range(40)]
    assert drawn == [campaign.draw(0, target.name, number) for number in range(40)]
    assert len({*drawn, *target.seeds()}) > 20


def test_nearly_valid_inputs(target):
    @settings(
        max_examples=40 if target.name in SLOW else 150,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    # Choices that hypothesis makes one by one could be simplified, but reach half as many inputs.
    @given(st.randoms(use_true_random=True))
    def run(random):
        data = target.draw(random)
        try:
            judge(target, data)
        except Finding as finding:
            pytest.fail(f"{finding}: {data!r}")

    run()


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_former_findings(path):
    warm(target := TARGETS[path.parent.name])
    judge(target, path.read_bytes())


# --- the harness itself


def judged(run, **options) -> str:
    with pytest.raises(Finding) as caught:
        judge(Target("bad", run, lambda: (b"",), **options), b"")
    return str(caught.value)


def raises(error):
    def run(data):
        raise error

    return run


def spin(data):
    while True:
        try:
            while True:
                pass
        # As readers do that expect anything.
        except Exception:
            pass


def test_tracebacks_are_findings(monkeypatch):
    assert judged(raises(KeyError("step"))) == "KeyError: 'step'"
    assert judged(raises(RecursionError())).startswith("RecursionError")
    assert judged(raises(UserError("two\nlines"))) == "not one short line: 'two\\nlines' (9 characters)"
    assert judged(raises(UserError("\x1b[2J"))).startswith("not one short line")
    assert judged(raises(UserError(""))).startswith("not one short line")
    assert judged(raises(UserError("x" * 2001))).endswith("(2001 characters)")
    assert judged(raises(SystemExit(1))) == "exit status 1"
    assert judged(lambda data: print("\x1b[31m")) == "control characters for the terminal"
    # More than this process has ever taken.
    much = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2 * MEMORY
    assert judged(lambda data: b"x" * much).endswith("MiB of memory")
    monkeypatch.setattr("tests.fuzz.judge.SECONDS", 0.1)
    assert judged(spin) == "_TooSlow: more than 0.1 s"


def test_what_does_not():
    def refuse(data):
        raise UserError("file: no, expected yes")

    refusal = judge(Target("good", refuse, lambda: (b"",)), b"")
    assert refusal is not None and refusal.message == "file: no, expected yes"
    assert refusal.where.startswith("test_fuzz.py:")
    assert judge(Target("good", print, lambda: (b"",)), b"a\nb") is None
    assert judge(Target("good", raises(SystemExit(1)), lambda: (b"",), status=(1,)), b"") is None


def test_a_dying_process_is_a_finding_and_the_others_continue(monkeypatch):
    def run(data):
        if data == b"die":
            os._exit(3)
        if data:
            raise UserError("refused")

    target = Target("fragile", run, lambda: (b"",))
    monkeypatch.setitem(TARGETS, "fragile", target)
    monkeypatch.setattr(campaign, "draw", lambda seed, name, number: [b"", b"x", b"die", b"x", b""][number])
    result = campaign.explore("fragile", 0, 0, 5)
    assert [(found["input"], found["why"]) for found in result.findings] == [
        (2, "the process died, exit code 3")
    ]
    assert result.inputs == 5


def test_a_reader_that_lost_a_check_is_found(monkeypatch):
    """JSON that cannot be read is no longer answered."""
    monkeypatch.setattr("hrm.data.arc.files.read_json", lambda path, *_: json.loads(Path(path).read_bytes()))
    findings = campaign.explore("task", 0, 0, 200).findings
    assert any("JSONDecodeError" in found["why"] for found in findings)


# --- sizes that no drawn input has


@pytest.mark.parametrize(("side", "said"), [(1024, "there is no S"), (1025, "1024 at most")])
def test_mazes_beyond_any_model(tmp_path, side, said):
    (tmp_path / "maze.txt").write_text(f"{'#' * side}\n" * side)
    refusal = judge(Target("maze", lambda data: read_puzzles(str(tmp_path / "maze.txt")), lambda: ()), b"")
    assert refusal is not None and said in refusal.message


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (read_puzzles, "more than 16 MiB, expected puzzles, one a line"),
        (load_config, "more than 64 KiB, expected a configuration in YAML"),
    ],
)
def test_a_file_of_50_gigabytes(tmp_path, read, said):
    path = tmp_path / "large.txt"
    path.touch()
    os.truncate(path, 50 << 30)
    refusal = judge(Target("large", lambda data: read(str(path)), lambda: ()), b"")
    assert refusal is not None and refusal.message == f"{path}: {said}"
