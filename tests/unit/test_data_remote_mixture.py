"""Training samples come from a failing web server exactly as from the disk, each dataset with its own credentials."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from flaky_server import FlakyServer, serve
from shard_factory import plain, write_shards
from torch.utils.data import DataLoader

from blip2train.batch import Sample
from blip2train.data.mixture import Dataset, Mixture
from blip2train.data.shards import ShardCache
from blip2train.data.sharing import Shape
from blip2train.data.stream import PartStream
from blip2train.errors import DataError


def keys(samples: list[Sample]) -> list[tuple[str, str, int]]:
    return [(sample.dataset, sample.key, int(sample.image[0, 0, 0])) for sample in samples]


def drawn(mixture: Mixture, num_workers: int = 0) -> list[Any]:
    stream = PartStream(mixture, keys, Shape(0, 1, max(1, num_workers), 6), first_sample=0)
    loader: DataLoader[Any] = DataLoader(stream, batch_size=None, num_workers=num_workers)
    return [part.rows for part in islice(loader, 24)]


def mixture(public: Path | str, private: Path | str, folder: Path, **options: Any) -> Mixture:
    datasets = [
        Dataset("public", f"{public}/s-{{000..002}}.tar", plain, weight=2.0),
        Dataset("private", f"{private}/s-{{000..001}}.tar", plain, **options),
    ]
    cache = ShardCache(folder, wait_s=0.01, timeout_s=5.0)
    return Mixture(datasets, seed=3, num_streams=4, shuffle_window=5, cache=cache)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    write_shards(tmp_path / "public", [9, 6, 9], name="p")
    write_shards(tmp_path / "private", [7, 4], name="q", broken={2: b"no image"})
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_over_the_network_equal_those_from_disk(local: Path, num_workers: int) -> None:
    expected = drawn(mixture(local / "public", local / "private", local / "cache"), num_workers)
    shutil.copy(local / "private" / "index.json", local / "counts.json")
    files = {f"/{path.relative_to(local)}": path.read_bytes() for path in local.rglob("s-*.tar")}
    files["/public/index.json"] = (local / "public" / "index.json").read_bytes()
    with serve(FlakyServer(files=files, token="secret", guarded="/private")) as server:
        server.faults = [503, 500]
        remote = mixture(
            f"{server.url}/public",
            f"{server.url}/private",
            local / "cache",
            index=str(local / "counts.json"),
            storage_options={"headers": {"Authorization": "secret"}},
        )
        assert len(remote.shards[0]) == 3
        server.faults = [("cut", 3000), 503, ("cut", 100), 502]
        assert drawn(remote, num_workers) == expected
        downloads = [path for path, asked in server.requests if path.endswith(".tar") and asked is None]
        assert len(downloads) <= 5 + 4


def test_missing_credentials_stop_before_the_first_batch_is_whole(local: Path) -> None:
    files = {f"/{path.relative_to(local)}": path.read_bytes() for path in local.rglob("*.*")}
    with serve(FlakyServer(files=files, token="secret", guarded="/private")) as server:
        remote = mixture(f"{server.url}/public", f"{server.url}/private", local / "cache", index=str(local / "i.json"))
        shutil.copy(local / "private" / "index.json", local / "i.json")
        with pytest.raises(DataError, match=r"credentials \(storage_options"):
            drawn(remote)
