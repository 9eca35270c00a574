"""Mazes on rectangular grids: shortest paths, symmetries, generation.

A maze is a uint8 array of tokens, row by row: WALL, OPEN, START, GOAL, PATH; 0 is padding. Steps go to one of
the four neighbours of a cell.
"""

import numpy as np

from hrm.data.workers import compiled

WALL, OPEN, START, GOAL, PATH = 1, 2, 3, 4, 5
# Symmetries of the square; see `symmetric`.
SYMMETRIES = 8
# The symmetries that preserve a rectangle.
OF_RECTANGLES = (0, 2, 4, 5)


def distances(passable: np.ndarray, columns: int, start: int) -> np.ndarray:
    """Steps from `start` to every cell, (S,) int32, -1 for unreachable ones, by breadth-first search.

    passable: (S,) bool, rows of `columns` cells.
    """
    steps = np.full(len(passable), -1, np.int32)
    _flood(passable, columns, start, steps)
    return steps


def solve(question: np.ndarray, columns: int) -> tuple[np.ndarray, int]:
    """The maze with a shortest path from START to GOAL marked, (S,) uint8, and its steps; 0 without a path.

    Among shortest paths it chooses, backwards from the goal, the first cell nearer to the start in the order
    above, left, right, below. The maze must have a start and a goal.
    """
    answer = question.copy()
    start, goal = int((question == START).argmax()), int((question == GOAL).argmax())
    return answer, int(_solve(answer, columns, start, goal))


def solved(questions: np.ndarray, answers: np.ndarray, columns: int) -> np.ndarray:
    """A mask of the answers that satisfy every rule of `MazeRules`, (N,) bool; questions, answers: (N, S)
    uint8."""
    right = np.zeros(len(questions), np.bool_)
    _judge(questions, answers, columns, right)
    return right


def symmetries_of(shape: tuple[int, int]) -> tuple[int, ...]:
    """The symmetries that preserve a shape (rows, columns)."""
    return tuple(range(SYMMETRIES)) if shape[0] == shape[1] else OF_RECTANGLES


def random_mazes(
    shape: tuple[int, int],
    braided: bool,
    min_length: int,
    attempts: int,
    states: np.ndarray,
    questions: np.ndarray,
    answers: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Writes random mazes to questions and answers, (N, S) uint8, and their path lengths to lengths (N,).

    A random depth-first walk carves corridors one cell wide in a frame of walls, so that exactly one path
    joins any two cells. braided: every dead end is opened into another corridor, which makes loops. Start and
    goal are random and at least min_length steps apart; if none of `attempts` mazes has such cells, this
    length and all later ones are 0. shape: rows and columns, 5 or more each. states: (N,) uint64, not 0: the
    random state of each maze; a call advances it, so a second call with the same arrays generates other
    mazes.
    """
    _fill(*shape, braided, min_length, attempts, states, questions, answers, lengths)


def symmetric(grids: np.ndarray, symmetry: int) -> np.ndarray:
    """Grids (..., rows, columns) under one of the SYMMETRIES.

    0 to 3 are counterclockwise quarter turns; then reflections left to right, top to bottom, and at the two
    diagonals.
    """
    if symmetry < 4:
        return np.rot90(grids, symmetry, axes=(-2, -1))
    if symmetry < 6:
        return np.flip(grids, axis=-1 if symmetry == 4 else -2)
    transposed = grids.swapaxes(-2, -1)
    return transposed if symmetry == 6 else transposed[..., ::-1, ::-1]


@compiled
def _neighbour(cell, way, columns, cells):
    """The cell above, left, right or below; -1 outside the grid."""
    if way == 0:
        return cell - columns
    if way == 1:
        return cell - 1 if cell % columns else -1
    if way == 2:
        return cell + 1 if (cell + 1) % columns else -1
    return cell + columns if cell + columns < cells else -1


@compiled
def _flood(passable, columns, start, steps):
    queue = np.empty(len(passable), np.int32)
    steps[start] = 0
    queue[0] = start
    head, tail = 0, 1
    while head < tail:
        cell = queue[head]
        head += 1
        for way in range(4):
            near = _neighbour(cell, way, columns, len(passable))
            if near >= 0 and passable[near] and steps[near] < 0:
                steps[near] = steps[cell] + 1
                queue[tail] = near
                tail += 1


@compiled
def _solve(maze, columns, start, goal):
    """Marks the path in place; returns its steps, 0 without a path."""
    steps = np.full(len(maze), -1, np.int32)
    _flood(maze != WALL, columns, start, steps)
    cell = goal
    while steps[cell] > 1:
        for way in range(4):
            near = _neighbour(cell, way, columns, len(maze))
            if near >= 0 and steps[near] == steps[cell] - 1:
                cell = near
                break
        maze[cell] = PATH
    return max(steps[goal], 0)


@compiled
def _judge(questions, answers, columns, right):
    steps = np.empty(questions.shape[1], np.int32)
    for row in range(len(questions)):
        question, answer = questions[row], answers[row]
        start = goal = -1
        marked = starts = goals = 0
        kept = True
        for cell in range(len(question)):
            if question[cell] == START:
                start = cell
                starts += 1
            elif question[cell] == GOAL:
                goal = cell
                goals += 1
            kept &= WALL <= question[cell] <= GOAL
            if question[cell] == OPEN and answer[cell] == PATH:
                marked += 1
            else:
                kept &= question[cell] == answer[cell]
        if not kept or starts != 1 or goals != 1:
            continue
        steps[:] = -1
        _flood(question != WALL, columns, start, steps)
        shortest = steps[goal]
        steps[:] = -1
        _flood((answer == PATH) | (answer == START) | (answer == GOAL), columns, start, steps)
        # Connected marked cells, as many as on the shortest path, are a shortest path.
        right[row] = shortest > 0 and steps[goal] == shortest and marked == shortest - 1


@compiled
def _below(limit, random):
    """A random number from 0 to limit - 1, by a xorshift generator whose state is random[0]."""
    random[0] ^= random[0] << np.uint64(13)
    random[0] ^= random[0] >> np.uint64(7)
    random[0] ^= random[0] << np.uint64(17)
    return np.int64(random[0] % np.uint64(limit))


@compiled
def _fill(rows, columns, braided, min_length, attempts, states, questions, answers, lengths):
    lengths[:] = 0
    for row in range(len(questions)):
        random = states[row : row + 1]
        for _ in range(attempts):
            start, goal = _carve(rows, columns, braided, min_length, random, questions[row])
            if goal >= 0:
                answers[row] = questions[row]
                lengths[row] = _solve(answers[row], columns, start, goal)
                break
        # If one maze cannot be found, neither can the others.
        if not lengths[row]:
            return


@compiled
def _carve(rows, columns, braided, min_length, random, maze):
    """Fills `maze`; returns its start and goal, -1 if no two cells are min_length apart.

    Rooms are at odd rows and columns of a grid with odd sides. For an even side, one inner row or column of
    walls and passages is repeated, which only lengthens the passages across it.
    """
    high, wide = (rows - 1) // 2, (columns - 1) // 2
    height, width = 2 * high + 1, 2 * wide + 1
    cells = height * width
    grid = np.full(cells, WALL, np.uint8)
    stack = np.empty(high * wide, np.int32)
    ways = np.empty(4, np.int32)
    stack[0] = (2 * _below(high, random) + 1) * width + 2 * _below(wide, random) + 1
    grid[stack[0]] = OPEN
    depth = 1
    while depth:
        room = stack[depth - 1]
        count = 0
        for way in range(4):
            room_there = _room(room, way, height, width)
            if room_there >= 0 and grid[room_there] == WALL:
                ways[count] = way
                count += 1
        if not count:
            depth -= 1
            continue
        way = ways[_below(count, random)]
        grid[_neighbour(room, way, width, cells)] = OPEN
        stack[depth] = _room(room, way, height, width)
        grid[stack[depth]] = OPEN
        depth += 1
    if braided:
        for number in range(high * wide):
            room = (2 * (number // wide) + 1) * width + 2 * (number % wide) + 1
            count = doors = 0
            for way in range(4):
                if grid[_neighbour(room, way, width, cells)] == OPEN:
                    doors += 1
                elif _room(room, way, height, width) >= 0:
                    ways[count] = way
                    count += 1
            if doors == 1:
                grid[_neighbour(room, ways[_below(count, random)], width, cells)] = OPEN
    row_cut, column_cut = rows, columns
    if height < rows:
        row_cut = 2 * _below(high - 1, random) + 2
    if width < columns:
        column_cut = 2 * _below(wide - 1, random) + 2
    for row in range(rows):
        for column in range(columns):
            old = (row - (row > row_cut)) * width + column - (column > column_cut)
            maze[row * columns + column] = grid[old]
    return _ends(columns, min_length, random, maze)


@compiled
def _room(room, way, height, width):
    """The next room in a direction, -1 beyond the frame."""
    row, column = room // width, room % width
    if (way == 0 and row < 2) or (way == 1 and column < 2):
        return -1
    if (way == 2 and column >= width - 2) or (way == 3 and row >= height - 2):
        return -1
    return room + (-2 * width, -2, 2, 2 * width)[way]


@compiled
def _ends(columns, min_length, random, maze):
    cells = np.nonzero(maze == OPEN)[0]
    steps = np.empty(len(maze), np.int32)
    # Usually most starts have a goal at sufficient distance; otherwise very few have.
    for _ in range(16):
        start = cells[_below(len(cells), random)]
        steps[:] = -1
        _flood(maze == OPEN, columns, start, steps)
        far = np.nonzero(steps >= max(1, min_length))[0]
        if len(far):
            goal = far[_below(len(far), random)]
            maze[start] = START
            maze[goal] = GOAL
            return start, goal
    return -1, -1
