"""Teaching a memory further good parts, without the pictures that it was learnt from: nothing is forgotten for them.

The core goes on where it ended (greedy k-centre): of the new parts, always the cell that is farthest from all that is
remembered is added, until none is farther than half way from a good part's ordinary cell to its most striking one. The
scales stay as they were learnt. What was known stays known, so no cell of any picture becomes more striking.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flawline.config.errors import ConfigError
from flawline.models.coreset import BUDGET, outliers
from flawline.models.memory import Memory, nearest
from flawline.models.memory_file import make_memory
from flawline.models.memory_learn import Described, Learnt, Shown

MOST_ROWS = 2 * BUDGET
"""Of a taught memory: a frame's cost grows with its rows."""


@torch.inference_mode()
def teach(memory: Memory, parts: Sequence[Described], *, keep_all: bool = False) -> Learnt:
    """The memory with these good parts added; the same parts in any order give the same.

    Each part's use is `learnt`, `known` (no cell of it is so far: nothing to add), `duplicate` or
    `outlier` by the rule of `coreset.outliers`, which `keep_all` sets aside. Raises ImageError where one has another
    size than the memory's, ConfigError where the memory is full.
    """
    for part in parts:
        memory.check_frame(part.frame)
    first: dict[bytes, Described] = {}
    for part in parts:
        first.setdefault(part.digest, part)
    given = sorted(first.values(), key=lambda part: part.digest)
    cells = [_rows(memory, part) for part in given]
    gaps = [nearest(rows, memory.bank) for rows in cells]
    enough = 0.5 * (memory.about.ordinary + memory.about.striking)
    largest = np.array([float(gap.max()) for gap in gaps])
    use = {}
    for part, far, out in zip(given, largest, outliers(largest), strict=True):
        use[part.name] = "known" if far <= enough else "outlier" if out and not keep_all else "learnt"
    new = [number for number, part in enumerate(given) if use[part.name] == "learnt"]
    shown = [
        Shown(
            part.name,
            use.get(part.name, "duplicate"),
            float(largest[given.index(first[part.digest])]),
            memory.about.striking,
        )
        for part in parts
    ]
    if not new:
        return Learnt(memory, shown)
    added = _cover(torch.cat([cells[n] for n in new]), torch.cat([gaps[n] for n in new]), enough)
    if len(memory.bank) + len(added) > MOST_ROWS:
        raise ConfigError(
            f"the memory would hold {len(memory.bank) + len(added)} features, more than {MOST_ROWS}: learn it anew "
            "from pictures of good parts with `flawline learn --good`"
        )
    about = memory.about.model_copy(update={"pictures": memory.about.pictures + len(new)})
    layouts = torch.cat([given[n].layouts for n in new]).to(memory.layouts)
    grown = replace(memory, bank=torch.cat([memory.bank, added]), layouts=torch.cat([memory.layouts, layouts]))
    return Learnt(make_memory(about, grown.stored(), memory.bank.device), shown)


def _rows(memory: Memory, part: Described) -> Tensor:
    """(n, D + 2): the part's counted cells, as the bank holds them."""
    device = memory.bank.device
    return memory.rows(part.cells.to(device).float(), part.tiles).flatten(0, 1)[part.counted.to(device)]


def _cover(rows: Tensor, gap: Tensor, enough: float) -> Tensor:
    """Of (n, D + 2) rows whose distance to the bank is `gap`, those to add so that none is farther than `enough`."""
    rows, gap = rows[gap > enough], gap[gap > enough].clone()
    squares = rows.square().sum(dim=1)
    chosen: list[int] = []
    while len(chosen) < MOST_ROWS and len(rows) and float(gap.max()) > enough:
        newest = int(gap.argmax())
        chosen.append(newest)
        squared = squares + squares[newest] - 2.0 * (rows @ rows[newest])
        torch.minimum(gap, squared.clamp_min(0.0).sqrt(), out=gap)
        gap[newest] = 0.0  # whatever rounding left
    return rows[chosen]
