"""The manifests of a shelf as JSON documents, read and forged by docs/format.md alone, without the library."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorashelf.digest import canonical_json, digest
from lorashelf.errors import NotStorable

ID = re.compile(r"b2-[0-9a-f]{64}")
FACTS = ("squared_norms", "sums")


def head(shelf: Path) -> str:
    return (shelf / "HEAD").read_text().strip()


def page(shelf: Path, identity: str) -> Any:
    return json.loads(gzip.decompress((shelf / "pages" / f"{identity}.json.gz").read_bytes()))


def page_of(shelf: Path, kind: str) -> Path:
    """The first page of this kind that the head has: slots, tasks or facts."""
    document = manifest(shelf)
    identity = page(shelf, document["slots"][0])[0]["facts"] if kind == "facts" else document[kind][0]
    return shelf / "pages" / f"{identity}.json.gz"


def manifest(shelf: Path, identity: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((shelf / "manifests" / f"{identity or head(shelf)}.json").read_text())
    return found


def unfolded(shelf: Path, identity: str | None = None) -> dict[str, Any]:
    """A manifest with the records of its pages in place of their ids; the facts of an object are in its slot."""
    document = manifest(shelf, identity)
    if document["format"] == 1:
        return document
    document["slots"] = [record for each in document["slots"] for record in page(shelf, each)]
    document["tasks"] = {name: task for each in document["tasks"] for name, task in page(shelf, each).items()}
    for record in document["slots"]:
        if record["merged"] and isinstance(record["merged"][0], str):
            record["merged"] = [source for each in record["merged"] for source in page(shelf, each)]
        record["merged"] = [{"weight": 1 / len(record["merged"]), **source} for source in record["merged"]]
        if "facts" in record:
            record.update(page(shelf, record.pop("facts")))
        for source in reversed(record["merged"]):
            if source["task"] in record["members"]:
                own = {"type": source["type"], "digest": source["digest"]}
                document["tasks"][source["task"]] = {**own, **document["tasks"][source["task"]]}
    return document


def references(shelf: Path, identity: str) -> set[str]:
    """The files under the shelf that a manifest is made of and leads to: itself, its pages, its objects."""
    document, found = manifest(shelf, identity), {f"manifests/{identity}.json"}
    if document["format"] == 1:
        return found | {f"objects/{record['object']}" for record in document["slots"]}
    pages = {*document["slots"], *document["tasks"]}
    for each in document["slots"]:
        for record in page(shelf, each):
            found |= {f"objects/{name}" for name, _ in record.get("files", [(record["object"], 0)])}
            pages |= {source for source in record["merged"] if isinstance(source, str)}
            pages |= {record["facts"]} if "facts" in record else set()
    return found | {f"pages/{each}.json.gz" for each in pages}


def put(shelf: Path, content: Any) -> str:
    """Write a page; its id."""
    data = as_json(content)
    path = shelf / "pages" / f"{digest([data])}.json.gz"
    path.write_bytes(gzip.compress(data))
    return digest([data])


def folded(shelf: Path, document: Mapping[str, Any]) -> Path:
    """Write a document as `unfolded` returns it as a manifest of its format, and let HEAD name it; its path."""

    document = dict(document)
    if document.get("format") != 1:
        records = document["slots"]
        for record in records if isinstance(records, list) else ():
            if isinstance(record, dict) and "facts" not in record and any(name in record for name in FACTS):
                record["facts"] = put(shelf, {name: record.pop(name) for name in FACTS if name in record})
        document["slots"], document["tasks"] = [put(shelf, records)], [put(shelf, document["tasks"])]
    return written(shelf, document)


def as_json(content: Any) -> bytes:
    try:
        return canonical_json(content)
    except NotStorable:  # what RFC 8785 cannot hold is forged all the same
        return json.dumps(content).encode()


def written(shelf: Path, document: Mapping[str, Any]) -> Path:
    """Write a manifest's own document and let HEAD name it; its path."""
    data = as_json(document)
    path = shelf / "manifests" / f"{digest([data])}.json"
    path.write_bytes(data)
    (shelf / "HEAD").write_text(f"{path.stem}\n")
    return path


def forged(shelf: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The head's manifest changed by somebody who knows how ids are made, with HEAD moved to it; its path."""
    document = unfolded(shelf)
    change(document)
    return folded(shelf, document)


def as_format_1(shelf: Path, retired: Mapping[str, str] | None = None) -> None:
    """Make a shelf what a lorashelf that knew format 1 only would have made of it; `retired` are the ids that manifests
    which are gone had and would have had.
    """
    documents = {path.stem: unfolded(shelf, path.stem) for path in (shelf / "manifests").iterdir()}
    new = dict(retired or {})
    top = head(shelf)
    for identity, document in sorted(documents.items(), key=lambda item: item[1]["sequence"]):
        text = canonical_json(document | {"format": 1}).decode().replace('"squared_norms":', '"energies":')
        text = ID.sub(lambda found: new.get(found[0], found[0]), text)
        new[identity] = written(shelf, json.loads(text)).stem
        (shelf / "manifests" / f"{identity}.json").unlink()
    (shelf / "HEAD").write_text(f"{new[top]}\n")
    if (log := shelf / "log.jsonl").exists():
        log.write_text(ID.sub(lambda found: new.get(found[0], found[0]), log.read_text()))
    for path in (shelf / "pages").iterdir():
        path.unlink()
    (shelf / "pages").rmdir()
    (shelf / "shelf.toml").write_text((shelf / "shelf.toml").read_text().replace("format = 2", "format = 1"))
