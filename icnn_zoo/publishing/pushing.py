"""Registries that are written: checkpoints copied into another one, and marked there. The index is last, always."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

from icnn_zoo.io.addresses import shown
from icnn_zoo.publishing.targets import FolderTarget, Target, open_target
from icnn_zoo.zoo.card_readme import GENERATED, marked, registry_readme
from icnn_zoo.zoo.cards import Card, dump, parse
from icnn_zoo.zoo.hub_card import front_matter
from icnn_zoo.zoo.indices import CARD, INDEX, README, WEIGHTS, Entry, Index, Mark


def read_index(target: Target) -> Index:
    """The index of a registry to write into; an empty one where there is none yet.

    Raises:
        ValueError: It is broken, or of a newer format.
        RuntimeError: It cannot be read.
    """
    content = target.read(INDEX)
    return Index(format=1, checkpoints=()) if content is None else parse(Index, content, f"{shown(target.url)}/{INDEX}")


def write_listing(target: Target, index: Index, files: dict[str, Path], message: str) -> None:
    """Writes files, then the README that shows the index, unless somebody wrote one of their own, then the index.

    Args:
        target: Where.
        index: The new index.
        files: What goes before, by names in the registry.
        message: What is done.

    Raises:
        ValueError: Nobody could read the index.
        RuntimeError: The target cannot be written.
    """
    content = dump(index)
    parse(Index, content, "the new index")  # readers are stricter than what made it: about hidden characters, for one
    with TemporaryDirectory() as folder:
        readme, listing = Path(folder) / README, Path(folder) / INDEX
        present = target.read(README)
        files = dict(files)
        if index.checkpoints and (present is None or GENERATED.encode() in present):
            cards = [card for entry in index.checkpoints if (card := _card(target, entry, files)) is not None]
            readme.write_text(front_matter(cards) + registry_readme(index), encoding="utf-8")
            files[README] = readme
        listing.write_bytes(content)
        target.write({**files, INDEX: listing}, message)


def _card(target: Target, entry: Entry, files: dict[str, Path]) -> Card | None:
    name = f"{entry.name}/{CARD}"
    content = files[name].read_bytes() if name in files else target.read(name)
    if content is None or hashlib.sha256(content).hexdigest() != entry.card.sha256:
        return None  # said by `icnn-zoo verify`; a README need not have it
    return parse(Card, content, name)


def push(folder: Path, name: str, target: Target) -> None:
    """Copies a checkpoint from a registry's folder into another registry.

    A push that was killed is called again: what arrived whole is not sent again, and what is listed as it should be is
    left as it is.

    Args:
        folder: A registry that lists it.
        name: The checkpoint.
        target: The other registry.

    Raises:
        ValueError: The other one has a different checkpoint of that name.
        RuntimeError: It cannot be written.
    """
    entry = next(entry for entry in read_index(FolderTarget(str(folder))).checkpoints if entry.name == name)
    index = read_index(target)
    for listed in index.checkpoints:
        if listed.name == name:
            if listed.card == entry.card:
                return
            raise ValueError(f"`name`: {name} is published in {shown(target.url)} already; choose another tag.")
    order = {WEIGHTS: 0, CARD: 1}
    parts = sorted((folder / name).iterdir(), key=lambda file: (order.get(file.name, 2), file.name))
    write_listing(target, index.changed(entry), {f"{name}/{file.name}": file for file in parts}, f"Publish {name}")


def mark_checkpoint(name: str, to: str | Path, mark: Mark | None) -> None:
    """Says in a registry that a checkpoint should not be used any more, or may be again.

    Its files stay, so that pinned names go on meaning what they meant.

    Args:
        name: ``arch.tag``.
        to: The registry: a folder, or an address that :func:`icnn_zoo.publishing.publisher.publish` takes.
        mark: Why, and what to take instead; None takes a mark off.

    Raises:
        ValueError: The registry has no such checkpoint or successor; the message has the nearest.
        RuntimeError: It cannot be written.
    """
    target = open_target(to)
    target.check()
    with target.lock():
        index = read_index(target)
        entries = {entry.name: entry for entry in index.checkpoints}
        for argument, wanted in (("name", name), ("successor", mark.successor if mark else None)):
            if wanted is not None and wanted not in entries:
                near = difflib.get_close_matches(wanted, entries, n=3) or sorted(entries)
                raise ValueError(
                    f"`{argument}`: {shown(target.url)} has no checkpoint {wanted}; "
                    f"there are {', '.join(near) or 'none at all'}."
                )
        if mark is not None and mark.successor == name:
            raise ValueError(f"`successor`: {name} cannot be its own; name another checkpoint.")
        changed = entries[name].model_copy(update={"mark": mark})
        with TemporaryDirectory() as folder:
            files: dict[str, Path] = {}
            page = target.read(f"{name}/{README}")
            if page is not None:
                files[f"{name}/{README}"] = Path(folder) / README
                files[f"{name}/{README}"].write_text(marked(page.decode(), mark), encoding="utf-8")
            what = f"Mark {name} as {mark.kind}" if mark else f"Take the mark off {name}"
            write_listing(target, index.changed(changed), files, what)
