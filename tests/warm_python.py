"""Python processes that start at once: forks of one that has already imported torch and Transformers.

A new process takes four seconds to import them, and most tests of a command or a snippet do little else. The package
itself is not among what is imported, so that a snippet that forgets to import it fails here as it does for a user.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from measuring import measured


class WarmPython:
    """A context manager around the process that is forked."""

    def __enter__(self) -> "WarmPython":
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def __call__(
        self, arguments: Iterable[object], folder: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS` in a folder: `-c CODE ...`, `-m MODULE ...` or `SCRIPT ...`.

        Its environment is this process's unless another is given, whole.
        """
        arguments = [str(argument) for argument in arguments]
        environment = dict(os.environ if environment is None else environment)
        request = {"arguments": arguments, "folder": str(folder), "environment": environment}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that is forked has ended"
        status, stdout, stderr = json.loads(answer)
        return subprocess.CompletedProcess(arguments, status, stdout, stderr)

    def run(self, *arguments: object, folder: Path, environment: Mapping[str, str] | None = None) -> str:
        """Return what `python ARGUMENTS` prints, and fail where it does."""
        done = self(arguments, folder, environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


# --- In the process that is forked --------------------------------------------------------------------------------


def _become(arguments: list[str]) -> None:
    """Run what `python ARGUMENTS` runs."""
    first, *rest = arguments
    if first == "-c":
        code, *others = rest
        sys.argv, sys.path[0] = ["-c", *others], ""
        # What pickles a function by its name, or leaves that to `dill`, looks for it there.
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def _set_environment(environment: dict[str, str]) -> None:
    """Set it for the libraries too that have read it while they were imported."""
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
    modules = os.environ.get("HF_MODULES_CACHE", os.path.join(huggingface_hub.constants.HF_HOME, "modules"))
    transformers.dynamic_module_utils.HF_MODULES_CACHE = modules


def _run(request: dict[str, Any], files: tuple[IO[bytes], IO[bytes]]) -> int:
    """Return the exit status, by Python's rules."""
    os.chdir(request["folder"])
    _set_environment(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    try:
        with measured():
            _become(request["arguments"])
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _fork(line: str) -> tuple[int, str, str]:
    """Run a request in a fork; return its exit status and what it printed to stdout and stderr."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            status = _run(json.loads(line), (stdout, stderr))
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            # Python's own end would take apart everything that was imported, which takes over a second.
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (stdout, stderr):
            file.seek(0)
        return status, stdout.read().decode(errors="replace"), stderr.read().decode(errors="replace")


def _serve() -> None:
    """Answer every line of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.freeze()  # or a fork's first collection would copy all of it
    while line := sys.stdin.readline():
        answers.write(json.dumps(_fork(line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    import huggingface_hub.hf_api
    import transformers.dynamic_module_utils
    import transformers.pipelines
    import transformers.trainer

    _serve()
