"""How many good parts a memory takes, and how many it wants. No torch here: commands and the agent say these too."""

MOST_GOOD_PARTS = 500
FEW_GOOD_PARTS = 5
"""Of fewer nobody can tell which one is unlike the others."""
