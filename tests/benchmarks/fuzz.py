"""Coverage-guided fuzzing of everything that reads bytes from outside, with Atheris (libFuzzer).

python -m tests.benchmarks.fuzz pickle image --minutes 5

Without names, all targets run one after the other. Each begins with tests/fuzz/corpus and keeps what it finds
in --corpus. A fault ends a target's run; its input is written to --faults. With --reduce, the smallest inputs
of --corpus that reach every line that any of them reaches are copied to tests/fuzz/corpus, which the test
suite replays. Fuzzing needs Linux and `pip install atheris`.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from tests.helpers.environment import ROOT

COMMITTED = ROOT / "tests" / "fuzz" / "corpus"
OURS = (str(ROOT / "models"), str(ROOT / "service"))
Line = tuple[str, int]  # file, number
CHILD = "--child"  # first argument of the process that fuzzes one target
MAX_SECONDS = 10  # of one input
MAX_MIB = 3072  # resident, of the whole process
MAX_BYTES = 4096  # of an input
MAX_KEPT_BYTES = 1024  # of an input that is committed


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        fuzz(sys.argv[2], sys.argv[3:])
    args = parse()
    for name in args.targets:
        if args.reduce:
            reduce(name, args.corpus / name)
        else:
            begin(name, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="names of tests/fuzz/targets.py")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each target")
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"))
    parser.add_argument("--faults", type=Path, default=Path("fuzz-faults"))
    parser.add_argument("--reduce", action="store_true", help="do not fuzz; reduce --corpus")
    args = parser.parse_args()
    if not args.targets:
        from tests.fuzz.targets import TARGETS

        args.targets = list(TARGETS)
    return args


def begin(name: str, args: argparse.Namespace) -> None:
    """Run a target in a process of its own, which libFuzzer ends."""
    corpus, committed = args.corpus / name, COMMITTED / name
    faults = args.faults / name
    for folder in (corpus, committed, faults):
        folder.mkdir(parents=True, exist_ok=True)
    limits = [f"-timeout={MAX_SECONDS}", f"-rss_limit_mb={MAX_MIB}", f"-artifact_prefix={faults}/"]
    how = [f"-max_total_time={round(60 * args.minutes)}", f"-max_len={MAX_BYTES}"]
    how += [str(corpus), str(committed)]
    command = [sys.executable, "-m", "tests.benchmarks.fuzz", CHILD, name, *limits, *how]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    print(f"{name}: {'no fault' if code == 0 else f'exit code {code}, see {faults}'}", flush=True)


def reduce(name: str, corpus: Path) -> None:
    """Copy inputs of a corpus, the small ones first, that reach a line that no smaller one reaches."""
    from tests.fuzz.targets import run

    run(name, b"")  # lines that run once in a process do not count
    target, found = COMMITTED / name, set[Line]()
    target.mkdir(parents=True, exist_ok=True)
    inputs = {file.read_bytes() for folder in (corpus, target) for file in folder.iterdir()}
    for data in sorted(inputs, key=lambda each: (len(each), each)):
        if len(data) <= MAX_KEPT_BYTES and (lines := lines_of(name, data)) - found:
            found |= lines
            (target / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    print(f"{name}: {len(list(target.iterdir()))} of {len(inputs)} inputs reach all {len(found)} lines")


def lines_of(name: str, data: bytes) -> set[Line]:
    """The lines of our packages that the target runs for an input."""
    from tests.fuzz.targets import run

    lines: set[Line] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        run(name, data)
    finally:
        sys.settrace(None)
    return lines


def fuzz(name: str, libfuzzer: list[str]) -> None:
    """Run one target until libFuzzer ends this process."""
    import atheris

    with atheris.instrument_imports(include=["models", "service"]):
        from tests.fuzz.targets import run

    run(name, b"")  # slow imports and files that the target makes once
    atheris.Setup([sys.argv[0], *libfuzzer], lambda data: run(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
