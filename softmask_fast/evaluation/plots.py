"""How figures are saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from softmask_fast.errors import printable
from softmask_fast.utils import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, out: str | Path) -> None:
    """Writes a PNG, and its folder if there is none. Text is drawn literally, never as a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set(parse_math=False, usetex=False, text="\n".join(map(printable, text.get_text().split("\n"))))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(out)) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")
