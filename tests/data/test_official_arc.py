"""The official ARC builders, reader and evaluations, of HRM and of TRM: the same data and figures as ours.

HRM_REPO names a checkout of sapientinc/HRM, TRM_REPO one of SamsungSAILMontreal/TinyRecursiveModels; nothing
of them is part of this project. Their command-line package, argdantic, is stood in for.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hrm.data import dataset
from hrm.data.arc.augment import canvas, inverse, task_of
from hrm.data.arc.build import write_arc
from hrm.data.arc.files import read_source
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import read_metadata, read_names
from hrm.evaluation.arc_voting import Votes, read_tests, submission
from tests.support.arc_tasks import held_pairs, key, random_grid, random_task, write_kaggle, write_tasks

HRM, TRM = os.environ.get("HRM_REPO", ""), os.environ.get("TRM_REPO", "")
PACKAGES = ("models", "dataset", "puzzle_dataset", "evaluators")
HRM_PROGRAM, TRM_PROGRAM = ["dataset/build_arc_dataset.py"], ["-m", "dataset.build_arc_dataset"]
# Reads the configuration of its command from one argument, as JSON.
STAND_IN = """
import inspect, json, sys
class ArgParser:
    def command(self, **_):
        return lambda function: setattr(self, "function", function) or function
    def __call__(self):
        (config,) = inspect.signature(self.function).parameters.values()
        self.function(config.annotation(**json.loads(sys.argv[1])))
"""


def needs(repo: str, file: str, what: str) -> Any:
    there = (Path(repo) / file).is_file()
    return pytest.mark.skipif(not there, reason=f"{what}_REPO does not name a checkout of the official code")


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pydantic") is None, reason="the official code needs pydantic; pip install it"
)
needs_hrm = needs(HRM, "dataset/build_arc_dataset.py", "HRM")
needs_trm = needs(TRM, "dataset/build_arc_dataset.py", "TRM")


def official_build(folder: Path, repo: str, program: list[str], **config: Any) -> None:
    (folder / "argdantic.py").write_text(STAND_IN)
    subprocess.run(
        [sys.executable, *program, json.dumps(config)],
        cwd=repo,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
        capture_output=True,
    )


@contextmanager
def importable(repo: str) -> Iterator[Callable[[str], ModuleType]]:
    """Imports modules of a checkout; their names are gone afterwards."""

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in (*PACKAGES, "argdantic")]

    shelved = {name: sys.modules.pop(name) for name in loaded()}
    stub = ModuleType("argdantic")
    exec(STAND_IN, vars(stub))
    sys.modules["argdantic"] = stub
    sys.path.insert(0, repo)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(repo)
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(shelved)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "data"
    write_tasks(folder / "training", {f"t{n}": random_task(n, 2 + n % 3, 1 + n % 2) for n in range(6)})
    held = {f"e{n}": random_task(10 + n, 2 + n % 3, 1 + n % 2) for n in range(5)}
    # Some files of ARC-AGI begin with the tests.
    held["e1"] = dict(reversed(held["e1"].items()))
    write_tasks(folder / "evaluation", held)
    return folder


@pytest.fixture(scope="module")
def ours(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "arc"
    write_arc(folder, list(read_source(str(source))), num_aug=12, seed=0)
    return folder


@pytest.fixture(scope="module")
def theirs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set by HRM's builder."""
    folder = tmp_path_factory.mktemp("hrm")
    program = ["dataset/build_arc_dataset.py"]
    official_build(
        folder, HRM, program, dataset_dirs=[str(source)], output_dir=str(folder / "arc"), num_aug=12
    )
    return folder / "arc"


def pairs_by_name(folder: Path, split: str) -> dict[str, Counter[Any]]:
    puzzles = held_pairs(folder, split)
    return {name: Counter(key(pair) for pair, _ in found) for name, found in puzzles.items()}


@needs_hrm
def test_without_augmentations_both_builders_give_the_same_pairs(source: Path, tmp_path: Path) -> None:
    sources = [source]
    if real := os.environ.get("HRM_PUZZLES"):
        sources += [Path(real) / "arc-agi", Path(real) / "conceptarc"]
    config: dict[str, Any] = {"dataset_dirs": list(map(str, sources)), "num_aug": 0}
    official_build(tmp_path, HRM, HRM_PROGRAM, output_dir=str(tmp_path / "theirs"), **config)
    tasks = [task for source in sources for task in read_source(str(source))]
    write_arc(tmp_path / "ours", tasks, num_aug=0, seed=0)
    for split, puzzles in (("train", len(tasks)), ("test", sum(task.evaluation for task in tasks))):
        expected = pairs_by_name(tmp_path / "theirs", split)
        assert pairs_by_name(tmp_path / "ours", split) == expected and len(expected) == puzzles
        metadata = [read_metadata(tmp_path / who / split / "dataset.json") for who in ("ours", "theirs")]
        assert metadata[0] == metadata[1]


@needs_hrm
@pytest.mark.parametrize("split", ["train", "test"])
def test_augmented_data_sets_have_the_same_form(ours: Path, theirs: Path, split: str) -> None:
    made, expected = (PuzzleDataset(folder, split) for folder in (ours, theirs))
    assert made.metadata == expected.metadata
    for array in ("inputs", "labels"):
        one, other = (getattr(opened.sets["all"], array) for opened in (made, expected))
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    files = {path.name for path in (ours / split).iterdir()} - {"all__difficulty.npy", "checksums.json"}
    assert files == {path.name for path in (theirs / split).iterdir()}
    for name in files:
        if name.endswith("s.npy"):
            assert np.load(ours / split / name).dtype == np.load(theirs / split / name).dtype


@needs_hrm
@pytest.mark.parametrize("split", ["train", "test"])
def test_their_augmented_puzzles_map_back_by_our_names(theirs: Path, split: str) -> None:
    puzzles = held_pairs(theirs, split)
    assert len(puzzles) == 13 * (11 if split == "train" else 5)
    for name, found in puzzles.items():
        original = [key(pair) for pair, _ in puzzles[task_of(name)]]
        assert [key(tuple(map(inverse(name), pair))) for pair, _ in found] == original


@needs_hrm
def test_the_official_reader_reads_ours(ours: Path) -> None:
    with importable(HRM) as load:
        module = load("puzzle_dataset")
        config = {"seed": 0, "dataset_path": str(ours), "epochs_per_iter": 1, "global_batch_size": 16}
        reader = {
            split: module.PuzzleDataset(
                module.PuzzleDatasetConfig(**config, test_set_mode=split == "test", rank=0, num_replicas=1),
                split=split,
            )
            for split in ("train", "test")
        }
        read = list(reader["test"])
        trained = [batch for _, batch, _ in reader["train"]]
    made = list(dataset.test_batches(PuzzleDataset(ours, "test"), global_batch_size=16))
    assert [(name, size) for name, _, size in read] == [(name, size) for name, _, size in made]
    for (_, theirs, _), (_, batch, _) in zip(read, made, strict=True):
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(getattr(batch, name), tensor.numpy())
    assert trained and all(batch["inputs"].shape == (16, 900) for batch in trained)


def predictions(folder: Path, seed: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, float]]:
    """Identifier, input, prediction and q_halt of every test example; some predictions are right."""
    rng = np.random.default_rng(seed)
    wrong = [canvas(np.array(random_grid(rng, 3), np.uint8)) for _ in range(2)]
    for part in PuzzleDataset(folder, "test").sets.values():
        for puzzle, identifier in enumerate(part.puzzle_identifiers.tolist()):
            for example in range(part.puzzle_indices[puzzle], part.puzzle_indices[puzzle + 1]):
                label = np.asarray(part.labels[example])
                # No grid; a cut one; grids that every puzzle may agree on once mapped back.
                choices = [label, label, np.zeros(900, int), np.where(np.arange(900) < 40, label, 0), *wrong]
                chosen = choices[rng.choice(6, p=[0.15, 0.15, 0.25, 0.25, 0.1, 0.1])]
                yield int(identifier), np.asarray(part.inputs[example]), chosen, float(rng.random())


def our_votes(folder: Path, seed: int) -> Votes:
    names = read_names(folder)
    votes = Votes(read_tests(PuzzleDataset(folder, "test"), names))
    for identifier, inputs, prediction, q_halt in predictions(folder, seed):
        votes.add(names[identifier], inputs, prediction, q_halt)
    return votes


@needs_hrm
@pytest.mark.parametrize("by_theirs", [False, True])
def test_hrm_notebook_gives_our_figures(
    ours: Path, theirs: Path, tmp_path: Path, capsys: Any, by_theirs: bool
) -> None:
    folder = theirs if by_theirs else ours
    cells = json.loads((Path(HRM) / "arc_eval.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert text.count("test(visualize=False)") == 1
    with importable(HRM):
        notebook: dict[str, Any] = {}
        exec(text.replace("test(visualize=False)", ""), notebook)
    labels = np.concatenate([part.labels for part in PuzzleDataset(folder, "test").sets.values()])
    for seed in range(3):
        rows = list(predictions(folder, seed))
        q_halt = torch.tensor([row[3] for row in rows], dtype=torch.float64)
        logits = torch.nn.functional.one_hot(torch.tensor(np.array([row[2] for row in rows])).long(), 12)
        saved = {
            "puzzle_identifiers": torch.tensor([row[0] for row in rows], dtype=torch.int32),
            "inputs": torch.tensor(np.array([row[1] for row in rows]), dtype=torch.int32),
            "labels": torch.tensor(labels.astype(np.int32)),
            "logits": logits.float(),
            "q_halt_logits": torch.logit(q_halt),
        }
        torch.save(saved, tmp_path / "step_1_all_preds.0")
        notebook |= {"DATASET_PATH": str(folder), "CHECKPOINT_PATH": str(tmp_path / "step_1")}
        capsys.readouterr()
        notebook["test"](visualize=False, Ks=[1, 2, 3, 10])
        printed = capsys.readouterr().out.splitlines()[1:]
        found = our_votes(folder, seed).pass_at([1, 2, 3, 10], whole_tasks=True)
        assert printed == [f"{k}-shot: {100 * part:.2f}%" for k, part in found.items()]
        assert found[10] > 0 and found[1] < 1


def gather_alone(value: Any, gathered: list[Any], **_: Any) -> None:
    """torch.distributed's function with one rank: what is gathered is its own."""
    gathered[0] = value


@needs_trm
def test_trm_data_and_evaluation_give_our_figures(
    source: Path, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {path.stem: json.loads(path.read_text()) for path in (source / "evaluation").glob("*.json")}
    prefix = write_kaggle(tmp_path, "arc-agi_evaluation", tasks).removesuffix("_evaluation")
    config: dict[str, Any] = {"subsets": ["evaluation"], "test_set_name": "evaluation", "num_aug": 12}
    built = tmp_path / "trm"
    official_build(tmp_path, TRM, TRM_PROGRAM, input_file_prefix=prefix, output_dir=str(built), **config)
    kept = json.loads((ours / "test_puzzles.json").read_text())
    assert json.loads((built / "test_puzzles.json").read_text()) == kept
    with importable(TRM) as load:
        monkeypatch.setattr(
            torch.distributed, "gather_object", lambda value, into, **_: into.__setitem__(0, value)
        )
        for seed in range(3):
            evaluator = load("evaluators.arc").ARC(
                str(built), read_metadata(built / "test" / "dataset.json"), pass_Ks=(1, 2, 3, 10)
            )
            for identifier, inputs, prediction, q_halt in predictions(built, seed):
                rows = {"puzzle_identifiers": np.array([identifier]), "inputs": inputs[None]}
                made = {"preds": torch.tensor(prediction[None].astype(np.int32))}
                evaluator.update_batch(
                    {name: torch.tensor(array.astype(np.int32)) for name, array in rows.items()},
                    made | {"q_halt_logits": torch.logit(torch.tensor([q_halt], dtype=torch.float64))},
                )
            result = evaluator.result(str(tmp_path), 0, 1)
            votes = our_votes(built, seed)
            found = votes.pass_at([1, 2, 3, 10])
            assert result == {f"ARC/pass@{k}": pytest.approx(part, abs=1e-12) for k, part in found.items()}
            attempts = json.loads((tmp_path / "submission.json").read_text())
            mine = submission(votes)
            assert attempts.keys() == mine.keys()
            for task, tests in attempts.items():
                for number, test in enumerate(tests):
                    # An empty grid is no attempt of ours.
                    if all(test.values()):
                        assert mine[task][number] == test
