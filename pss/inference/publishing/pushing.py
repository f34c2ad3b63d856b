"""A model written into a folder for the hub, with its card and the sweep's picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pss.inference import hub
from pss.inference.opening import Run
from pss.inference.publishing import card
from pss.inference.publishing.facts import Facts


def write_model(
    folder: Path,
    run: Run,
    name: str,
    rows: Sequence[dict[str, Any]],
    facts: Facts,
    made: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write the model of a run, as `pss.inference.hub.save` does.

    Args:
        folder: Where to.
        run: What was opened.
        name: What the card calls it.
        rows: What a sweep found of it.
        facts: What else is known of it.
        made: The files of the sweep by name, of which those that a card shows go along.

    Raises:
        ValueError: what cannot be published.
        OSError: the folder cannot be written.
    """
    pictures = {key: made[key] for key in hub.PICTURES if made and key in made}

    def text(plain: bool) -> str:
        return card.text(name, rows=rows, facts=facts, plain=plain, picture=card.PICTURE in pictures)

    hub.save(folder, run.published(), text, pictures)
