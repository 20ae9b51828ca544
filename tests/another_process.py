"""Code in another process, forked from one that has imported the package: a new interpreter takes several seconds for the imports."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import types
from multiprocessing.context import ForkServerProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning_maml.cli"])


def start(code: str, *arguments: object, prints_into: Path, folder: Path | None = None) -> ForkServerProcess:
    """Run it as ``python -c`` would, in ``folder``; what it prints goes to the files stdout and stderr of ``prints_into``."""
    process = SERVER.Process(target=_execute, args=(code, [str(argument) for argument in arguments], prints_into, folder or Path.cwd()))
    process.start()
    return process


def run(code: str, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it to its end, for which it has five minutes."""
    with tempfile.TemporaryDirectory() as printed:
        process = start(code, *arguments, prints_into=Path(printed), folder=folder)
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
        stdout, stderr = ((Path(printed) / name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode is not None
    return subprocess.CompletedProcess(code, process.exitcode, stdout, stderr)


def in_two(function: str, folder: Path, *numbers: int) -> None:
    """Call it, a test module's, as ``function(folder, *numbers, devices=2, ...)`` where Lightning forks another one."""
    module, name = function.split(".")
    arguments = ", ".join([f"Path({str(folder)!r})", *map(str, numbers), "devices=2, strategy='ddp_fork'"])
    done = run(f"from pathlib import Path\nfrom {module} import {name}\n{name}({arguments})")
    assert done.returncode == 0, done.stderr


def _execute(code: str, arguments: list[str], prints_into: Path, folder: Path) -> None:
    for descriptor, name in enumerate(("stdout", "stderr"), start=1):
        with (prints_into / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(main))  # noqa: S102  it is code of our tests
