"""The sections of an analysis, in the order of its page."""

from hrm.analysis import dynamics, judge, parts, robustness
from hrm.analysis.finding import Section

SECTIONS = (
    Section(
        "depth",
        "Depth",
        "Does accuracy rise, hold or collapse when the model thinks for longer than in training?",
        dynamics.depth,
    ),
    Section(
        "drift",
        "Drift and settling",
        "Do states come to rest, and do those of wrong answers move more?",
        dynamics.settling,
    ),
    Section(
        "cells",
        "Where and when answers become right",
        "Which ACT step, and which cell, makes an answer right, and are right answers lost again?",
        dynamics.cells,
    ),
    Section(
        "selection",
        "Failures of selection",
        "Is a failure a lack of ability, or an accident of one start or one view of the puzzle?",
        robustness.selection,
        robustness.no_paths,
    ),
    Section(
        "easy",
        "Easy puzzles and single blanks",
        "Does the model solve puzzles that are nearly full?",
        robustness.easy,
        robustness.no_blanks,
    ),
    Section(
        "identifiers",
        "Puzzle identifiers",
        "How much of an answer depends on the puzzle's learnt embedding?",
        robustness.identifiers,
        robustness.no_identifiers,
    ),
    Section(
        "contributions",
        "Contributions of cycles and levels",
        "What does the trained model lose without a cycle, a level or its later ACT steps?",
        parts.contributions,
        parts.no_parts,
    ),
    Section(
        "gates",
        "Gates",
        "Which sources do the gates of each module let through?",
        parts.gates,
        parts.no_gates,
    ),
    Section(
        "goals",
        "Subgoals",
        "Does the model commit to the subgoals of its high level, and do they help?",
        parts.goals,
        parts.no_subgoals,
    ),
    Section(
        "q_halt",
        "q_halt as a judge",
        "Does the model know when its answer is right, and what does halting by it save and cost?",
        judge.q_halt,
    ),
    Section(
        "votes",
        "Votes",
        "Do votes over more augmentations of a task solve more?",
        judge.votes,
        judge.no_votes,
    ),
    Section(
        "trajectories",
        "Trajectories",
        "Which path do states take, for right and for wrong answers?",
        dynamics.trajectories,
    ),
)
