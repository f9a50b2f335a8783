"""The JavaScript that draws charts: Vega, Vega-Lite and Vega-Embed as vl-convert brings them along."""

from megalite.report.content import ReportError


def javascript() -> str:
    """The three libraries in one text, about 900 kB; nothing of it is loaded from a network.

    Raises ReportError where vl-convert is not installed.
    """
    try:
        from vl_convert import javascript_bundle
    except ModuleNotFoundError:
        raise ReportError("vl-convert-python is not installed: pip install 'megalite[report]'") from None
    return javascript_bundle("window.vegaEmbed = vegaEmbed;")
