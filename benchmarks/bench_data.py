"""Peak host memory of preparing and reading training data of 200 MB and 1 GB, tokenised to the cache and streamed.

    python benchmarks/bench_data.py BOOKS.jsonl.xz [--output FILE]

The books are repeated until the JSON-lines file has the size; the tokenizer is that of the model that ships with pldr. Each
measurement is a process of its own: 200 sequences of 1,024 tokens are read as the data loader does, spread over all data.
"""

import argparse
import json
import lzma
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(file: str, cache: str, streaming: bool) -> None:
    from pldr.data.rows import TokenStream, cached_rows
    from pldr.data.sources import Source
    from pldr.models.shipped import STORIES
    from pldr.recipe import DataRecipe
    from pldr.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(STORIES)
    recipe = DataRecipe([file], sequence_length=1024, cache=cache, shuffle_buffer=20)
    start = time.perf_counter()
    if streaming:
        rows = iter(TokenStream(Source([file]), tokenizer, recipe, seed=1))
        count = sum(1 for _ in zip(range(20_000), rows, strict=False))
    else:
        found = cached_rows(Source([file]), tokenizer, recipe)
        count = len(found)
        for row in range(0, count, max(count // 200, 1)):
            found[row]["input_ids"].sum()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": count, "peak_mib": peak, "seconds": time.perf_counter() - start}))


def main() -> None:
    if sys.argv[1] == "--measure":
        measure(sys.argv[2], sys.argv[3], sys.argv[4] == "streamed")
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("books", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with lzma.open(arguments.books, "rb") as stream:
        books = [line for line in stream if len(line) < 2_000_000][:100]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in (200, 1000):
            file = Path(folder) / f"{megabytes}.jsonl"
            with file.open("wb") as out:
                while out.tell() < megabytes * 1e6:
                    out.writelines(books)
            for mode in ("cached", "streamed"):
                command = [sys.executable, __file__, "--measure", str(file), folder, mode]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append({"megabytes": file.stat().st_size / 1e6, "mode": mode, **json.loads(done.stdout)})
                print(rows[-1], flush=True)
            file.unlink()
    from conditions import conditions, record  # not above: what it imports would count in the measured processes

    result = {"benchmark": "data", "rows": rows} | conditions()
    record(result, arguments.output)


if __name__ == "__main__":
    main()
