"""Training from an object store behind 20 ms, against training from the local disk.

    python benchmarks/object_store.py [--cache PATH] [--steps 300] [--repeats 4] [--latency-ms 20]

One transcoder of the bundled model's shape (D = 128, F = 1024, 2048 rows a step), trained by `thresher.train.run.train`
from a directory and from `s3://`, in turn. Without `--cache`, part of the bundled text is harvested first. Nothing that
was fetched is kept for the next epoch, and 64 MB are read ahead. What is compared is the loop: the time of a training
less that of one of five steps, so that opening the cache, which costs some requests one after another, counts in the
other column only. The weights must be the same bits.

The server is ours: moto's takes longer for a request than the latency that is to be measured, and of the same two
cores. It answers the requests that reading makes (HEAD, GET with a range, a listing) from a directory, by `sendfile`,
each after its latency, in a process of its own. Its CPU time counts against the training, so the ratio is too low
rather than too high where cores are few.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BAR = 0.9
BUCKET = "bench"
_WARM_STEPS = 5


async def _serve(folder: Path, latency_s: float) -> None:
    """Answer requests for the files of a folder, as S3 would; the port is printed."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and (request := head.decode()):
                await asyncio.sleep(latency_s)
                await _answer(folder, request, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


async def _answer(folder: Path, request: str, writer: asyncio.StreamWriter) -> None:
    method, target, _ = request.split(" ", 2)
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in request.split("\r\n")[1:])}
    parts = urlsplit(target)
    if "list-type" in parts.query:
        body = _listing(folder, parse_qs(parts.query)["prefix"][0], "delimiter" in parts.query)
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return await writer.drain()
    path = folder / unquote(parts.path).removeprefix(f"/{BUCKET}/")
    if not path.is_file():
        body = b"" if method == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>"
        writer.write(f"HTTP/1.1 404 Not Found\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return await writer.drain()
    size, status, extra = path.stat().st_size, "200 OK", ""
    start, end = 0, size
    if "range" in headers:
        first, last = headers["range"].removeprefix("bytes=").split("-")
        start, end, status = int(first), min(int(last) + 1, size), "206 Partial Content"
        extra = f"Content-Range: bytes {start}-{end - 1}/{size}\r\n"
    when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(path.stat().st_mtime))
    fixed = f'ETag: "{size}"\r\nLast-Modified: {when}\r\nAccept-Ranges: bytes\r\n{extra}'
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {end - start}\r\n{fixed}\r\n".encode())
    await writer.drain()
    if method == "GET" and end > start:
        with path.open("rb") as file:
            await asyncio.get_running_loop().sendfile(writer.transport, file, start, end - start)
    return None


def _listing(folder: Path, prefix: str, flat: bool) -> bytes:
    """A page of ListObjectsV2 with all that is below a prefix, or right below it."""
    keys, folders = [], set()
    for file in sorted(folder.rglob("*")):
        key = str(file.relative_to(folder))
        if file.is_file() and key.startswith(prefix):
            rest = key[len(prefix) :]
            if flat and "/" in rest:
                folders.add(prefix + rest.partition("/")[0] + "/")
            else:
                keys.append((key, file.stat().st_size))
    when = "2026-01-01T00:00:00.000Z"
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified><ETag>&quot;{size}&quot;</ETag>"
        f"<Size>{size}</Size></Contents>"
        for key, size in keys
    )
    common = "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in sorted(folders))
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}{common}</ListBucketResult>".encode()


@contextmanager
def serving(folder: Path, latency_ms: float) -> Iterator[int]:
    """The server in a process of its own; its port."""
    command = [sys.executable, __file__, "--serve", str(folder), "--latency-ms", str(latency_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait()


class Cost(NamedTuple):
    """Of one training, in seconds."""

    loop: float
    """Of all steps but the first five."""
    whole: float


def measure(local: Path, uri: str, steps: int, repeats: int, folder: Path) -> bool:
    """Print the ratio of the two; whether it meets the bar."""
    from rich.console import Console

    from thresher.cache.place import Place, place_at
    from thresher.cache.reader import CacheReader
    from thresher.train.config import TrainConfig
    from thresher.train.dictionary.spec import DictionaryConfig
    from thresher.train.plan import plan_runs
    from thresher.train.run import train

    def timed(where: Place, steps: int, out: Path) -> float:
        began = time.perf_counter()
        with CacheReader.open(where) as reader:
            config = TrainConfig(batch_rows=2048, steps=steps, lr=2e-3, calibrate_rows=50_000, heldout_rows=10_000)
            dictionary = DictionaryConfig(n_latents=1024, k=16, layers=(1,))
            plans = plan_runs("one", dictionary, config, reader.sites, {})
            results = train(plans, reader, out=out, device="cpu", console=Console(quiet=True))
        assert all(result.status == "trained" for result in results)
        return time.perf_counter() - began

    def cost(where: Place, out: Path) -> Cost:
        short, whole = timed(where, _WARM_STEPS, out / "short"), timed(where, steps, out / "whole")
        return Cost(whole - short, whole)

    timed(local, _WARM_STEPS, folder / "warm")  # compiles, fills the page cache
    pairs, same = [], True
    for turn in range(repeats):
        sides: dict[str, Place] = {"disk": local, "store": place_at(uri)}
        order = list(sides)[:: -1 if turn % 2 else 1]  # who is first finds the machine as the others left it
        costs = {side: cost(sides[side], folder / f"{side}{turn}") for side in order}
        disk, store = costs["disk"], costs["store"]
        files = [next((folder / f"{side}{turn}" / "whole").glob("*/weights.safetensors")) for side in ("disk", "store")]
        same &= files[0].read_bytes() == files[1].read_bytes()
        pairs.append((disk, store))
        whole = f"whole: {disk.whole:.2f} s, {store.whole:.2f} s"
        print(f"disk and store, loop: {disk.loop:.2f} s, {store.loop:.2f} s; {whole}", flush=True)
    ratios = sorted(disk.loop / store.loop for disk, store in pairs)
    ratio = statistics.median(ratios)
    best = min(disk.loop for disk, _ in pairs) / min(store.loop for _, store in pairs)
    all_of_it = statistics.median(disk.whole / store.whole for disk, store in pairs)
    met = ratio >= BAR and same
    print(
        f"Speed of the loop from the store, by that from the disk: {ratio:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}; of "
        f"minima {best:.2f}; whole trainings {all_of_it:.2f}); weights {'are the same' if same else 'DIFFER'}."
    )
    print(f"Bar: at least {BAR} of the speed from the disk: {'met' if met else 'MISSED'}.")
    return met


def main() -> None:
    """Serve, or measure and print whether the bar is met."""
    parser = argparse.ArgumentParser(description="Training from an object store against training from the disk.")
    parser.add_argument("--cache", type=Path, help="A cache with mlp_in and mlp_out of width 128 at layer 1.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(_serve(arguments.serve, arguments.latency_ms / 1000))
        return
    from thresher.cache.process import prepare_process

    if prepare_process():  # as the command line does, which has not loaded torch by then
        os.execv(sys.executable, [sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory() as name:
        cache = arguments.cache or harvested(Path(name))
        with serving(cache.parent, arguments.latency_ms) as port:
            os.environ |= {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "none",
                "AWS_SECRET_ACCESS_KEY": "none",
                "THRESHER_READ_AHEAD_MB": "64",
                "THRESHER_KEEP_GB": "0",
            }
            uri = f"s3://{BUCKET}/{cache.name}"
            measure(cache, uri, arguments.steps, arguments.repeats, Path(name))


def harvested(folder: Path) -> Path:
    """A cache of part of the bundled text, all layers."""
    from rich.console import Console

    from thresher.harvest.corpus import DataConfig
    from thresher.harvest.run import HarvestConfig, harvest
    from thresher.harvest.target import TargetConfig

    data = DataConfig(context=256, test_fraction=0.1, validation_fraction=0.05, max_tokens=400_000)
    path = folder / "data" / "cache.zarr"
    harvest(TargetConfig(), data, HarvestConfig(sites=("mlp_in", "mlp_out")), path=path, console=Console(quiet=True))
    return path


if __name__ == "__main__":
    main()
