"""`ldm keys`: new API keys for the key table."""

from __future__ import annotations

import argparse
import sys

from service.keys.table import Entry, digest, new_key, to_toml

COUNTS = {
    "requests_per_minute": "POST requests in any minute",
    "images_per_hour": "images in any hour",
    "running_jobs": "jobs at the same time, queued or running",
}


def add_keys(command: argparse.ArgumentParser) -> None:
    calls = command.add_subparsers(required=True, metavar="COMMAND")
    new = calls.add_parser(
        "new",
        help="make a key: prints its entry for the key table on stdout, and the key on stderr",
        description="Make a random key. Append the entry to the file of --key-table: "
        "ldm keys new NAME >> keys.toml. The key itself is shown once, on stderr.",
    )
    new.add_argument("name", metavar="NAME", help="of the key, in metrics and logs: letters, digits, _ and -")
    for field, meaning in COUNTS.items():
        new.add_argument(
            "--" + field.replace("_", "-"), type=int, metavar="N", help=f"most {meaning} (default: no limit)"
        )
    new.add_argument(
        "--share",
        type=float,
        default=Entry.model_fields["share"].default,
        metavar="W",
        help="weight of the key's jobs where keys compete for the device (default: 1)",
    )
    new.add_argument(
        "--admin",
        action="store_true",
        help="the key may load, unload and rescan models, and see and cancel the jobs of all keys",
    )
    new.set_defaults(command=make_key)


def make_key(args: argparse.Namespace) -> int:
    """Print a new key and its entry."""
    key = new_key()
    fields = {field: getattr(args, field) for field in (*COUNTS, "admin")}
    share = {} if args.share == 1 else {"share": args.share}
    print(to_toml(args.name, digest(key.encode()), {**fields, **share}) + "\n")
    sys.stdout.flush()
    print(f"the key, which is shown only now: {key}", file=sys.stderr)
    return 0
