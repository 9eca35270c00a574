"""Runs the tests on the stand-in CUDA library, or any program.

python -m tests.cuda_host [words for pytest]
python -m tests.cuda_host --run SCRIPT [words]
python -m tests.cuda_host --run -m MODULE [words]
"""

import os
import sys

from tests.cuda_host.stand_in import environment, fault


def main(words: list[str]) -> None:
    if (reason := fault()) is not None:
        sys.exit(f"{reason}: make cuda-host sets an environment up")
    program = words[1:] if words[:1] == ["--run"] else ["-m", "pytest", "tests/cuda_host", *words]
    os.execve(sys.executable, [sys.executable, *program], environment())


if __name__ == "__main__":
    main(sys.argv[1:])
