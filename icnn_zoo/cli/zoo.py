"""The zoo's commands: ``icnn-zoo list``, ``show``, ``load``, ``verify``, ``publish`` and ``mark``."""

from __future__ import annotations

import argparse
from typing import Any

from icnn_zoo.cli.options import Command, add_allow, add_registry, check_output
from icnn_zoo.io.addresses import is_address, shown
from icnn_zoo.io.files import user_path

_NAME_HELP = "arch.tag or its address (hf://user/repo/arch.tag); with @sha256:... behind it is pinned"
_PLACE_HELP = "registry: a folder, hf://user/repo, s3://bucket/folder or another place that fsspec writes to"


def _list_options(parser: argparse.ArgumentParser) -> None:
    add_registry(parser)
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern of names, such as '*drawn*'")


def _list_names(options: argparse.Namespace) -> None:
    """Lists the published checkpoints."""
    import fnmatch

    from icnn_zoo.zoo.registry import open_registries

    rows: dict[str, tuple[str, str]] = {}  # yanked ones too: whoever asks for all should see why one is gone
    places = open_registries(options.registry, options.cache)
    for place in places:
        for entry in place.read_index().checkpoints:
            if fnmatch.fnmatchcase(entry.name, options.pattern):
                what = f"[{entry.mark}] {entry.summary}" if entry.mark else entry.summary
                rows.setdefault(entry.name, (f"{entry.weights.size / 1e6:.1f} MB", what))
    if not rows:
        raise ValueError(f"no checkpoint of {', '.join(map(str, places))} matches {options.pattern!r}.")
    width = max(map(len, rows))
    for name, (size, summary) in sorted(rows.items()):
        print(f"{name:<{width}}  {size:>9}  {summary}")


def _show_options(parser: argparse.ArgumentParser) -> None:
    add_registry(parser)
    parser.add_argument("name", help=_NAME_HELP)
    add_allow(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the whole card")
    form.add_argument("--config", action="store_true", help="print the training configuration, starting from it")


def _show(options: argparse.Namespace) -> None:
    """Shows what is known of a checkpoint."""
    from icnn_zoo.zoo.card_readme import marked, readme, training_config
    from icnn_zoo.zoo.cards import dump
    from icnn_zoo.zoo.registry import find_entry

    place, entry = find_entry(options.name, registry=options.registry, cache=options.cache)
    card = place.read_card(entry)
    if options.json:
        print(dump(card).decode(), end="")
    else:
        page = marked(readme(card, {}), entry.mark)
        print(training_config(card, entry.card.sha256, options.allow) if options.config else page, end="")


def _load_options(parser: argparse.ArgumentParser) -> None:
    add_registry(parser)
    parser.add_argument("name", help=_NAME_HELP)
    add_allow(parser)
    parser.add_argument("--to", type=user_path, help="write the weights to this file too, such as model.safetensors")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def _load(options: argparse.Namespace) -> None:
    """Fetches a checkpoint, verifies it and builds its network."""
    if options.to is not None:
        check_output(options.to, options.force, (".safetensors",))

    from icnn_zoo.io.files import write_whole
    from icnn_zoo.zoo.checkpoints import read_checkpoint
    from icnn_zoo.zoo.networks import assemble
    from icnn_zoo.zoo.registry import find_checkpoint

    place, entry = find_checkpoint(options.name, registry=options.registry, cache=options.cache)
    checkpoint = read_checkpoint(place, entry, options.allow)
    card = checkpoint.card
    assemble(card, checkpoint.tensors, options.allow)
    if options.to is not None:
        write_whole(options.to, checkpoint.data)
    form = "regular" if card.conversion is None else f"irregular from {card.conversion.start!r} on"
    print(f"{card.name}: {card.weights.parameters:,} parameters, {form}, {len(card.classes)} classes")
    print(f"Verified: sha256 {card.weights.sha256}, from {place}")
    print(f"To pin it: {entry.pin}")
    if options.to is not None:
        print(f"Written: {options.to}")


def _verify_options(parser: argparse.ArgumentParser) -> None:
    add_registry(parser)
    parser.add_argument("names", nargs="*", metavar="NAME", help="arch.tag (default: all)")
    add_allow(parser)
    parser.add_argument("--metrics", action="store_true", help="measure the card's metrics too, on its data")
    parser.add_argument(
        "--data-root", type=user_path, help="folder of the data for --metrics (default: the one of the training run)"
    )


def _verify(options: argparse.Namespace) -> None:
    """Checks checkpoints from end to end: index, card, hashes, weights, golden output, and metrics if asked."""
    from icnn_zoo.zoo.golden import check_golden
    from icnn_zoo.zoo.networks import rebuild
    from icnn_zoo.zoo.registry import find_checkpoint, list_checkpoints

    where: dict[str, Any] = {"registry": options.registry, "cache": options.cache}
    names = options.names or list_checkpoints(**where)
    failures = []
    for name in names:
        try:
            model, card = rebuild(*find_checkpoint(name, **where), options.allow)
            print(f"{name}: hashes right, golden output reproduced to {check_golden(model, card.golden):.1e}")
            if options.metrics:
                from icnn_zoo.publishing.card_metrics import check_metrics

                # Of all checkpoints some may be of data that are drawn, which have no folder.
                takes_root = options.names or "root" in card.training.config.get("data", {}).get("init_args", {})
                root = [f"--data.init_args.root={options.data_root}"] if options.data_root and takes_root else []
                measured = check_metrics(model, card, root)
                print("".join(f"  {key}: {value:.4f}, as its card says\n" for key, value in measured.items()), end="")
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise ValueError("\n".join(failures))
    print(f"{len(names)} checked")


def _publish_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "What follows -- goes to the measuring of metrics, such as -- --data.init_args.root elsewhere."
    add_allow(parser)
    parser.add_argument("source", type=user_path, help="run folder (runs/<name>/version_<n>) or .ckpt in one")
    parser.add_argument("--name", required=True, help="arch.tag, such as resnet18.drawn_voc_irregular")
    parser.add_argument("--to", type=_place, required=True, help=_PLACE_HELP)
    parser.add_argument(
        "--about",
        type=user_path,
        required=True,
        help="YAML with description, licence, dataset (name, split, licence, attribution) and metrics (name, protocol, "
        "value; without a value it is measured)",
    )
    parser.add_argument("--half", action="store_true", help="store kernels in 16 bits, in half the space")


def _publish(options: argparse.Namespace) -> None:
    """Adds the network of a run to a registry."""
    from icnn_zoo.publishing.publisher import publish

    place = publish(
        options.source,
        options.name,
        options.to,
        options.about,
        overrides=options.overrides,
        half=options.half,
        allow=options.allow,
    )
    print(f"Published: {shown(place)}")


def _mark_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="arch.tag")
    parser.add_argument("--to", type=_place, required=True, help=_PLACE_HELP)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--superseded", metavar="WHY", help="there is a better one: it loads with a warning")
    kind.add_argument("--yanked", metavar="WHY", help="it is wrong: it is not listed, and loads by its pin alone")
    kind.add_argument("--clear", action="store_true", help="take the mark off")
    parser.add_argument("--successor", metavar="NAME", help="checkpoint of the registry to take instead")


def _mark(options: argparse.Namespace) -> None:
    """Says of a published checkpoint that it is superseded or yanked, and why."""
    from pydantic import ValidationError

    from icnn_zoo.publishing.pushing import mark_checkpoint
    from icnn_zoo.zoo.cards import complaints
    from icnn_zoo.zoo.indices import Mark

    mark = None
    if options.clear and options.successor:
        raise ValueError("--successor goes with --superseded or --yanked; --clear takes the mark off.")
    if not options.clear:
        kind, reason = ("yanked", options.yanked) if options.superseded is None else ("superseded", options.superseded)
        try:
            mark = Mark.model_validate({"kind": kind, "reason": reason, "successor": options.successor})
        except ValidationError as error:
            raise ValueError(f"the mark is not valid: {complaints(error)}") from error
    mark_checkpoint(options.name, options.to, mark)
    print(f"{options.name} of {shown(options.to)} {f'is {mark}' if mark else 'has no mark'}")


def _place(text: str) -> str:
    """An address as it is; a folder with the home folder for ``~``."""
    return text if is_address(text) else str(user_path(text))


COMMANDS = {
    "list": Command(_list_names, _list_options),
    "show": Command(_show, _show_options),
    "load": Command(_load, _load_options),
    "verify": Command(_verify, _verify_options),
    "publish": Command(_publish, _publish_options, overrides=True),
    "mark": Command(_mark, _mark_options),
}
