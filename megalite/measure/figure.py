"""Pictures that matplotlib draws, on disk."""

from pathlib import Path
from typing import TYPE_CHECKING

from megalite.error import UserError
from megalite.files import written_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FigureError(UserError):
    """A picture that cannot be written as it is asked for."""


def save_figure(figure: "Figure", path: Path, dots_per_inch: int) -> None:
    """Write a picture in the format that the ending of `path` names (none: PNG); complete or absent.

    Raises FigureError for an ending that matplotlib does not know.
    """
    kind, known = path.suffix[1:].lower() or "png", figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise FigureError(f"{path}: picture: expected an ending of {', '.join(known)}, found {kind!r}")
    with written_aside(path, "wb") as file:
        figure.savefig(file, format=kind, dpi=dots_per_inch)
