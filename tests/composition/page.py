"""docs/composition.md's table, from what the tests run:  python -m tests.composition.page

writes it anew, between the marks that the page has; the rest of the page is written by hand.
"""

from collections.abc import Iterator
from pathlib import Path

from tests.composition.cases import COMPOSITIONS
from tests.composition.evidence import Evidence, evidence
from tests.composition.features import IMPOSSIBLE, NAMES, REFUSED, Pair

PAGE = Path(__file__).parent.parent.parent / "docs" / "composition.md"
BEGIN, END = "<!-- written by python -m tests.composition.page -->", "<!-- end -->"
REFUSAL, NEVER = "no", "-"


def cells(found: list[Evidence]) -> dict[Pair, str]:
    """What stands in the table for each pair; pairs that nothing is known of are left out."""
    table = dict.fromkeys(REFUSED, REFUSAL) | dict.fromkeys(IMPOSSIBLE, NEVER)
    for letter, item in reversed(lettered(found)):
        table |= dict.fromkeys(item.pairs, letter)
    return table


def lettered(found: list[Evidence]) -> list[tuple[str, Evidence]]:
    """Tests and the letters that stand for them."""
    return list(zip("abcdefgh", found, strict=False))


def rows(table: dict[Pair, str]) -> Iterator[str]:
    """A triangle: of each feature its pairs with those before it, whose numbers are the columns."""
    yield "| | | " + " | ".join(str(number) for number in range(1, len(NAMES))) + " |"
    yield "|---" * (len(NAMES) + 1) + "|"
    for number, name in enumerate(NAMES):
        before = [table.get(frozenset((name, other)), "") for other in NAMES[:number]]
        yield f"| {number + 1} | {name} | " + " | ".join(before + [""] * (len(NAMES) - 1 - number)) + " |"


def reasons(words: dict[Pair, str]) -> Iterator[str]:
    """Of what is refused or never meets, by reason, each feature with those that it does not meet."""
    for reason in dict.fromkeys(words.values()):
        pairs = [sorted(pair, key=NAMES.index) for pair, its in words.items() if its == reason]
        yield f"- {reason}: " + "; ".join(" with ".join(pair) for pair in pairs)


def section() -> str:
    """What stands between the marks."""
    found = evidence(COMPOSITIONS)
    tests = [f"| {letter} | `tests/{item.test}` |" for letter, item in lettered(found)]
    lines = ["| in a cell | |", "|---|---|", *tests]
    lines += [f"| {REFUSAL} | refused in one line before anything starts |"]
    lines += [f"| {NEVER} | no run can have both |", "", *rows(cells(found)), ""]
    lines += ["Refused, with these words in the line:", "", *reasons(REFUSED), ""]
    lines += ["No run can have both:", "", *reasons(IMPOSSIBLE)]
    return "\n".join(lines) + "\n"


def with_section(page: str, section: str) -> str:
    """The page with another table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), section()), encoding="utf-8")
