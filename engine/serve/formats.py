"""What the shards of a batch are: Parquet files, with images beside or inside, or tar files of WebDataset."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rollflow.durable import appearing, write
from rollflow.errors import RequestError

GROUP = 64  # rows whose images are in memory at a time

# name -> type of Arrow's
COLUMNS = {
    "line": "int64",  # of the input, from 1
    "id": "string",  # as the line gives it, else its number
    "prompt": "string",
    "reward": "float64",  # of the image; None where it is no finite number, or the line failed
    "terms": "string",  # JSON: of a combined reward, its terms
    "held_out": "float64",
    "nfe": "int64",  # that the search was charged for
    "seed": "int64",
    "method": "string",
    "stopped": "string",  # what ended the search
    "seconds": "float64",
    "width": "int32",
    "height": "int32",
    "frames": "int32",  # of a clip
    "image": "string",  # its file, from the folder of the batch on; embedded: the bytes of that file
    "error_type": "string",
    "error": "string",  # why the line failed; None where it did not
}


@runtime_checkable
class Writer(Protocol):
    """Writes shards.

    Attributes:
        holds_images: whether images go into the shards.
    """

    holds_images: bool

    def check(self) -> None:
        """Raises `RequestError` where a package is missing."""
        ...

    def file(self, out: Path, place: int) -> Path:
        """The file of a shard."""
        ...

    def write(self, out: Path, place: int, rows: Sequence[Mapping[str, Any]], images: Path) -> None:
        """Writes a shard, which appears whole: its rows in order, with the images of a folder."""
        ...

    def read(self, out: Path, place: int) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        """The rows of a shard, each with the bytes of its image: `image` names its file, whatever held it."""
        ...


class Parquet(Writer):
    """One row a line; images are files of their own, or a column of bytes."""

    def __init__(self, holds_images: bool):
        self.holds_images = holds_images

    def check(self) -> None:
        """See `Writer`."""
        if find_spec("pyarrow") is None:
            raise RequestError("Parquet takes pyarrow: pip install pyarrow, or choose --format webdataset")

    def file(self, out: Path, place: int) -> Path:
        """See `Writer`."""
        return out / "shards" / f"{place:06d}.parquet"

    def write(self, out: Path, place: int, rows: Sequence[Mapping[str, Any]], images: Path) -> None:
        """See `Writer`."""
        import pyarrow as arrow
        from pyarrow import parquet

        kinds = {**COLUMNS, "image": "binary"} if self.holds_images else COLUMNS
        schema = arrow.schema([(name, arrow.type_for_alias(kind)) for name, kind in kinds.items()])
        with appearing(self.file(out, place)) as part, parquet.ParquetWriter(part, schema) as writer:
            step = GROUP if self.holds_images else len(rows)
            for i in range(0, len(rows), step):
                some = [{name: row[name] for name in COLUMNS} for row in rows[i : i + step]]
                if self.holds_images:
                    some = [{**row, "image": _bytes(row, images)} for row in some]
                writer.write_table(arrow.Table.from_pylist(some, schema))

    def read(self, out: Path, place: int) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        """See `Writer`."""
        from pyarrow import parquet

        with parquet.ParquetFile(self.file(out, place)) as file:
            for rows in file.iter_batches(GROUP):
                for row in rows.to_pylist():
                    image = row["image"]
                    if self.holds_images and image is not None:
                        row["image"] = f"images/{place:06d}/{row['line']:09d}.image"  # what kind it is nobody asks
                    elif image is not None:
                        image = (out / image).read_bytes() if (out / image).exists() else None
                    yield row, image


class WebDataset(Writer):
    """A tar file a shard: of each image KEY.png, KEY.json with its row, and KEY.txt with its prompt.

    Rows that failed have no image, which readers of such files do not expect: they are in errors/, as JSON lines.
    """

    holds_images = True

    def check(self) -> None:
        """See `Writer`."""

    def file(self, out: Path, place: int) -> Path:
        """See `Writer`."""
        return out / "shards" / f"{place:06d}.tar"

    def write(self, out: Path, place: int, rows: Sequence[Mapping[str, Any]], images: Path) -> None:
        """See `Writer`."""
        failed = [{name: row[name] for name in COLUMNS} for row in rows if row["image"] is None]
        errors = out / "errors" / f"{place:06d}.jsonl"
        if failed:
            errors.parent.mkdir(exist_ok=True)
            write(errors, b"".join(_json(row) + b"\n" for row in failed))
        else:
            errors.unlink(missing_ok=True)  # of before they were done again
        with appearing(self.file(out, place)) as part, tarfile.open(part, "w") as tar:
            for row in rows:
                if (image := _bytes(row, images)) is not None:
                    key, _, suffix = Path(row["image"]).name.partition(".")
                    told = {name: row[name] for name in COLUMNS if name not in ("image", "error", "error_type")}
                    for end, content in ((suffix, image), ("json", _json(told)), ("txt", row["prompt"].encode())):
                        head = tarfile.TarInfo(f"{key}.{end}")  # of no time and no owner: the same bytes each time
                        head.size = len(content)
                        tar.addfile(head, io.BytesIO(content))

    def read(self, out: Path, place: int) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        """See `Writer`."""
        none = dict[str, Any].fromkeys(COLUMNS)
        errors = out / "errors" / f"{place:06d}.jsonl"
        for text in errors.read_bytes().splitlines() if errors.exists() else ():
            yield none | json.loads(text), None
        with tarfile.open(self.file(out, place)) as tar:
            name, image = "", None
            for head in tar:
                file = tar.extractfile(head)
                content = b"" if file is None else file.read()
                if head.name.endswith(".json"):  # after its image, as it was written
                    yield none | json.loads(content) | {"image": f"images/{place:06d}/{name}"}, image
                elif not head.name.endswith(".txt"):
                    name, image = head.name, content


def _bytes(row: Mapping[str, Any], images: Path) -> bytes | None:
    return None if row["image"] is None else (images / Path(row["image"]).name).read_bytes()


def _json(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":"), allow_nan=False).encode()


WRITERS: dict[str, Writer] = {"parquet": Parquet(False), "embedded": Parquet(True), "webdataset": WebDataset()}
