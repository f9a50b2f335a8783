"""How far the clocks of two ranks are apart, from meetings of both (pure arithmetic).

Nobody leaves a meeting before all have come. So of each meeting is known, whatever the network did:

    mine at its begin  is before  the other's at its end
    the other's at its begin  is before  mine at its end

and what all meetings leave open is the error: Cristian's bounds (1989), with a collective for a message.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Meeting = tuple[float, float]  # one rank's clock when it came, and when it left, in seconds


@dataclass(frozen=True)
class ClockOffset:
    """How far one clock is ahead of another; the truth is within the error on either side."""

    seconds: float
    error_seconds: float


def clock_offset(mine: Sequence[Meeting], others: Sequence[Meeting]) -> ClockOffset:
    """Of my clock against another one, from the same meetings.

    Raises ValueError where no offset fits: these were not the same meetings, or a clock jumped.
    """
    least = max(came - other_left for (came, _), (_, other_left) in zip(mine, others, strict=True))
    most = min(left - other_came for (_, left), (other_came, _) in zip(mine, others, strict=True))
    if least > most:
        raise ValueError(f"a clock would be at least {least} s and at most {most} s ahead: it has jumped")
    return ClockOffset((least + most) / 2, (most - least) / 2)
