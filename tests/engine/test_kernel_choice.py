"""Choices by measurement, without a GPU: candidates and timers are arguments, and time is a counter."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernels
from bench.implementations import metadata
from hrm.config.load import parse_args
from hrm.distributed import World
from hrm.engine import kernel_choice
from hrm.engine.dry_run import Observer, Rehearsal
from hrm.engine.kernel_choice import choose_kernels, from_main, measured_cases, sizes
from kernels import backend, fastest, measured
from kernels.backend import Table
from kernels.cases import Case, Sizes, cases
from kernels.fastest import Candidate, Unfit

GPU = torch.device("cuda")
MAKER = {"device": "a GPU", "torch": "2", "kernels": "abc"}
SIZES = Sizes(2, 4, 16, 2)


@pytest.fixture(autouse=True)
def own_choices(monkeypatch, tmp_path):
    """No table before a test or after it, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before, name = backend.install(Table({}, {})), kernels.get_backend()
    kernels.set_backend("auto")
    yield
    backend.install(before)
    kernels.set_backend(name)


# --------------------------------------------------------------------------------------- the least seconds


def ready(seconds: float) -> Any:
    """A candidate's `prepare` for a timer that reads the seconds off the call."""
    return lambda: seconds


def failing(error: Exception) -> Any:
    def prepare():
        raise error

    return prepare


def test_candidates_that_cannot_be_timed_say_why():
    candidates = [
        Candidate("good", ready(2.0)),
        Candidate("wrong", failing(Unfit("wrong: output 0 is off by 1"))),
        Candidate("broken", failing(RuntimeError("out of\n registers"))),
        Candidate("late", ready(1.0)),
    ]
    left = iter([3, 2, 1, 0])
    found = fastest.timed(candidates, lambda call: call, lambda: next(left))
    assert found == {
        "good": 2.0,
        "wrong": "wrong: output 0 is off by 1",
        "broken": "RuntimeError: out of registers",
        "late": "no time was left",
    }


def test_the_fastest_is_never_slower_than_the_baseline():
    among = ("kernel", "library", "reference")
    assert (
        fastest.fastest({"kernel": 2.0, "library": 3.0, "reference": 1.0}, among, "reference") == "reference"
    )
    assert fastest.fastest({"kernel": 1.0, "library": 0.5, "reference": 1.0}, among, "reference") == "library"
    assert fastest.fastest({"kernel": 1.0, "reference": 1.0}, among, "reference") == "kernel"
    # Without the baseline's time nobody knows what is slower than it.
    assert fastest.fastest({"kernel": 1.0, "reference": "it failed"}, among, "reference") is None


# ---------------------------------------------------------------------------------------- a case as a whole


def variants(width: int) -> list[dict[str, int | bool]]:
    return [{"BLOCK": 64}, {"BLOCK": 1}]


@backend.tunable(variants)
def launch_choice(width: int) -> dict[str, int | bool]:
    return {"BLOCK": 32}


class Fake:
    """An operation that doubles, whose implementations and tiles take times of their own."""

    def __init__(self, times: dict[str, float], off: dict[str, float] | None = None) -> None:
        self.times, self.off, self.taken = times, off or {}, ""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.taken = backend.choose("double", x)
        if self.taken == "triton":
            self.taken = f"{self.taken} {launch_choice(x.shape[-1])['BLOCK']}"
        return 2 * x + self.off.get(self.taken, 0.0)

    def timer(self, call: Any) -> float:
        call()
        return self.times[self.taken]

    def measure(self, table: Table, seconds: float = 1.0) -> fastest.Row:
        case = Case("double", {"x": torch.ones(6, 8)}, self, ("x",), compiles=False)
        with backend.explained(GPU):
            return fastest.measure_case("double", case, case, table, self.timer, lambda: seconds)


TIMES = {"triton 32": 3.0, "triton 64": 2.0, "triton 1": 1.0, "reference": 4.0}
CLASS, TILE = "double float32 8 8 gradient", "test_kernel_choice(8)"


def test_the_fastest_tile_of_the_fastest_implementation_is_taken():
    fake, table = Fake(TIMES), Table({}, {})
    row = fake.measure(table)
    assert table == Table({CLASS: {"eager": "triton"}}, {TILE: {"BLOCK": 1}})
    assert row.seconds == {"triton": 1.0, "reference": 4.0}
    assert row.tiles == {TILE: {"BLOCK=32": 3.0, "BLOCK=64": 2.0, "BLOCK=1": 1.0}}
    backend.install(table)
    with backend.explained(GPU):
        fake(torch.ones(6, 8, requires_grad=True))
        assert fake.taken == "triton 1"
        # Rows count as the power of two that covers them; another class is chosen as without a measurement.
        fake(torch.ones(5, 8, requires_grad=True))
        assert fake.taken == "triton 1"
    assert launch_choice(9) == {"BLOCK": 32}


def test_a_slower_kernel_gives_way_to_the_reference():
    fake, table = Fake({**TIMES, "reference": 0.5}), Table({}, {})
    fake.measure(table)
    assert table.choices == {CLASS: {"eager": "reference"}}
    backend.install(table)
    x = torch.ones(6, 8, requires_grad=True)
    with backend.explained(GPU) as choices:
        fake(x)
    assert fake.taken == "reference" and "fastest" in choices["double"].reason
    # A named backend is taken whatever was measured, and so is a CPU's.
    kernels.set_backend("triton")
    with backend.explained(GPU):
        fake(x)
    assert fake.taken == "triton 1"
    kernels.set_backend("auto")
    backend.install(Table({CLASS: {"eager": "triton"}}, {}))
    fake(x)
    assert fake.taken == "reference"


def test_wrong_candidates_are_never_chosen():
    table = Table({}, {})
    row = Fake(TIMES, {"triton 1": 1e-3}).measure(table)
    assert "wrong: output 0 is off by 0.001" in str(row.tiles[TILE]["BLOCK=1"])
    assert table.tiles == {TILE: {"BLOCK": 64}} and table.choices == {CLASS: {"eager": "triton"}}
    table = Table({}, {})
    row = Fake(TIMES, dict.fromkeys(("triton 1", "triton 32", "triton 64"), float("nan"))).measure(table)
    assert table == Table({CLASS: {"eager": "reference"}}, {}) and "off by nan" in str(row.seconds["triton"])


def test_existing_choices_are_not_measured_again():
    table = Table({CLASS: {"eager": "reference"}}, {TILE: {"BLOCK": 64}})
    row = Fake(TIMES).measure(table)
    assert not row.seconds and not row.tiles
    assert table == Table({CLASS: {"eager": "reference"}}, {TILE: {"BLOCK": 64}})


def test_without_time_nothing_is_chosen():
    table = Table({}, {})
    row = Fake(TIMES).measure(table, seconds=0.0)
    assert table == Table({}, {}) and set(row.seconds.values()) == {"no time was left"}


@pytest.mark.slow
def test_a_real_operation_is_measured_compiled_too():
    """The interpreter runs the kernel; the timer prefers what is compiled."""
    table, calls = Table({}, {}), list[float]()

    def timer(call: Any) -> float:
        call()
        calls.append(1.0 / (1 + len(calls)))
        return calls[-1]

    kept: list[int] = []
    with backend.explained(GPU):
        rows = fastest.measure(
            SIZES,
            torch.float32,
            torch.device("cpu"),
            table=table,
            timer=timer,
            only=["swiglu", "sign_sgd"],
            seconds=1e6,
            keep=lambda rows: kept.append(len(rows)),
        )
    assert kept == [1, 2] and [row.case for row in rows] == ["swiglu", "sign_sgd"]
    assert list(rows[0].seconds) == ["triton", "reference", "reference, compiled"]
    assert all(isinstance(value, float) for row in rows for value in row.seconds.values()), rows
    assert table.choices == {
        "swiglu float32 8 96 gradient": {"compiled": "reference", "eager": "reference"},
        "sign_sgd float32 2 16 forward": {"eager": "reference"},
    }


def test_a_failing_case_does_not_affect_the_others(monkeypatch):
    monkeypatch.setattr(fastest, "measure_case", failing_case)
    rows = fastest.measure(
        SIZES,
        torch.float32,
        torch.device("cpu"),
        table=Table({}, {}),
        timer=float,
        only=["rope", "swiglu"],
        seconds=1,
    )
    assert [row.seconds for row in rows] == [{"all": "OutOfMemoryError: 3 GiB"}] * 2


def failing_case(*_: Any) -> None:
    raise torch.OutOfMemoryError("3 GiB")


def test_compiled_functions_and_plain_calls_have_choices_of_their_own(monkeypatch):
    x = torch.randn(6, 32)
    with backend.asking() as asked, backend.explained(GPU):
        kernels.rms_norm(x, x)
    (key,) = asked.classes
    assert key == "rms_norm float32 8 32 forward"
    backend.install(Table({key: {"compiled": "reference", "eager": "triton"}}, {}))
    with backend.explained(GPU) as choices:
        kernels.rms_norm(x, x)
    assert choices["rms_norm"].implementation == "triton"
    torch._dynamo.reset()
    module = __import__("sys").modules["kernels.rms_norm"]
    monkeypatch.setattr(module, "_rms_norm", None)
    monkeypatch.setattr(backend, "_stand_in", GPU)
    compiled = torch.compile(kernels.rms_norm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x), module.rms_norm_reference(x, x, 1e-5))
    with pytest.raises(TypeError):
        kernels.rms_norm(x, x)


# --------------------------------------------------------------------------------------------- what is kept


TABLE = Table({CLASS: {"compiled": "triton", "eager": "sdpa"}}, {TILE: {"BLOCK": 64, "EVEN_K": True}})


def kept(**changes: Any) -> measured.Kept:
    return measured.Kept(MAKER, TABLE, ["done"], [{"case": "x"}])._replace(**changes)


def test_stored_measurements_are_read_back():
    assert measured.load(MAKER) is None
    assert measured.save(kept()) is None
    assert measured.load(MAKER) == kept()
    path = measured.cache_file(MAKER)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_another_gpu_version_or_source_finds_nothing():
    path = measured.cache_file(MAKER)
    for name in MAKER:
        other = MAKER | {name: "other"}
        assert measured.cache_file(other) != path
        # Also not in a file by the right name.
        assert measured.from_text(measured.to_text(kept()), other) is None


def test_a_damaged_file_is_ignored():
    text = measured.to_text(kept())
    assert measured.from_text(text, MAKER) == kept()
    for cut in range(0, len(text), 7):
        assert measured.from_text(text[:cut], MAKER) is None
    for at in range(len(text)):
        damaged = text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
        found = measured.from_text(damaged, MAKER)
        # Between tokens a line end may turn into something that says the same.
        assert found is None or found == kept()
    for other in ("", "[]", "null", "{}", '{"sha256": 1}', "[" * 100_000, "\0"):
        assert measured.from_text(other, MAKER) is None
    path = measured.cache_file(MAKER)
    path.parent.mkdir(parents=True)
    for content in (b"\xff\xfe", b" " * (measured.LARGEST_FILE + 1), text.encode()[:-1]):
        path.write_bytes(content)
        assert measured.load(MAKER) is None
    path.unlink()
    path.mkdir()
    assert measured.load(MAKER) is None


def test_unknown_implementations_are_refused():
    unknown = Table({CLASS: {"eager": "magic"}}, {})
    assert measured.from_text(measured.to_text(kept(table=unknown)), MAKER) is None


def test_the_cache_folder(monkeypatch, tmp_path):
    assert measured.cache_folder() == tmp_path / "cache" / "hrm-kernels"
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert measured.cache_folder() == tmp_path / ".cache" / "hrm-kernels"


def test_an_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "cache").write_text("a file")
    problem = measured.save(kept())
    assert problem is not None and "cannot be written" in problem and str(tmp_path) in problem


def test_the_key_of_a_measurement():
    maker = measured.made_by(torch.device("cpu"))
    assert maker["torch"] == torch.__version__ and maker["device"] == "cpu" and len(maker["kernels"]) == 16


# ------------------------------------------------------------------------------------------- once for a run


class Measuring:
    """The process that measures: answers with a table, or with nothing where it fails."""

    def __init__(self, text: str) -> None:
        self.text, self.commands, self.lines = text, list[list[str]](), list[str]()

    def __call__(self, words: list[str]) -> str:
        self.commands.append(words)
        return self.text

    def once(self, sizes: Sizes = SIZES) -> Table:
        return measured.once(sizes, torch.bfloat16, GPU, ["swiglu"], run=self, say=self.lines.append)


@pytest.fixture
def maker(monkeypatch) -> dict[str, str]:
    found = dict(MAKER)
    monkeypatch.setattr(measured, "made_by", lambda device: found)
    return found


def answer() -> str:
    rows = [{"case": "swiglu", "choice": {"eager": "triton"}}, {"case": "rope", "choice": {}}]
    asked = measured.request(SIZES, torch.bfloat16, ["swiglu"])
    return measured.to_text(kept(done=[asked], rows=rows))


def test_a_run_measures_once(maker):
    measuring = Measuring(answer())
    assert measuring.once() == TABLE and measuring.once() == TABLE
    assert len(measuring.commands) == 1 and len(measuring.lines) == 1
    assert "1 operations, 1 by Triton; kept in" in measuring.lines[0]
    words = measuring.commands[0]
    assert words[1:5] == ["-m", "kernels", "--measure", "--missing"] and words[-2:] == ["--only", "swiglu"]
    assert "--batch-size=2" in words and "--dtype=bfloat16" in words and "--device=cuda" in words
    # Other sizes are measured for themselves, and so are other versions.
    measuring.once(SIZES._replace(batch_size=3))
    assert len(measuring.commands) == 2
    maker["torch"] = "3"
    measuring.once()
    assert len(measuring.commands) == 3


def test_a_measurement_that_fails_is_not_tried_again(maker):
    measuring = Measuring("a traceback")
    assert measuring.once() == Table({}, {}) and measuring.once() == Table({}, {})
    assert len(measuring.commands) == 1 and "failed after" in measuring.lines[0]


def test_a_killed_measurement_keeps_its_results(maker):
    measured.save(kept(done=[]))
    assert Measuring("").once() == TABLE


def test_a_damaged_file_is_measured_again(maker):
    measuring = Measuring(answer())
    measuring.once()
    measured.cache_file(maker).write_text("{")
    assert measuring.once() == TABLE and len(measuring.commands) == 2


def test_a_cache_that_cannot_be_written_costs_a_measurement_a_run(maker, tmp_path):
    (tmp_path / "cache").write_text("a file")
    measuring = Measuring(answer())
    assert measuring.once() == TABLE and "cannot be written" in measuring.lines[0]


@pytest.mark.slow
def test_the_process_answers_or_is_empty(monkeypatch):
    assert (
        measured._run([measured.sys.executable, "-c", "import kernels; print(kernels.get_backend())"])
        == "auto\n"
    )
    assert measured._run(["/nothing/here"]) == ""
    monkeypatch.setattr(measured, "LIMIT", 0.2)
    assert measured._run([measured.sys.executable, "-c", "import time; time.sleep(60)"]) == ""


# --------------------------------------------------------------------------------------------- a whole run


def run_config(*words: str) -> Any:
    small = ("arch.hidden_size=32", "arch.num_heads=2", "arch.H_layers=1", "arch.L_layers=1")
    return parse_args([*small, "global_batch_size=8", "dtype=bfloat16", "device=cpu", *words])


def engine_on(device: torch.device, world: Any, *words: str, total_steps: int) -> Any:
    """What the choice looks at of an engine."""
    return SimpleNamespace(
        config=run_config(*words),
        metadata=metadata(16, 6),
        total_steps=total_steps,
        device=device,
        world=world,
        model=SimpleNamespace(dtype=torch.bfloat16, length=17, puzzle_emb=None),
        parameters=SimpleNamespace(data=torch.zeros(3)),
    )


class Measured:
    def __init__(self, table: Table = TABLE) -> None:
        self.table, self.calls, self.lines = table, 0, list[str]()

    def __call__(self, *_: Any, say: Any) -> Table:
        self.calls += 1
        return self.table

    def choose(
        self, *words: str, device: torch.device = GPU, world: Any = None, steps: int = 1000, **state: Any
    ) -> str:
        engine = engine_on(device, world or World(), *words, total_steps=steps)
        state = {"recorded": None, "resumes": False, **state}
        return choose_kernels(engine, say=self.lines.append, measure=self, **state)


def test_a_new_run_uses_the_measurement(maker):
    measure = Measured()
    text = measure.choose()
    assert measure.calls == 1 and backend.installed() == TABLE
    assert measured.from_text(text, MAKER) == kept(done=[], rows=[])


def test_a_resumed_run_reuses_the_choice_without_measuring(maker):
    text, other = Measured().choose(), Measured(Table({}, {}))
    assert other.choose(recorded=text, resumes=True) == text
    assert other.calls == 0 and backend.installed() == TABLE and not other.lines
    # Also one that has become deterministic since.
    assert other.choose("deterministic=true", recorded=text, resumes=True) == text
    assert backend.installed() == TABLE


def test_a_run_resumed_without_a_table_uses_none(maker):
    measure = Measured()
    for recorded in (None, "", 3, {"choices": {}}):
        assert measure.choose(recorded=recorded, resumes=True) == ""
    assert measure.calls == 0 and backend.installed() == Table({}, {})


def test_another_gpu_requires_a_new_choice(maker):
    text, other = Measured().choose(), Measured(Table({}, {TILE: {"BLOCK": 1}}))
    maker["device"] = "another GPU"
    anew = other.choose(recorded=text, resumes=True)
    assert other.calls == 1 and backend.installed() == other.table and anew != text
    assert other.lines == [
        "kernels: the checkpoint's choice is for another GPU or other versions, so it is measured again"
    ]


def test_runs_without_measurement(maker):
    measure = Measured()
    assert measure.choose("deterministic=true") == ""
    text = measured.to_text(kept())
    backend.install(TABLE)
    # A CPU hands the choice on, for a GPU that goes on later.
    assert measure.choose(device=torch.device("cpu"), recorded=text, resumes=True) == text
    assert backend.installed() == Table({}, {})
    kernels.set_backend("reference")
    assert measure.choose() == ""
    assert measure.calls == 0


def test_a_short_run_uses_a_stored_measurement(maker):
    measure = Measured(Table({}, {}))
    assert measured.from_text(measure.choose(steps=999), MAKER) == kept(table=Table({}, {}), done=[], rows=[])
    measured.save(kept())
    measure.choose(steps=999)
    assert measure.calls == 0 and backend.installed() == TABLE


class Rank:
    """One of two ranks that are called one after the other, the main one first."""

    size = 2

    def __init__(self, is_main: bool, wire: list[torch.Tensor]) -> None:
        self.is_main, self.wire = is_main, wire

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.is_main:
            self.wire.append(tensor.clone())
            return tensor
        return tensor.copy_(self.wire.pop(0))


def test_every_rank_uses_the_main_ranks_choice(maker, monkeypatch):
    on_cpu = lambda world, text, device: from_main(world, text, torch.device("cpu"))  # noqa: E731
    monkeypatch.setattr(kernel_choice, "from_main", on_cpu)
    wire: list[torch.Tensor] = []
    first, second = Measured(), Measured(Table({}, {}))
    text = first.choose(world=Rank(True, wire))
    backend.install(Table({}, {}))
    assert second.choose(world=Rank(False, wire)) == text
    assert (first.calls, second.calls) == (1, 0) and backend.installed() == TABLE and not wire


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("arch.use_gating=true",),
        ("arch.mlp_t=true", "optimizer=muon"),
        ("optimizer=adamw",),
        ("arch.swiglu=normed",),
        ("arch.swiglu=conv", "loss.loss_type=softmax_cross_entropy"),
    ],
)
def test_measured_cases_match_the_queries_of_a_step(words):
    """By the classes: those of the cases, and those of the engine's own step, both without data."""
    rehearsal = Rehearsal(run_config(*words), metadata(16, 6), GPU, Observer())
    chosen = measured_cases(rehearsal._engine)
    made = cases(sizes(rehearsal._engine), torch.bfloat16, "meta")
    with backend.asking() as step:
        rehearsal.step()
    for name in chosen:
        case = made[name]()
        with backend.asking() as asked, backend.explained(GPU):
            case.call(
                **{key: value.requires_grad_(key in case.gradients) for key, value in case.inputs.items()}
            )
        own = case.measured_as or case.op
        classes = {key for key, op in asked.classes.items() if op == own}
        assert classes, name
        # These run only where the kernels that contain them were found slower.
        if name not in ("rope", "rms_norm forward", "swiglu"):
            assert classes <= step.classes.keys(), name


def test_json_of_a_measurement_is_plain():
    assert json.loads(measured.to_text(kept()))["done"] == ["done"]
