"""Compares candidates: checks them, trains them as a campaign of runs, and writes a report."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hrm.common.errors import UserError
from hrm.common.figures import require_matplotlib
from hrm.common.files import to_json, write_whole
from hrm.common.tables import Table
from hrm.common.text import one_line
from hrm.config.load import KEYS
from hrm.config.messages import typed
from hrm.config.presets import ARCHITECTURE_ALIASES, ARCHITECTURES, folder_name
from hrm.config.read import mapping_items, read_yaml
from hrm.study.html import write_report
from hrm.study.results import cautions, compare_runs, tables
from hrm.study.runs import OWN, Campaign, Run, planned_steps, settings, slots, surroundings

RESULTS = "results.json"
# Keys that all candidates must share: device, data, data order and steps.
SHARED = ("device", "data_path", "global_batch_size", "epochs", "eval_interval", "max_steps")


def seeds(text: str) -> list[int]:
    """Parses seeds: `3` means 0, 1, 2, and `4,7` means 4 and 7. Raises UserError."""
    try:
        found = [int(part) for part in text.split(",")] if "," in text else list(range(min(int(text), 1001)))
    except ValueError:
        found = []
    if not 0 < len(set(found)) == len(found) <= 1000 or not 0 <= min(found) <= max(found) < 2**32:
        raise UserError(f"--seeds {one_line(text)}: give their number, as in 3, or a list, as in 0,1,2")
    return found


def refuse_own(words: Sequence[str]) -> None:
    """Raises UserError for keys that a campaign sets itself."""
    for word in words:
        key = word.partition("=")[0].lstrip("+")
        if key in OWN:
            raise UserError(f"{key} is set for each run: {OWN[key]}")


def named(candidates: Sequence[str]) -> dict[str, list[str]]:
    """The trainer's arguments for each candidate, by a unique name from its architecture, file or run."""
    found: dict[str, list[str]] = {}
    for candidate in candidates:
        words = candidate_words(candidate)
        if words in found.values():
            raise UserError(f"{one_line(candidate)} is given twice: leave one out")
        path = Path(words[0].partition("=")[2])
        name = ARCHITECTURE_ALIASES.get(candidate, candidate)
        if path.suffix:
            # A run's saved configuration is always config.yaml, so use the folder's name.
            name = path.resolve().parent.name if path.stem == "config" else path.stem
        name = base = folder_name(name)
        number = 1
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found[name] = words
    return found


def candidate_words(candidate: str) -> list[str]:
    """The trainer's argument for a candidate: an architecture or its file, a run or its configuration.

    A file is a saved configuration if it has a key of the trainer, otherwise an architecture. Raises
    ConfigError for any other file.
    """
    if candidate in ARCHITECTURES or candidate in ARCHITECTURE_ALIASES:
        return [f"--arch={ARCHITECTURE_ALIASES.get(candidate, candidate)}"]
    if os.path.isdir(candidate):
        candidate = os.path.join(candidate, "config.yaml")
    if not candidate.endswith((".yaml", ".yml")):
        return [f"--arch={candidate}"]
    trainers = {key.partition(".")[0] for key in KEYS}
    fields = {field for field, _, _ in mapping_items(read_yaml(candidate), candidate)}
    return [f"--config={candidate}" if fields & trainers else f"--arch={candidate}"]


def conduct(campaign: Campaign, args: argparse.Namespace, title: str, swept: Sequence[str] = ()) -> list[Run]:
    """Checks and runs a campaign, and prints and saves its results; returns the failed runs.

    swept: keys that may differ although candidates usually share them.
    """
    names = [candidate.name for candidate in campaign.candidates]
    baseline = args.baseline or names[0]
    if baseline not in names:
        raise UserError(f"--baseline {one_line(baseline)} is not a candidate: give one of {', '.join(names)}")
    if args.jobs is not None and not 1 <= args.jobs <= 1000:
        raise UserError(f"--jobs {args.jobs}: give a number from 1 to 1000")
    check_comparable(campaign, swept)
    require_matplotlib()
    failed: list[Run] = []
    with campaign.opened():
        if not args.report_only:
            places = slots(campaign.candidates[0].config.device, args.jobs)
            describe(campaign, len(places))
            failed = campaign.carry_out(places)
        if any(run.finished for run in campaign.runs) or args.report_only:
            conclude(campaign, baseline, title, args.command)
    return failed


def check_comparable(campaign: Campaign, swept: Sequence[str] = ()) -> None:
    """Raises UserError for candidates that are equal, or differ in device, data, data order or steps."""
    first, *others = campaign.candidates
    seen = {first.name: settings(first.config)}
    for other in others:
        values = settings(other.config)
        for name, earlier in seen.items():
            if values == earlier:
                raise UserError(f"{name} and {other.name} are the same configuration: leave one out")
        for key in KEYS:
            shared = key in SHARED or (key.startswith("sudoku.") and values["data_path"] is None)
            if shared and key not in swept and values[key] != seen[first.name][key]:
                raise UserError(
                    f"{key} is {typed(seen[first.name][key])} for {first.name} and "
                    f"{typed(values[key])} for {other.name}: candidates share data, steps and device, "
                    f"so give {key}=VALUE for all"
                )
        seen[other.name] = values


def describe(campaign: Campaign, at_once: int) -> None:
    """Prints the plan."""
    steps = {planned_steps(candidate.config) for candidate in campaign.candidates}
    length = " or ".join(f"{count:,}" for count in sorted(steps))
    print(
        f"{len(campaign.candidates)} candidates x {len(campaign.seeds)} seeds = {len(campaign.runs)} runs of "
        f"{length} steps, {at_once} at once, in {campaign.folder}"
    )
    first, *others = (candidate.words for candidate in campaign.candidates)
    common = [word for word in first if all(word in words for words in others)]
    for candidate in campaign.candidates:
        own = " ".join(word for word in candidate.words if word not in common)
        print(f"  {candidate.name}: {own}")
    if common:
        print(f"  all: {' '.join(common)}")
    done = sum(run.finished for run in campaign.runs)
    print(
        f"{done} of the {len(campaign.runs)} runs are finished" if done else "no run is finished yet",
        flush=True,
    )


def conclude(campaign: Campaign, baseline: str, title: str, command: str) -> None:
    """Prints the results and saves them as results.json, report.html and report.png in the folder."""

    histories = campaign.histories()
    if not any(histories.values()):
        raise UserError(f"{campaign.folder}: no run is finished; leave --report-only out to train them")
    results = compare_runs(histories, baseline)
    missing = [run.title for run in campaign.runs if not run.finished]
    made_by = {run.folder.name: run.made_by() for run in campaign.runs if run.finished}
    notes = [*remarks(list(made_by.values()), missing, campaign.pace_note), *cautions(results)]
    found = [*tables(results), differing(campaign)]
    kept = {
        "title": title,
        "command": command,
        "made_by": surroundings(),
        "runs_made_by": made_by,
        "seeds": campaign.seeds,
        "words": {candidate.name: list(candidate.words) for candidate in campaign.candidates},
        "missing": missing,
        "notes": notes,
        **results,
    }
    write_whole(campaign.folder / RESULTS, to_json(kept) + "\n")
    for table in found:
        print(f"\n{table.text()}")
    print("".join(f"\n{note}" for note in notes))
    groups: Mapping[str, Any] = {name: list(runs.values()) for name, runs in histories.items() if runs}
    page, image = write_report(campaign.folder, title, groups, found, notes)
    print(f"\n{campaign.folder / RESULTS}\n{page}\n{image}", flush=True)


def differing(campaign: Campaign) -> Table:
    """A table of the keys in which candidates differ."""
    values = {candidate.name: settings(candidate.config) for candidate in campaign.candidates}
    keys = [key for key in KEYS if key not in OWN and len({str(v[key]) for v in values.values()}) > 1]
    rows = [[key, *(typed(of[key]) for of in values.values())] for key in keys]
    return Table("What differs", ["", *values], rows)


def remarks(made_by: Sequence[Mapping[str, Any]], missing: Sequence[str], pace_note: str) -> list[str]:
    """Notes for the reader on how the runs were made. pace_note: see `Campaign`."""
    found = []
    if missing:
        found.append(f"Not finished: {', '.join(missing)}.")
    if pace_note:
        found.append(pace_note)
    elif any(by["shared_device"] for by in made_by):
        found.append("Runs shared a device, so steps took longer and times are not reliable.")
    for what, aspects in {
        "machines": ("processor", "cores", "gpus"),
        "versions": ("commit", "versions", "python"),
    }.items():
        if len({str([by.get(aspect) for aspect in aspects]) for by in made_by}) > 1:
            found.append(f"The runs were made on several {what}, see {RESULTS}: times may not be comparable.")
    return found
