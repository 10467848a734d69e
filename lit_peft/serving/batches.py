"""Which requests can be computed together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def batches(api: Any, wanted: Mapping[int, tuple[str | None, int, int]]) -> list[list[int]]:
    """Divide requests into batches whose adapters and lengths fit together.

    Args:
        api: the `AdapterAPI` whose model computes them.
        wanted: the adapter, the number of prompt tokens and the number of new tokens of each request, by its index.

    Returns:
        The indices of each batch, of `max_batch_size` requests at most.
    """
    from lit_peft.methods.rows import can_share

    groups: dict[str | None, list[list[int]]] = {}
    for place, (name, _, _) in wanted.items():
        alone = name is not None and not can_share(api.model, name)
        found = groups.setdefault(name if alone else None, [])
        for batch in found:
            together = [wanted[index] for index in (*batch, place)]
            # Padding makes all prompts as long as the longest, and all rows get as many new tokens as one needs.
            longest = max(tokens for _, tokens, _ in together)
            fits = api.rooms[name].fits(longest, max(new_tokens for _, _, new_tokens in together))
            if fits and len(batch) < api.max_batch_size:
                batch.append(place)
                break
        else:
            found.append([place])
    return [batch for group in groups.values() for batch in group]
