"""Reads, writes and checks mazes. Tokens: 0 is padding, 1 to 5 are the characters of "# SGo"."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from hrm.data.boards import Boards, Rules
from hrm.data.maze.search import GOAL, OPEN, PATH, START, WALL, distances


class MazeRules(Rules):
    """Checks that cells are unchanged and that the marked cells are exactly a shortest path from S to G."""

    symbols = "_#.SGo"
    # The letters of maze-dataset: E is the end, X the path.
    also: ClassVar = {" ": ".", "E": "G", "X": "o"}
    blank = OPEN

    def expected(self, boards: Boards) -> str:
        return "'#', 'S', 'G' (or E), 'o' (or X), or '.' or a space for an open cell"

    def problems(self, boards: Boards, question: np.ndarray, answer: np.ndarray) -> Iterator[str]:
        wrong = list(self.impossible(boards, question))
        yield from wrong
        changed = np.nonzero((answer != question) & ((question != OPEN) | (answer != PATH)))[0]
        if len(changed):
            cell = int(changed[0])
            names = [self.symbol(int(board[cell])) for board in (question, answer)]
            count = "a cell was" if len(changed) == 1 else f"{len(changed)} cells were"
            yield f"{count} changed, the first at {boards.at(cell)}: {names[0]!r} became {names[1]!r}"
        if wrong:
            return
        start, goal = int((question == START).argmax()), int((question == GOAL).argmax())
        # The path may only use cells that are open in the question.
        marked = (answer == PATH) & (question == OPEN)
        way = marked.copy()
        way[[start, goal]] = True
        steps = distances(way, boards.cols, start)
        shortest = int(distances(question != WALL, boards.cols, start)[goal])
        if steps[goal] < 0:
            end = int(steps.argmax())
            yield f"the path from S ends at {boards.at(end)} and does not reach G"
            return
        if steps[goal] > shortest:
            yield f"the path takes {steps[goal]} steps, the shortest {shortest}"
        if beside := int(marked.sum()) - int(steps[goal]) + 1:
            cells = "cell is" if beside == 1 else "cells are"
            yield f"{beside} marked {cells} not on the way from S to G"

    def impossible(self, boards: Boards, question: np.ndarray) -> Iterator[str]:
        foreign = np.nonzero((question < WALL) | (question > GOAL))[0].tolist()
        for cell in foreign[:1]:
            shown = "'o', a path" if question[cell] == PATH else "no cell of a maze"
            more = f", and so are {len(foreign) - 1} more" if len(foreign) > 1 else ""
            yield f"{boards.at(cell)} is {shown}{more}; expected '#', '.', 'S' or 'G'"
        counts = {name: np.nonzero(question == token)[0] for name, token in (("S", START), ("G", GOAL))}
        for name, cells in counts.items():
            if len(cells) == 0:
                yield f"there is no {name}, expected one"
            elif len(cells) > 1:
                first, second = (boards.at(int(cell)) for cell in cells[:2])
                yield f"there are {len(cells)} {name}, expected one: {first}; {second}"
        if not foreign and all(len(cells) == 1 for cells in counts.values()):
            steps = distances(question != WALL, boards.cols, int(counts["S"][0]))
            if steps[counts["G"][0]] < 0:
                yield "no path leads from S to G"
