"""A page on one run or several: what happened in it, with figures, as one file of HTML."""
