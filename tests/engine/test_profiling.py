"""Profiles of warm steps, and the ranges within them."""

import gzip
import json
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from hrm.common.errors import UserError
from hrm.common.regions import opened_by, region
from hrm.engine.profiling import Profile
from tests.support.engines import batches, make_config, make_engine

PARTS = {"step", "data", "forward", "backward", "optimiser"}
INNER = {"H cycle 0", "H cycle 1", "Q head", "head and loss", "target pass"}
INNER |= {f"H cycle {i}, L cycle {j}" for i in (0, 1) for j in (0, 1)}
CYCLES = {"H_cycles": 2, "L_cycles": 2}

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def profiled(config, tmp_path, device=CPU, steps=6, said=None):
    """Trains some steps under a profile, and says what it says."""
    engine, source = make_engine(config), batches()
    with Profile(config, tmp_path, device, (said if said is not None else []).append) as profile:
        for _ in range(steps):
            profile.before_step()
            engine.train_step(next(source))
            profile.after_step()


def ranges(tmp_path):
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_torch_writes_a_trace_and_a_table_of_the_steps_asked_for(tmp_path):
    said: list[str] = []
    profiled(make_config(CYCLES, profile="torch", profile_after=2, profile_steps=3), tmp_path, said=said)
    names = ranges(tmp_path)
    assert set(names) >= PARTS | INNER
    assert names.count("step") == names.count("target pass") == 3
    # Once in the step's own pass, once in the target's.
    assert names.count("H cycle 0, L cycle 1") == 6
    assert "aten::addmm" in (tmp_path / "profile" / "table.txt").read_text()
    assert len(said) == 1 and said[0].startswith("profile of steps 3 to 5: ")


def test_a_compiled_step_shows_its_parts(tmp_path, monkeypatch):
    # A traced step loses its inner ranges; what Inductor makes of it, in a minute, adds none.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = make_config(profile="torch", profile_after=2, profile_steps=2, mode="compile")
    profiled(config, tmp_path, steps=4)
    names = set(ranges(tmp_path))
    assert names >= PARTS and not names & INNER


def test_a_run_that_ends_early_keeps_its_results(tmp_path):
    said: list[str] = []
    profiled(make_config(profile="torch", profile_after=1, profile_steps=9), tmp_path, steps=3, said=said)
    assert ranges(tmp_path).count("step") == 2 and said[0].startswith("profile of steps 2 to 3")


def test_without_a_profile_nothing_is_opened(tmp_path):
    assert isinstance(region("step"), nullcontext)
    profiled(make_config(), tmp_path, steps=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["nsys", "ncu"])
def test_nvidias_profilers_see_the_steps_between_their_marks(kind, tmp_path, monkeypatch):
    seen: list[str] = []

    @contextmanager
    def annotate(name):
        seen.append(name)
        yield

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    config = make_config(CYCLES, profile=kind, profile_after=1, profile_steps=2)
    profiled(config, tmp_path, CUDA, steps=5)
    assert seen[0] == "start" and seen[-1] == "stop" and seen.count("step") == 2
    assert set(seen) >= PARTS | INNER
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(UserError, match=r"profile=.* needs the package nvtx: pip install 'hrm-kernels\[prof"):
        Profile(config, tmp_path, CUDA, print)


def test_unsupported_profiles_are_refused(tmp_path):
    with pytest.raises(UserError, match="profile=nsys needs a CUDA device, and this run is on cpu"):
        Profile(make_config(profile="nsys"), tmp_path, CPU, print)


def test_a_note_says_that_replay_hides_parts(tmp_path):
    said: list[str] = []
    Profile(make_config(profile="torch"), tmp_path, CPU, said.append, captured=True)
    assert len(said) == 1 and said[0].startswith("profile: mode=graph replays a step as one launch")
    Profile(make_config(), tmp_path, CPU, said.append, captured=True)
    Profile(make_config(profile="torch"), tmp_path, CPU, said.append)
    assert len(said) == 1


def test_exchanges_between_ranks_are_separate_parts():
    opened: list[str] = []

    @contextmanager
    def note(name):
        opened.append(name)
        yield

    engine = make_engine()
    with opened_by(note):
        engine.program.exchange()
    engine.program.exchange()
    assert opened == ["all-reduce"]
