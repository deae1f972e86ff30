"""Make the files beside this one: the same rows, written by the libraries that people use.

    pip install pyarrow==26.0.1 polars==2.1.0 pandas==3.1.1 fastparquet==2026.9.0 duckdb==2.0.1 datasets==5.2.0 \
        zstandard==0.25.0 && python tests/formats/make.py
"""

import json
import shutil
import tempfile
from pathlib import Path

import datasets
import duckdb
import fastparquet
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import zstandard

HERE = Path(__file__).parent
ROWS = json.loads((HERE / "rows.json").read_text())  # [{"id": 0, "text": "..."}, ...], one of the texts null


def main() -> None:
    table, frame, many = pa.Table.from_pylist(ROWS), pd.DataFrame(ROWS), pl.DataFrame(ROWS)
    pa.parquet.write_table(table, HERE / "pyarrow.parquet", compression="zstd")
    pa.csv.write_csv(table, HERE / "pyarrow.csv")
    with pa.ipc.new_file(HERE / "pyarrow-file.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.ipc.new_stream(HERE / "pyarrow-stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    many.write_parquet(HERE / "polars.parquet")
    many.write_ipc(HERE / "polars-file.arrow", compression="lz4")
    many.write_ipc_stream(HERE / "polars-stream.arrow", compression="zstd")
    many.write_ndjson(HERE / "polars.ndjson")
    many.write_csv(HERE / "polars.csv")
    many.write_csv(HERE / "polars.tsv", separator="\t", quote_style="always")
    frame.to_parquet(HERE / "pandas.PARQUET")
    frame.to_csv(HERE / "pandas.csv", index=False, lineterminator="\r\n")
    frame.to_csv(HERE / "pandas.tsv.gz", index=False, sep="\t")
    frame.to_json(HERE / "pandas-array.json", orient="records", indent=1)
    for suffix in ("jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst"):
        frame.to_json(HERE / f"pandas.{suffix}", orient="records", lines=True)
    fastparquet.write(str(HERE / "fastparquet.parquet"), frame, compression="GZIP")
    duckdb.from_arrow(table).write_parquet(str(HERE / "duckdb.parquet"))
    for name, options in {
        "duckdb.json": "FORMAT json, ARRAY true", "duckdb-lines.json.zst": "FORMAT json, COMPRESSION zstd",
        "duckdb.csv.zstd": "FORMAT csv, COMPRESSION zstd",
    }.items():  # fmt: skip
        duckdb.sql(f"COPY (SELECT * FROM 'pyarrow.parquet') TO '{HERE / name}' ({options})")
    with tempfile.TemporaryDirectory() as folder:
        ours = datasets.Dataset.from_list(ROWS)
        ours.save_to_disk(folder)
        shutil.copy(next(Path(folder).glob("*.arrow")), HERE / "datasets.arrow")
        ours.to_json(HERE / "datasets.jsonl")
        ours.to_csv(HERE / "datasets.csv")
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS]
    frames = (zstandard.ZstdCompressor(write_checksum=True).compress(line) for line in lines)
    (HERE / "zstandard-frames.jsonl.zst").write_bytes(b"".join(frames))
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    with zstandard.ZstdCompressor(compression_params=wide).stream_writer(
        open(HERE / "zstandard-long.jsonl.zst", "wb")  # noqa: SIM115
    ) as file:
        file.write(b"".join(lines))


if __name__ == "__main__":
    main()
