"""Run code in another process, forked from one that has imported the package.

A new interpreter takes several seconds for the imports.

What is of the interpreter's start or end, such as modules that are missing or functions of
``atexit``, is not seen here.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import types
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FunctionType

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning_maml.cli"])


def start(
    code: str, *arguments: object, prints_into: Path, folder: Path | None = None
) -> ForkServerProcess:
    """Run it as ``python -c`` would, in ``folder``.

    What it prints goes to the files stdout and stderr of ``prints_into``.
    """
    words = [str(argument) for argument in arguments]
    process = SERVER.Process(
        target=_execute, args=(code, words, dict(os.environ), prints_into, folder or Path.cwd())
    )
    process.start()
    return process


def run(
    code: str, *arguments: object, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, for which it has five minutes."""
    with tempfile.TemporaryDirectory() as printed:
        process = start(code, *arguments, prints_into=Path(printed), folder=folder)
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(code, 300)
        stdout, stderr = ((Path(printed) / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(code, process.exitcode, stdout, stderr)


def output(code: str, *arguments: object, folder: Path | None = None) -> str:
    """Run it to its good end; return what it printed."""
    done = run(code, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_two(function: FunctionType, folder: Path, *numbers: int) -> None:
    """Call a function of a test file as ``function(folder, *numbers, devices=2, ...)`` where
    Lightning forks the two."""
    file, name = function.__code__.co_filename, function.__name__
    arguments = ", ".join(
        [f"Path({str(folder)!r})", *map(str, numbers), "devices=2, strategy='ddp_fork'"]
    )
    output(
        f"import runpy\nfrom pathlib import Path\nrunpy.run_path({file!r})[{name!r}]({arguments})"
    )


def _execute(
    code: str, arguments: list[str], environment: dict[str, str], prints_into: Path, folder: Path
) -> None:
    for descriptor, name in enumerate(("stdout", "stderr"), start=1):
        with (prints_into / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(main))  # noqa: S102  it is code of our tests
