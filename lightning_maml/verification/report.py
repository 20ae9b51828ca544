"""The table of a check."""

import textwrap
from collections.abc import Iterator
from typing import Literal, NamedTuple

Verdict = Literal["right", "wrong", "note"]


class Look(NamedTuple):
    """One thing that was looked at.

    Attributes:
        at: What it was.
        found: What was found.
        verdict: ``"right"``, ``"wrong"``, or ``"note"`` for what is no mistake, or was not
            compared.
        is_own: Whether it is the gradient that the algorithm trains with.
    """

    at: str
    found: str
    verdict: Verdict
    is_own: bool = False


class CheckReport(NamedTuple):
    """What :func:`lightning_maml.check` found; ``print`` it for a table.

    Attributes:
        algorithm: The class of the model.
        rows: What was looked at, one row for each look.

    Examples:
        >>> import torch
        >>> from lightning_maml import MAML, MLP, Episodes, check
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)  # two tasks
        >>> report = check(MAML(MLP(4, 3), inner_lr=0.1), Episodes(x, y, x, y))
        >>> report.ok
        True
    """

    algorithm: str
    rows: tuple[Look, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(row.verdict == "wrong" for row in self.rows)

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        count = {
            verdict: sum(row.verdict == verdict for row in self.rows)
            for verdict in ("right", "wrong", "note")
        }
        if self.ok:
            counts = f"{count['right']} checks, none wrong; {count['note']} notes"
            where = "on this network, loss and batch"
            own = [row for row in self.rows if row.is_own]
            unsure = [row.at for row in own if row.verdict != "right"]
            if unsure or not own:
                why = (
                    f"found to be right, see '{unsure[0]}'" if unsure else "compared with autograd"
                )
                return (
                    f"Nothing was found wrong with {self.algorithm} {where} ({counts}), but its "
                    f"gradient was not {why}."
                )
            return f"The gradients of {self.algorithm} are right {where} ({counts})."
        first = next(row for row in self.rows if row.verdict == "wrong")
        others = f" ({count['wrong'] - 1} more below it)" if count["wrong"] > 1 else ""
        return (
            f"{self.algorithm} is wrong on this network, loss or batch, see '{first.at}'{others}: "
            f"{first.found}"
        )

    def __str__(self) -> str:
        first = max(len(row.at) for row in self.rows)
        lines = [line for row in self.rows for line in _lines(row, first)]
        return "\n".join([*lines, "", *textwrap.wrap(self.verdict, _WIDTH)])


def _lines(row: Look, width: int) -> Iterator[str]:
    verdict, at = row.verdict, row.at
    for part in textwrap.wrap(row.found, _WIDTH - width - 11) or [""]:
        yield f"  {verdict:<5}  {at:<{width}}  {part}"
        verdict, at = "", ""  # type: ignore[assignment]


_WIDTH = 104
