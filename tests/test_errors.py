"""Errors that a user can mend have types of their own, and these decide what the command shows."""

import ast
import builtins
from pathlib import Path

import pytest

from helpers.folders import CONFIGS, ROOT
from lightning_maml import MLP, errors
from lightning_maml.cli import main

FILES = sorted({*(ROOT / "lightning_maml").rglob("*.py"), *(ROOT / "datamodules").rglob("*.py")})


class Foreign(MLP):
    """A network of somebody else, whose error happens to begin like ours."""

    def __init__(self) -> None:
        raise ValueError("Expected the Spanish Inquisition")


class Own(MLP):
    """A network whose author says that the user can mend it."""

    def __init__(self) -> None:
        raise errors.UserValueError("A sentence in other words.")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_sentences_for_users_are_raised_as_such(file: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    plain = []
    for call in calls:
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and call.args:
            plain += [call.lineno] if ast.unparse(call.args[0])[:12].count("Expected ") else []
    assert not plain


def test_each_is_an_error_of_python_too() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    own = [kind for kind in kinds if issubclass(kind, errors.UserError)]
    for kind in own:
        if kind is not errors.UserError:
            assert kind.__name__.removeprefix("User") in {base.__name__ for base in kind.__mro__}


def test_the_type_decides_what_is_shown_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", f"--config={CONFIGS / 'glyphs_maml.yaml'}"]
    network = "--model.init_args.network"
    with pytest.raises(ValueError, match="Spanish Inquisition"):
        main([*arguments, f"{network}={__name__}.Foreign"])
    with pytest.raises(SystemExit, match=r"^lightning-maml: A sentence in other words\.$"):
        main([*arguments, f"{network}={__name__}.Own"])
