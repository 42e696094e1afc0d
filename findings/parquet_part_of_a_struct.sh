#!/usr/bin/env bash
# pyarrow's readers give a part of a struct column two shapes: a struct, or a column of its own.
#
# Versions: pyarrow 26.0.1, Python 3.11 on Linux.
# Source: ParquetFile.read and iter_batches select leaves by path and rebuild the structs around
# them; parquet.read_table goes by way of pyarrow.dataset, whose field reference takes the leaf out.
#
# Hugging Face stores an image as struct<bytes, path>. To list the names of the images without
# reading their bytes one asks for the column "image.path".
#
# What one expects: the same table by pyarrow.parquet.read_table(file, columns=["image.path"]) as by
# pyarrow.parquet.ParquetFile(file).read(columns=["image.path"]): the arguments are the same, and
# so is the table when a whole column is asked for.
# What happens: ParquetFile gives the column "image" of struct<path>, read_table the column "path" of
# text. With two images a row, as of a picture and its mask, read_table gives two columns that are
# both called "path", and asking for one of them by that name raises.
#
# Output seen:
#   ParquetFile.read: ['image'] struct<path: string>
#   ParquetFile.iter_batches: ['image'] struct<path: string>
#   read_table: ['path'] string
#   read_table of two: ['path', 'path']
#   column("path") of these: KeyError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder/images.parquet" <<'PYTHON'
import sys

import pyarrow as pa
import pyarrow.parquet as pq

path = sys.argv[1]
image = pa.array([{"bytes": b"1", "path": "a.png"}, {"bytes": b"2", "path": "b.png"}])
pq.write_table(pa.table({"image": image, "mask": image, "label": [0, 1]}), path)
file = pq.ParquetFile(path)
tables = {
    "ParquetFile.read": file.read(columns=["image.path"]),
    "ParquetFile.iter_batches": next(file.iter_batches(columns=["image.path"])),
    "read_table": pq.read_table(path, columns=["image.path"]),
}
seen = [f"{how}: {table.schema.names} {table.column(0).type}" for how, table in tables.items()]
both = pq.read_table(path, columns=["image.path", "mask.path"])
seen.append(f"read_table of two: {both.schema.names}")
try:
    seen.append(f"column: {both.column('path')}")
except KeyError:
    seen.append('column("path") of these: KeyError')
print("\n".join(seen))
expected = [
    "ParquetFile.read: ['image'] struct<path: string>",
    "ParquetFile.iter_batches: ['image'] struct<path: string>",
    "read_table: ['path'] string",
    "read_table of two: ['path', 'path']",
    'column("path") of these: KeyError',
]
sys.exit(seen != expected)
PYTHON
