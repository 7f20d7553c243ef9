"""What a batch has written: shards that are whole, and those that are being filled, so that no line is done twice.

    batch.json               what the batch is: its input, its options
    state/000042.jsonl       rows of a shard that is not whole yet, appended as lines are over
    state/000042/            their images, where a shard will hold them
    state/000042.json        counts of a shard, written just before it
    images/000042/           images as files of their own
    shards/000042.parquet    a whole shard, or .tar
    errors/000042.jsonl      rows without an image, where the shard is a .tar

A shard stands for a fixed range of lines and is in their order. A row counts as soon as it is in `state`, with the
checksum of its image; a shard becomes visible by a rename, and what was kept in `state` for it counts no more. So the
process may be killed at any time. Where lines that failed are to be done again, the other rows of their shard go back
to `state`, and it appears anew when it is whole again.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from rollflow.durable import sync, write
from rollflow.errors import RequestError, said, shown
from rollflow.journal import locked
from rollflow.serve.formats import WRITERS
from rollflow.serve.lines import Source

VERSION = 1


class Counts(NamedTuple):
    """Lines that are over, those of them that failed, and the NFE of all."""

    lines: int = 0
    failed: int = 0
    nfe: int = 0

    def plus(self, other: Counts) -> Counts:
        """The sum."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass
class _Open:
    """A shard that is not whole."""

    done: set[int] = field(default_factory=set)
    counts: Counts = field(default_factory=Counts)


class Shards:
    """The folder of a batch. One process at a time has it open; its methods belong to one thread, but for `finish`.

    Args:
        out: the folder, made if it is not there.
        source: the input.
        options: what has to be the same when the batch goes on: plain JSON.
        kind: a name of `rollflow.serve.formats.WRITERS`.
        again: lines that failed are not done.

    Attributes:
        counts: of all lines so far, also of before.

    Raises:
        RequestError: the folder cannot be used, another process has it, or it holds another batch.
    """

    def __init__(self, out: Path, source: Source, options: Mapping[str, Any], kind: str, again: bool = False):
        self.out, self.source, self._writer, self._again = out, source, WRITERS[kind], again
        self._open: dict[int, _Open] = {}
        self.counts = Counts()
        try:
            for name in ("state", "shards"):
                (out / name).mkdir(parents=True, exist_ok=True)
            self._lock = locked(out / "state" / "lock")
        except OSError as error:
            raise RequestError(
                f"the folder {shown(str(out))} cannot be used for a batch ({said(error)}): choose another --out"
            ) from error
        try:
            self._same({"sha256": source.digest, "lines": source.total}, {**options, "format": kind})
            self._whole = bytearray(len(source.counts))
            self._resume()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process have the folder."""
        os.close(self._lock)

    def has(self, number: int) -> bool:
        """Whether a line is over."""
        place = (number - 1) // self.source.shard
        held = self._open.get(place)  # first: `finish` says that it is whole, and then drops this
        return bool(self._whole[place]) if held is None else number in held.done

    def put(self, row: Mapping[str, Any], image: bytes | None, kind: str | None) -> int | None:
        """Keeps what became of a line.

        Args:
            row: its columns, see `rollflow.serve.formats.COLUMNS`; `image` is added.
            image: the file of its image, if there is one.
            kind: suffix of that file.

        Returns:
            The number of its shard, if that has all of its rows now and is to be finished.
        """
        number = int(row["line"])
        place = (number - 1) // self.source.shard
        held = self._open.setdefault(place, _Open())
        kept = {**row, "image": None}
        if image is not None:
            name = f"{number:09d}.{kind}"
            folder = self._images(place)
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / name, image, durable=False)
            kept |= {"image": f"images/{place:06d}/{name}", "size": len(image), "crc32": zlib.crc32(image)}
        with self._rows(place).open("ab") as file:
            file.write(_text(kept))
        held.done.add(number)
        held.counts, self.counts = held.counts.plus(_count(row)), self.counts.plus(_count(row))
        return place if held.counts.lines == self.source.counts[place] else None

    def finish(self, place: int) -> None:
        """Writes a shard that has all of its rows; may take its time, on any thread."""
        held = self._open[place]
        kept, images = self._kept(place, check=False), self._images(place)
        rows = [kept[number] for number in sorted(kept)]
        for row in rows:
            if row["image"] is not None:
                sync(images / Path(row["image"]).name)
        if images.is_dir():
            sync(images)
        summary = json.dumps(held.counts._asdict()).encode()
        write(self.out / "state" / f"{place:06d}.json", summary)
        self._writer.write(self.out, place, rows, images)  # from here on it is whole
        self._whole[place] = 1
        self._clean(place)
        self._open.pop(place, None)

    def _resume(self) -> None:
        """Reads what is there, and finishes shards that only had to be written."""
        for place in range(len(self._whole)):
            if self._writer.file(self.out, place).exists():
                counts = self._counts(place)
                self._clean(place)
                if self._again and counts.failed:
                    self._unpack(place)
                    self._reopen(place)
                else:
                    self._whole[place] = 1
                    self.counts = self.counts.plus(counts)
            elif self._rows(place).exists():
                self._reopen(place)

    def _counts(self, place: int) -> Counts:
        """Those of a whole shard; of its own rows, where the file of them is not there."""
        try:
            return Counts(**json.loads((self.out / "state" / f"{place:06d}.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return reduce(Counts.plus, (_count(row) for row, _ in self._shard(place)), Counts())

    def _shard(self, place: int) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        """The rows of a whole shard with their images."""
        try:
            yield from self._writer.read(self.out, place)
        except Exception as error:  # pyarrow and tarfile raise many kinds for what is broken
            file = self._writer.file(self.out, place)
            raise RequestError(
                f"the shard {shown(str(file))} cannot be read ({said(error)}): delete it, and its lines are done again"
            ) from error

    def _unpack(self, place: int) -> None:
        """Takes a whole shard back to `state`, without the rows that failed."""
        kept, images = list[bytes](), self._images(place)
        for row, image in self._shard(place):
            if row["error"] is None and image is not None:
                if self._writer.holds_images:
                    images.mkdir(parents=True, exist_ok=True)
                    write(images / Path(row["image"]).name, image)
                kept.append(_text(row | {"size": len(image), "crc32": zlib.crc32(image)}))
        write(self._rows(place), b"".join(kept))
        self._writer.file(self.out, place).unlink()  # until here the shard is whole, from here on these are its rows

    def _reopen(self, place: int) -> None:
        rows = self._kept(place, check=True)
        if self._again:
            rows = {number: row for number, row in rows.items() if row["error"] is None}
        held = self._open[place] = _Open()
        for row in rows.values():
            held.done.add(row["line"])
            held.counts, self.counts = held.counts.plus(_count(row)), self.counts.plus(_count(row))
        # Without what was torn: the next row is appended to whole ones.
        write(self._rows(place), b"".join(_text(row) for row in rows.values()))
        if held.counts.lines == self.source.counts[place]:
            self.finish(place)

    def _kept(self, place: int, check: bool) -> dict[int, dict[str, Any]]:
        """The rows of a shard that is not whole, by line; if `check`, those whose images are as they were written."""
        found: dict[int, dict[str, Any]] = {}
        for text in self._rows(place).read_bytes().split(b"\n"):
            try:
                row = json.loads(text)
            except ValueError:
                continue  # torn when the process or the machine ended
            if not check or row["image"] is None or self._is_there(place, row):
                found.setdefault(row["line"], row)
        return found

    def _is_there(self, place: int, row: Mapping[str, Any]) -> bool:
        try:
            image = (self._images(place) / Path(row["image"]).name).read_bytes()
        except OSError:
            return False
        return len(image) == row["size"] and zlib.crc32(image) == row["crc32"]

    def _rows(self, place: int) -> Path:
        return self.out / "state" / f"{place:06d}.jsonl"

    def _images(self, place: int) -> Path:
        return self.out / ("state" if self._writer.holds_images else "images") / f"{place:06d}"

    def _clean(self, place: int) -> None:
        self._rows(place).unlink(missing_ok=True)
        if self._writer.holds_images:
            shutil.rmtree(self._images(place), ignore_errors=True)

    def _same(self, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Whether this is the batch that the folder holds; a new folder holds it from now on."""
        file, now = self.out / "batch.json", {"version": VERSION, "input": given, "options": options}
        if not file.exists():
            if any((self.out / "shards").iterdir()):
                raise RequestError(
                    f"the folder {shown(str(self.out))} has shards of something else: choose another --out"
                )
            write(file, json.dumps(now, indent=2).encode() + b"\n")
            return
        before = json.loads(file.read_bytes())
        if before == json.loads(json.dumps(now)):
            return
        for name, what in (("version", "another version's format"), ("input", "other lines, or its file was changed")):
            if before.get(name) != now[name]:
                raise RequestError(f"the folder {shown(str(self.out))} has a batch of {what}: choose another --out")
        then = before["options"]
        name = next(one for one in {**then, **options} if then.get(one) != options.get(one))
        raise RequestError(
            f"the folder {shown(str(self.out))} has a batch with {name}={shown(then.get(name))}, and not "
            f"{shown(options.get(name))}: give the same options to go on, or another --out"
        )


def _count(row: Mapping[str, Any]) -> Counts:
    return Counts(1, int(row["error"] is not None), int(row["nfe"] or 0))


def _text(row: Mapping[str, Any]) -> bytes:
    """A line of `state`."""
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
