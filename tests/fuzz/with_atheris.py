"""Coverage-guided inputs for one target, where atheris is installed:

    python -m tests.fuzz.with_atheris --target architecture --seconds 300 [--bytes-only]

libFuzzer keeps the inputs that reach new code, here of the project and of PyYAML, and changes them by its own
mutations or, but for --bytes-only, half of the time by the target's. Prints how many lines of the project
have refused an input, and the findings.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--bytes-only", action="store_true")
    args = parser.parse_args()
    try:
        import atheris  # type: ignore[import-untyped]
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris, or take python -m tests.fuzz.campaign")
    # What Numba compiles cannot be instrumented.
    with atheris.instrument_imports(["hrm", "yaml"], ["hrm.data.solver", "hrm.data.labyrinth"]):
        from tests.fuzz.targets import TARGETS

        target = TARGETS[args.target]
        from tests.fuzz.judge import Finding, judge, warm

        warm(target)
    places: dict[str, int] = {}
    findings: dict[str, bytes] = {}
    inputs, start = 0, time.monotonic()

    def run(data: bytes) -> None:
        nonlocal inputs
        inputs += 1
        try:
            refusal = judge(target, data)
        except Finding as finding:
            findings.setdefault(str(finding)[:100], data)
        else:
            if refusal is not None:
                places[refusal.where] = places.get(refusal.where, 0) + 1
        # libFuzzer has no way back.
        if time.monotonic() - start > args.seconds:
            print(f"{target.name}: {inputs:,} inputs, {len(places)} places, {len(findings)} findings")
            for why, found in findings.items():
                print(f"    {why}; {found[:100]!r}")
            sys.stdout.flush()
            os._exit(0)

    def mutate(data: bytes, most: int, seed: int) -> Any:
        random = Random(seed)
        return target.draw(random)[:most] if random.random() < 0.5 else atheris.Mutate(data, most)

    folder = Path(tempfile.mkdtemp(prefix="atheris-"))
    for number, data in enumerate(target.seeds()):
        (folder / str(number)).write_bytes(data)
    options = {} if args.bytes_only else {"custom_mutator": mutate}
    # Of slow inputs it would keep files in the current folder.
    words = [str(folder), f"-artifact_prefix={folder}/", "-max_len=65536", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *words], run, **options)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
