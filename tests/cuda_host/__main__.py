"""Runs the tests on the stand-in CUDA library, or any program.

python -m tests.cuda_host [files, and words for pytest]
python -m tests.cuda_host --run SCRIPT [words]
python -m tests.cuda_host --run -m MODULE [words]
"""

import os
import sys

from tests.cuda_host.stand_in import environment, fault


def main(words: list[str]) -> None:
    if (reason := fault()) is not None:
        sys.exit(f"{reason}: make cuda-host creates an environment")
    named = any(word.startswith("tests/") for word in words)
    tests = ["-m", "pytest", *([] if named else ["tests/cuda_host"]), *words]
    program = words[1:] if words[:1] == ["--run"] else tests
    os.execve(sys.executable, [sys.executable, *program], environment())


if __name__ == "__main__":
    main(sys.argv[1:])
